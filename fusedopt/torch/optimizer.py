"""The base of all optimizers here, and the one for any rule of fusedopt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..interop.common import number
from ..optimizer import Optimizer as Fused
from ..rules.base import Rule
from ..step.info import StepInfo
from .engine import Engine

Number = float | torch.Tensor
Params = Iterable[Any]
"""Tensors, pairs of a name and a tensor, or dicts that are parameter groups."""

REFUSED = {
    "differentiable": "steps are taken in place, outside of autograd",
    "capturable": "steps are taken on the CPU, where no graph is captured",
}
IGNORED = ("foreach", "fused")
"""How torch computes, not what."""


class Options(TypedDict, total=False):
    """The keyword arguments of `fusedopt.Optimizer` that every optimizer here takes."""

    state_dtype: Any
    master: Any
    rounding: Any
    clip_norm: float | None
    clip_value: float | None
    skip_nonfinite: bool
    ema: float | None
    zero_grads: bool
    stats: bool
    verify: bool
    seed: int
    threads: int | None
    backend: str


@dataclass(frozen=True)
class _Kept:
    """A parameter's states on their way through torch's loading, which would cast them."""

    states: Any


class Base(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose steps fusedopt takes, in the parameters' memory.

    States are in `state` under torch's names, as tensors over fusedopt's memory: a parameter's
    states can be changed in place, and are shown from its first step on.
    """

    _state_names: ClassVar[Mapping[str, str]] = {}
    """torch's names of states, by fusedopt's."""
    _follows: ClassVar[Mapping[str, Callable[[Any, int], float]]] = {}
    """Entries of torch's states that follow from the rule and its step count."""
    _step_supports_amp_scaling = True  # torch.amp.GradScaler gives `grad_scale` and `found_inf`

    def __init__(
        self, params: Params, defaults: dict[str, Any], options: Mapping[str, Any]
    ) -> None:
        unknown = set(options) - set(Options.__annotations__)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: no argument {', '.join(sorted(unknown))}; fusedopt's"
                f" options are {', '.join(Options.__annotations__)}"
            )
        _refuse(type(self).__name__, defaults)
        self._options = dict(options)
        self._copies: dict[torch.Tensor, torch.Tensor | None] = {}
        self._engine: Engine | None = None
        self.info: StepInfo | None = None
        super().__init__(params, defaults)

    # What a subclass defines.

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule that a parameter group asks for."""
        raise NotImplementedError

    def _watched(self, group: Mapping[str, Any]) -> list[Any]:
        """The hyperparameters, without the learning rate, that make the rule."""
        raise NotImplementedError

    def _counted(self, opt: Fused) -> bool:
        """Return whether states have a step count."""
        return True

    # torch's interface.

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `step` as torch does, whose own wrapper is called where it has something to do.

        That one opens a record for the profiler in every step, which takes longer than a step of
        small tensors.
        """
        wrapped = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if profiler._is_profiler_enabled or self._has_hooks():
                return wrapped(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    def _has_hooks(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, whose hyperparameters are the defaults where it has none.

        Parameters
        ----------
        param_group : dict
            `params` and hyperparameters.

        Raises
        ------
        ValueError
            If a hyperparameter is out of range or a parameter does not suit the rule.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._engine = None
        try:
            _refuse(type(self).__name__, group)
            rule = self._rule(group)
            for p in group["params"]:
                reason = rule.refuses(p)
                if reason:
                    raise ValueError(f"{type(self).__name__}: {reason}")
        except BaseException:
            self.param_groups.pop()
            raise

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        hessian: Sequence[torch.Tensor | None] | None = None,
    ) -> Any:
        """Take one step with the gradients of all parameters that have one.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model anew and returns the loss.
        hessian : sequence of torch.Tensor, optional
            For Sophia: estimates of the Hessian's diagonal, one for each parameter, or None.

        Returns
        -------
        Any
            What the closure returned. What the step did is in `info`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            scale = getattr(self, "grad_scale", None)
            self.info = self._bound().step(hessian, 1.0 if scale is None else float(scale))
        return loss

    def _bound(self) -> Engine:
        if self._engine is None or not self._engine.serves():
            self._engine = Engine(self)
        return self._engine

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put averages in the place of the parameters, inside of a `with` block.

        These are the averages of `ema`, or those that Schedule-Free rules make by themselves.
        """
        with self._bound().averaged():
            yield

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the `state_dict` of this class or of torch.optim's.

        Parameters
        ----------
        state_dict : dict
            States are taken in their own dtypes and stored as this optimizer stores them.
        """
        # The last hook to run, so that those of the user see the states.
        keep = self.register_load_state_dict_pre_hook(_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            keep.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_copies", {})
        self._engine = None
        self.info = None
        for p, entry in self.state.items():
            if isinstance(entry, _Kept):
                self.state[p] = dict(entry.states)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name not in REFUSED:
                    group.setdefault(name, value)
            # What a checkpoint says of how torch computed.
            group.update({n: self.defaults[n] for n in (*REFUSED, *IGNORED) if n in group})

    def _options_of_engine(self) -> dict[str, Any]:
        """The options, with states under fusedopt's names."""
        chosen = self._options.get("state_dtype")
        if not isinstance(chosen, Mapping):
            return self._options
        ours = {theirs: name for name, theirs in self._state_names.items()}
        return {**self._options, "state_dtype": {ours.get(n, n): f for n, f in chosen.items()}}


class Optimizer(Base):
    """A torch optimizer with any rule of fusedopt, also one of your own.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups. A group can have a `rule` of its own.
    rule : fusedopt.Rule
        Its hyperparameters are those of the groups, by fusedopt's names, and live there. A learning
        rate that is a schedule is called with the number of the step.
    **options
        See `fusedopt.Optimizer`: state_dtype, master, rounding, clip_norm, clip_value,
        skip_nonfinite, ema, zero_grads, stats, verify, seed, threads, backend.

    Examples
    --------
    >>> import torch, fusedopt as fo, fusedopt.torch
    >>> model = torch.nn.Linear(3, 2)
    >>> groups = [{"params": [model.weight], "rule": fo.Muon()}, {"params": [model.bias]}]
    >>> opt = fusedopt.torch.Optimizer(groups, fo.AdamW(lr=3e-4))
    >>> [group["lr"] for group in opt.param_groups]
    [0.02, 0.0003]
    """

    def __init__(self, params: Params, rule: Rule, **options: Unpack[Options]) -> None:
        self._rules = {rule.name: type(rule)}
        super().__init__(params, _hyperparameters(rule), options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rule = param_group.get("rule")
        if isinstance(rule, Rule):
            self._rules.setdefault(rule.name, type(rule))
            param_group |= {**_hyperparameters(rule), **param_group, "rule": rule.name}
        super().add_param_group(param_group)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        cls = self._rules[group["rule"]]
        return cls(**{f.name: number(group[f.name]) for f in fields(cls)})

    def _watched(self, group: Mapping[str, Any]) -> list[Any]:
        names = [f.name for f in fields(self._rules[group["rule"]]) if f.name != "lr"]
        return [group["rule"], *(group[name] for name in names)]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rules": self._rules}


def arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters among the local names of an `__init__`, in its order."""
    others = ("self", "params", "options", "__class__")
    return {name: value for name, value in names.items() if name not in others}


def _hyperparameters(rule: Rule) -> dict[str, Any]:
    return {"rule": rule.name, **{f.name: getattr(rule, f.name) for f in fields(rule)}}


def _refuse(name: str, values: Mapping[str, Any]) -> None:
    for refused, reason in REFUSED.items():
        if values.get(refused):
            raise ValueError(f"{name}({refused}=True): is not supported: {reason}; leave it out")


def _keep(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {key: _Kept(entry) for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": state}
