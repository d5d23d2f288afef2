"""The classes of torch.optim that descend from Adam."""

from __future__ import annotations

from typing import Any, Unpack

from .optimizer import Number, Options, Params, arguments
from .rules import TorchRule


class Adam(TorchRule, layout="Adam"):
    """Adam as `torch.optim.Adam`, or AdamW with `decoupled_weight_decay`.

    A sparse gradient updates the rows that it has, as `torch.optim.SparseAdam` does.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in `torch.optim.Adam`.
    foreach, fused
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
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class AdamW(Adam, layout="Adam"):
    """Adam with decoupled weight decay, as `torch.optim.AdamW`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, eps, weight_decay, amsgrad, maximize
        As in `torch.optim.AdamW`.
    foreach, fused
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
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **options,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # whatever a checkpoint of Adam says


class Adamax(TorchRule, layout="Adamax"):
    """AdaMax as `torch.optim.Adamax`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, eps, weight_decay, maximize
        As in `torch.optim.Adamax`.
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
        lr: Number = 2e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class NAdam(TorchRule, layout="NAdam"):
    """NAdam as `torch.optim.NAdam`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize
        As in `torch.optim.NAdam`.
    foreach
        Without effect.
    capturable, differentiable
        Refused if True.
    **options
        fusedopt's own: state_dtype, master, rounding, clip_norm, clip_value, skip_nonfinite, ema,
        zero_grads, stats, verify, seed, threads, backend. See `fusedopt.Optimizer`.

    Notes
    -----
    The state `mu_product` follows from the number of steps, betas[0] and momentum_decay as they are
    now; a checkpoint with another product is refused. PyTorch multiplies the factors that the steps
    had, which differ where a scheduler has changed betas[0].
    """

    def __init__(
        self,
        params: Params,
        lr: Number = 2e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)


class RAdam(TorchRule, layout="RAdam"):
    """RAdam as `torch.optim.RAdam`.

    Parameters
    ----------
    params : iterable
        Tensors, named tensors or parameter groups.
    lr, betas, eps, weight_decay, decoupled_weight_decay, maximize
        As in `torch.optim.RAdam`.
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
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, arguments(locals()), options)
