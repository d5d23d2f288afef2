"""The classes of torch.optim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import numpy as np
import torch

from ..interop.torch import HOW, LAYOUTS, Layout, rule_of
from ..linalg.newton_schulz import Products
from ..optimizer import Optimizer as Fused
from ..rules import Muon as MuonRule
from ..rules.base import Rule
from .optimizer import Base, Number, Options, Params, arguments

_LAYOUTS = {layout.cls: layout for layout in LAYOUTS}


class TorchRule(Base):
    """A class of torch.optim: its groups and states are laid out as a table says."""

    _layout: ClassVar[Layout]
    _watched_names: ClassVar[list[str]]

    def __init_subclass__(cls, layout: str | None = None) -> None:
        super().__init_subclass__()
        if layout is None:  # a user's own subclass
            return
        cls._layout = found = _LAYOUTS[layout]
        cls._state_names = {ours: theirs for theirs, ours in found.states.items()}
        cls._follows = found.follows
        names = (*found.named, *found.flags)
        cls._watched_names = [name for name in names if name != "lr" and name not in HOW]

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return rule_of(group, self._layout)

    def _watched(self, group: Mapping[str, Any]) -> list[Any]:
        return [group[name] for name in self._watched_names]

    def _counted(self, opt: Fused) -> bool:
        # The bits of stochastic rounding depend on it.
        return self._layout.counted or self._options.get("rounding") == "stochastic"


class SGD(TorchRule, layout="SGD"):
    """Stochastic gradient descent, with momentum if asked, as `torch.optim.SGD`.

    A sparse gradient updates the rows that it has, and the momentum of these alone decays.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, momentum, dampening, weight_decay, nesterov, maximize
        As in `torch.optim.SGD`.
    foreach, fused
        Without effect.
    differentiable
        Refused if True.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        return super()._rule(group)


class Adagrad(TorchRule, layout="Adagrad"):
    """AdaGrad as `torch.optim.Adagrad`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize
        As in `torch.optim.Adagrad`.
    foreach, fused
        Without effect.
    differentiable
        Refused if True.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class RMSprop(TorchRule, layout="RMSprop"):
    """RMSProp as `torch.optim.RMSprop`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, alpha, eps, weight_decay, momentum, centered, maximize
        As in `torch.optim.RMSprop`.
    foreach
        Without effect.
    capturable, differentiable
        Refused if True.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class Adadelta(TorchRule, layout="Adadelta"):
    """Adadelta as `torch.optim.Adadelta`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, rho, eps, weight_decay, maximize
        As in `torch.optim.Adadelta`.
    foreach
        Without effect.
    capturable, differentiable
        Refused if True.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class Adafactor(TorchRule, layout="Adafactor"):
    """Adafactor as `torch.optim.Adafactor`; see `fusedopt.Adafactor`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, beta2_decay, eps, d, weight_decay, maximize
        As in `torch.optim.Adafactor`. For an eps[0] that is None a group has one value: float64's
        epsilon where all its parameters are of that dtype, and else float32's.
    foreach
        Without effect.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        wide = all(p.dtype == torch.float64 for p in group["params"])
        return rule_of(group, self._layout, dtype=np.float64 if wide else np.float32)


class Rprop(TorchRule, layout="Rprop"):
    """Resilient propagation as `torch.optim.Rprop`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, etas, step_sizes, maximize
        As in `torch.optim.Rprop`.
    foreach
        Without effect.
    capturable, differentiable
        Refused if True.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.

    Notes
    -----
    The learning rate is the size of a parameter's first step, and has no effect after it.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class Muon(TorchRule, layout="Muon"):
    """Muon as `torch.optim.Muon`, for matrices; see `fusedopt.Muon`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
        As in `torch.optim.Muon`.
    ns_dtype : {"float32", "bfloat16"}, default "float32"
        Dtype of the factors of matrix products. torch's are in bfloat16; `fusedopt.Muon` says what
        it needs.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: Products = "float32",
        **options: Unpack[Options],
    ) -> None:
        defaults = arguments(locals())
        # Options of how, not of what, is computed: torch's groups have no place for them.
        self._ns_dtype = defaults.pop("ns_dtype")
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        rule = super()._rule(group)
        assert isinstance(rule, MuonRule)
        return replace(rule, ns_dtype=self._ns_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ns_dtype": self._ns_dtype}
