"""The fusedopt optimizer behind a torch optimizer: bound to its tensors, states and groups."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import repeat
from math import isclose
from typing import Any

import numpy as np
import torch

from ..arrays.foreign import host_array
from ..arrays.stored import LeafState
from ..optimizer import Optimizer
from ..rules.base import Rule
from ..step.info import StepInfo
from .leaf import Leaf, tensor_of

address_of = torch.Tensor.data_ptr


class Engine:
    """One fusedopt optimizer over all parameters of a torch optimizer.

    It holds for as long as the groups have the same parameters, in the same memory, and the same
    states; `serves` says whether, and takes over other hyperparameters. After that a new one takes
    the states from `optimizer.state`, so that loading, copying and adding parameters need nothing
    of their own.

    Parameters
    ----------
    optimizer : fusedopt.torch.Optimizer
        Its groups, its options and its `state`, which then shows this engine's states.
    """

    def __init__(self, optimizer: Any) -> None:
        groups = [group for group in optimizer.param_groups if group["params"]]
        self._optimizer, self._groups = optimizer, groups
        self._seen = [optimizer._watched(group) for group in groups]
        # A tensor may have other memory now, and still be the same object.
        self._in_tensors = [any(map(has_tensor, values)) for values in self._seen]
        self._rules = [optimizer._rule(group) for group in groups]
        self._params = [list(group["params"]) for group in groups]
        self.params = [p for params in self._params for p in params]
        rule_of = [
            rule for rule, group in zip(self._rules, groups, strict=True) for _ in group["params"]
        ]
        self._leaves = [
            Leaf(p, rule.program.phases > 1) for p, rule in zip(self.params, rule_of, strict=True)
        ]
        options = optimizer._options_of_engine()
        copies = optimizer._copies
        if options.get("clip_norm") is not None and any(leaf.sharded for leaf in self._leaves):
            raise ValueError(
                "clip_norm: of sharded parameters each process sees a part of the norm; clip with"
                " torch.nn.utils.clip_grad_norm_ before the step"
            )
        ends = np.cumsum([len(group["params"]) for group in groups]).tolist()
        self._spans = {
            str(k): slice(end - len(group["params"]), end)
            for k, (group, end) in enumerate(zip(groups, ends, strict=True))
        }
        self.opt = Optimizer(
            self._tree([leaf.array for leaf in self._leaves]),
            {
                f"{k}.*": replace(rule, lr=base_of(group.get("initial_lr", group["lr"])))
                for k, (rule, group) in enumerate(zip(self._rules, groups, strict=True))
            },
            copy_out=self._tree([copies[p] for p in self.params]) if copies else None,
            **options,
        )
        snapshot = self.opt.snapshot()
        self._paths: Sequence[str] = snapshot.paths
        self._counters: np.ndarray = snapshot.counters
        self._memories: Sequence[LeafState] = snapshot.leaf_states
        self._learning_rates = snapshot.rates
        self._plain = self._direct = all(leaf.plain for leaf in self._leaves)
        self._single = [k for k, leaf in enumerate(self._leaves) if leaf.array.size == 1]
        self._staged = [leaf for leaf in self._leaves if leaf.staged]
        self._masters = [
            k for k, leaf_state in enumerate(self._memories)
            if leaf_state.extra is not None and leaf_state.extra[0] == "master"
        ]  # fmt: skip
        self._take_states(optimizer.state, rule_of)
        self._moved()
        self._rates: list[float] = []
        self._use_rates()

    def _tree(self, leaves: Sequence[Any]) -> dict[str, Any]:
        return {name: leaves[span] for name, span in self._spans.items()}

    def _moved(self) -> None:
        """Note where the parameters are and what masters were made of."""
        self._addresses = list(map(address_of, self.params)) if self._plain else self._located()
        self._versions = [self.params[k]._version for k in self._masters]

    def _located(self) -> list[int]:
        return [address_of(leaf.local) for leaf in self._leaves]

    # Whether what is known of the tensors still holds.

    def serves(self) -> bool:
        """Take other hyperparameters over; return whether the engine serves the optimizer so."""
        state, groups = self._optimizer.state, self._optimizer.param_groups
        if state is not self._state or len(state) != self._entries:
            return False
        groups = [group for group in groups if group["params"]]
        if not all(map(operator.is_, groups, self._groups)) or len(groups) != len(self._groups):
            return False
        for group, params in zip(groups, self._params, strict=True):
            found = group["params"]
            if len(found) != len(params) or not all(map(operator.is_, found, params)):
                return False
        addresses = list(map(address_of, self.params)) if self._plain else self._located()
        if addresses != self._addresses:
            return False
        if not all(self._takes(k, group) for k, group in enumerate(groups)):
            return False
        self._use_rates()
        return True

    def _use_rates(self) -> None:
        """Let the next step have the groups' learning rates."""
        rates = [self._rate(group["lr"]) for group in self._groups]
        if rates != self._rates:
            self._learning_rates.use(rates)
            self._rates = rates
            for rule, rate, span in zip(self._rules, rates, self._spans.values(), strict=True):
                if "lr" in rule.settled:
                    self._begin(replace(rule, lr=rate), span)

    def _begin(self, rule: Rule, span: slice) -> None:
        """Fill the states, which begin with the learning rate, of parameters without a step."""
        for k in self._unseen.tolist():
            if span.start <= k < span.stop:
                for name in rule.states:
                    self._memories[k].states[name].fill(rule.initial(name))

    def _rate(self, lr: Any) -> float:
        if callable(lr):
            lr = lr(self.opt.step_count + 1)
        rate = lr if type(lr) is float else float(lr)
        if not rate >= 0.0:
            raise ValueError(f"lr: expected a number >= 0, got {lr!r}")
        return rate

    def _takes(self, k: int, group: Mapping[str, Any]) -> bool:
        """Return whether a group's hyperparameters are those of before, or could be taken over."""
        values = self._optimizer._watched(group)
        if not self._in_tensors[k] and values == self._seen[k]:
            return True
        old, rule = self._rules[k], self._optimizer._rule(group)
        if type(rule) is not type(old) or rule.states != old.states:
            return False
        names = [f.name for f in fields(rule) if f.name != "lr"]
        changed = {n: getattr(rule, n) for n in names if getattr(rule, n) != getattr(old, n)}
        if changed.keys() & set(rule.settled):
            return False
        if changed:
            self.opt.replace(f"{k}.*", **changed)
            self._rates = []
        self._seen[k], self._rules[k] = values, rule
        self._in_tensors[k] = any(map(has_tensor, values))
        return True

    # A step.

    def step(
        self,
        hessian: Sequence[Any] | None,
        grad_scale: float,
        grads: Sequence[Any] | None = None,
    ) -> StepInfo:
        """Update every parameter that has a gradient: its own, without `grads`."""
        if self._masters:
            self._reconcile()
        for leaf in self._staged:
            leaf.read()
        if grads is None:
            grads = [p.grad for p in self.params]
        info = self._stepped(grads, hessian, grad_scale)
        if not info.skipped:
            self._done(grads)
        return info

    def part(
        self, numbers: Sequence[int], grads: Sequence[Any], grad_scale: float, last: bool
    ) -> StepInfo:
        """Update some parameters, by their numbers, none of which is staged; see `step_part`."""
        arrays = [self._leaves[k].gradient(g) for k, g in zip(numbers, grads, strict=True)]
        found = [(self._paths[k], a) for k, a in zip(numbers, arrays, strict=True) if a is not None]
        info = self.opt.step_part(
            [path for path, _ in found], [a for _, a in found], grad_scale=grad_scale, last=last
        )
        if last:
            self._done([True] * len(self.params))
        return info

    def _done(self, grads: Sequence[Any]) -> None:
        """Let torch know of a step; grads: None for the parameters that took no part."""
        for leaf in self._staged:
            leaf.write()
        # As every operation in place does, so that autograd finds a graph that is too old.
        stepped = self.params
        if any(map(operator.is_, grads, repeat(None))):
            stepped = [p for p, g in zip(self.params, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(stepped)
        if self._masters:
            self._versions = [self.params[k]._version for k in self._masters]
        self._show_counts()
        if self._unseen.size:
            self._show_new()

    def _stepped(
        self, grads: Sequence[Any], hessian: Sequence[Any] | None, grad_scale: float
    ) -> StepInfo:
        if hessian is not None and len(hessian) != len(self.params):
            raise ValueError(f"hessian: expected {len(self.params)} tensors, got {len(hessian)}")
        if self._direct and not any(g is not None and g.is_neg() for g in self._numbers(grads)):
            try:
                estimates = None if hessian is None else self._tree(hessian)
                return self.opt.step(self._tree(grads), grad_scale=grad_scale, hessian=estimates)
            except TypeError:  # such as a sparse one; nothing has changed
                self._direct = False
        estimates = None if hessian is None else self._tree(self._arrays(hessian))
        return self.opt.step(
            self._tree(self._arrays(grads)), grad_scale=grad_scale, hessian=estimates
        )

    def _numbers(self, grads: Sequence[Any]) -> Iterator[Any]:
        """The gradients of single elements. Autograd may leave the real or imaginary part of a
        conjugate there, which memory alone does not show; one of more elements has gaps then."""
        return (grads[k] for k in self._single)

    def _arrays(self, tensors: Sequence[Any]) -> list[Any]:
        return [leaf.gradient(g) for leaf, g in zip(self._leaves, tensors, strict=True)]

    def _reconcile(self) -> None:
        """Take masters anew where the user has written a parameter."""
        for k, version in zip(self._masters, self._versions, strict=True):
            if self.params[k]._version != version:
                reconcile(self._memories[k])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages of `ema`, or of Schedule-Free rules, in the place of the parameters."""
        with self.opt.averaged():
            self._written()
            yield
        self._written()

    def _written(self) -> None:
        for leaf in self._staged:
            leaf.write()
        torch.autograd.graph.increment_version(self.params)
        self._versions = [self.params[k]._version for k in self._masters]

    # States, between fusedopt and torch.

    def _take_states(self, state: Any, rule_of: Sequence[Rule]) -> None:
        """Take over what `state` holds of the parameters, and show the live states there."""
        self._count = np.zeros(len(self.params), np.float32)
        self._followed = {name: self._count.copy() for name in self._optimizer._follows}
        for k, p in enumerate(self.params):
            if state.get(p):
                self._counters[k + 1] = self._take(k, state[p], rule_of[k])
                if k in self._masters:
                    reconcile(self._memories[k])
        self._counters[0] = self._counters.max(initial=0)
        self._show_counts()
        self._state = state
        self._unseen = np.arange(len(self.params))
        self._show_new()

    def _take(self, k: int, entry: Mapping[str, Any], rule: Rule) -> int:
        """Write what torch has of a parameter into its states; its number of steps."""
        leaf_state, leaf = self._memories[k], self._leaves[k]
        begun = True
        for name, array in leaf_state.saved.items():
            key, label = self._key(name), name.partition(".")[0]
            shaped = array.shape == leaf.array.shape and name not in leaf_state.sides
            if entry.get(key) is not None:
                value = leaf.array_of(entry[key]) if shaped else host_array(entry[key].detach())
                if value.shape != array.shape:
                    raise ValueError(
                        f"state[{key!r}] of parameter {k}: expected the shape {array.shape}, got"
                        f" {value.shape}"
                    )
                array[...] = value.view(array.dtype) if value.dtype.kind == "i" else value
            elif entry.get(self._key(label)) is not None:
                stored = leaf_state.states[label]  # quantised here, and not there
                value = leaf.array_of(entry[self._key(label)])
                stored.write(stored.format.encode(stored.flat(value.astype(np.float32))))
            elif label in rule.states:
                begun = False
        step = entry.get("step")
        t = int(step) if step is not None else int(begun)
        for name, of in self._optimizer._follows.items():
            if name in entry and not isclose(entry[name], of(rule, t), abs_tol=1e-5):
                raise ValueError(
                    f"state[{name!r}] of parameter {k}: expected {of(rule, t)}, which follows from"
                    f" step {t} and the group's hyperparameters, got {float(entry[name])}; give the"
                    " group those of the run that was saved"
                )
        return t

    def _show_counts(self) -> None:
        """Show the numbers of steps, and what follows from them."""
        np.copyto(self._count, self._counters[1:], casting="unsafe")
        for name, of in self._optimizer._follows.items():
            for rule, span in zip(self._rules, self._spans.values(), strict=True):
                counts, values = self._counters[1:][span], self._followed[name][span]
                values.fill(of(rule, int(counts[0])))
                for t in set(counts[counts != counts[0]].tolist()):
                    values[counts == t] = of(rule, t)

    def _key(self, name: str) -> str:
        """Return the name of a state in torch."""
        base, dot, part = name.partition(".")
        return str(self._optimizer._state_names.get(base, base)) + dot + part

    def _show_new(self) -> None:
        """Show the states of parameters that have taken their first step."""
        begun = self._counters[1 + self._unseen] > 0
        for k in self._unseen[begun].tolist():
            leaf_state, leaf = self._memories[k], self._leaves[k]
            entry: dict[str, Any] = {}
            if self._optimizer._counted(self.opt):
                entry["step"] = tensor_of(self._count[k : k + 1]).reshape(())
            for name, values in self._followed.items():
                entry[name] = tensor_of(values[k : k + 1]).reshape(())
            for name, array in leaf_state.saved.items():
                shaped = array.shape == leaf.array.shape and name not in leaf_state.sides
                entry[self._key(name)] = leaf.state(array) if shaped else tensor_of(array)
            if entry:
                self._state[self.params[k]] = entry
        self._unseen = self._unseen[~begun]
        self._entries = len(self._state)


def base_of(lr: Any) -> float:
    """The base value of a learning rate: a number, a tensor or a schedule."""
    if callable(lr):
        lr = lr.base if hasattr(lr, "base") else lr(1)
    return float(lr)


def has_tensor(value: Any) -> bool:
    """Return whether a hyperparameter is a tensor or a pair with one."""
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(map(has_tensor, value))
    )


def reconcile(leaf_state: LeafState) -> None:
    """Make a float32 master agree with its parameter where that is not the master, rounded."""
    assert leaf_state.extra is not None
    master, p = leaf_state.extra[1], leaf_state.caller
    np.copyto(master, p, where=master.astype(p.dtype) != p, casting="unsafe")
