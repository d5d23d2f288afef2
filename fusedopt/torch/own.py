"""Rules that torch.optim does not have, as its optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from ..interop.common import number
from ..linalg.newton_schulz import Products
from ..rules import RULES, Rule
from .optimizer import REFUSED, Base, Number, Options, Params, arguments

_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}


class OwnRule(Base):
    """A rule that torch.optim does not have: its groups hold fusedopt's hyperparameters."""

    _cls: ClassVar[type[Rule]]

    def __init_subclass__(
        cls, rule: str | None = None, states: Mapping[str, str] | None = None
    ) -> None:
        super().__init_subclass__()
        if rule is not None and states is not None:  # no user's own subclass
            cls._cls, cls._state_names = RULES[rule], states

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return self._cls(**{name: number(group[name]) for name in self._names})

    def _watched(self, group: Mapping[str, Any]) -> list[Any]:
        return [group[name] for name in self._names if name != "lr"]

    @property
    def _names(self) -> list[str]:
        """The hyperparameters, without what torch adds to the defaults of a copy."""
        return [name for name in self.defaults if name not in REFUSED]


class Lion(OwnRule, rule="lion", states={"m": "exp_avg"}):
    """Evolved sign momentum; see `fusedopt.Lion`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, weight_decay, maximize
        The hyperparameters of `fusedopt.Lion`.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class Sophia(OwnRule, rule="sophia", states={"m": "exp_avg", "h": "hessian"}):
    """Second-order clipped steps; `step(hessian=...)` takes the estimates. See `fusedopt.Sophia`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, rho, weight_decay, bs, eps, clip, form, estimator, bias_correction, maximize
        The hyperparameters of `fusedopt.Sophia`.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        bs: int = 5120,
        eps: float = 1e-15,
        clip: float = 1.0,
        form: str = "official",
        estimator: str = "gnb",
        bias_correction: bool = False,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class NorMuon(OwnRule, rule="normuon", states={"m": "momentum_buffer"}):
    """Muon whose rows are of like size, for matrices; see `fusedopt.NorMuon`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, momentum, nesterov, ns_steps, ns_coefficients, scale, eps, weight_decay, beta2, eps_v,
    ns_dtype, maximize
        The hyperparameters of `fusedopt.NorMuon`.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Any = "keller",
        scale: str = "original",
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        beta2: float = 0.95,
        eps_v: float = 1e-10,
        ns_dtype: Products = "float32",
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class AdaMuon(OwnRule, rule="adamuon", states={"m": "momentum_buffer"}):
    """Muon with Adam's second moment, for matrices; see `fusedopt.AdaMuon`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, momentum, nesterov, ns_steps, ns_coefficients, scale, eps, weight_decay, beta2, eps_v,
    ns_dtype, maximize
        The hyperparameters of `fusedopt.AdaMuon`.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: Any = "keller",
        scale: str = "match_rms_adamw",
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        beta2: float = 0.999,
        eps_v: float = 1e-8,
        ns_dtype: Products = "float32",
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class SOAP(OwnRule, rule="soap", states=_MOMENTS):
    """Adam in the eigenbasis of Shampoo's preconditioner, for matrices; see `fusedopt.SOAP`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, shampoo_beta, eps, weight_decay, precondition_frequency, max_precond_dim, maximize
        The hyperparameters of `fusedopt.SOAP`.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 3e-3,
        betas: tuple[Number, Number] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)
