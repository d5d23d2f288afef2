"""Sharpness-aware minimisation: steps with the gradient of where the loss nearly is worst."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .arrays import host
from .functional import global_norm
from .optimizer import Optimizer
from .plan.options import unsupported
from .rules.hyperparameters import NONNEGATIVE
from .step.exchange import Exchange, perturbed
from .step.info import StepInfo
from .step.rates import StepRate


class SAM:
    """Take the steps of an optimizer with gradients of the parameters moved uphill.

    Parameters
    ----------
    optimizer : Optimizer
        The optimizer, which stays as usable as it is.
    rho : float
        Length >= 0 of the move; default 0.05.
    adaptive : bool
        Scale the move of each element with its size, as ASAM does; default False. It takes two
        arrays of the size of the parameters for as long as they are moved, and is for whole
        gradients on the host.

    Raises
    ------
    TypeError, ValueError
        If a value is of the wrong kind or out of range, or the optimizer's arrays are on a device
        and `adaptive` is True.

    Notes
    -----
    ::

        e = rho g / (|g| + 1e-12)                            |.|: the norm of all elements
        e = rho p^2 g / (|p g| + 1e-12)                      adaptive
        p := p - step with the gradient at p + e

    The move is one pass over memory, and is rounded to the parameters' dtype: in bfloat16 it
    vanishes where e is below 1/256 of an element. A scale of the gradients makes no difference
    to it. The bits of the parameters are restored, and nothing else is changed, whatever happens
    while they are moved.

    References
    ----------
    Foret et al. 2020, "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    algorithm 1; Kwon et al. 2021, "ASAM", with the absolute values of w as T_w.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([3.0, 4.0])
    >>> sam = fo.SAM(fo.Optimizer(p, fo.SGD(lr=0.1)), rho=0.5)
    >>> _ = sam.step(lambda: p.copy())  # the gradient of |p|^2 / 2
    >>> print(p.round(3))
    [2.67 3.56]
    """

    def __init__(self, optimizer: Optimizer, *, rho: float = 0.05, adaptive: bool = False) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected an fo.Optimizer, got {optimizer!r}")
        if not isinstance(adaptive, bool):
            raise TypeError(f"adaptive: expected True or False, got {adaptive!r}")
        self.optimizer = optimizer
        self.rho = float(NONNEGATIVE.accept("rho", rho))
        self.adaptive = adaptive
        if adaptive and optimizer._assembly.device is not host:
            raise ValueError(unsupported("SAM(adaptive=True)", "leave adaptive out"))

    def perturbed(self, grads: Any) -> Exchange:
        """Move the parameters to p + e, where the gradient of the next step is wanted.

        Parameters
        ----------
        grads : nested arrays
            Gradients at p, as `Optimizer.step` takes them. They are left alone, and so is a leaf
            whose gradient is None.

        Returns
        -------
        context manager
            On leaving it, by an exception too, the exact bits of the parameters are restored.

        Raises
        ------
        TypeError, ValueError
            If a gradient does not fit.
        FloatingPointError
            If the norm is NaN or infinite. Nothing has changed then.
        RuntimeError
            On entering it inside of another such context.
        """
        return perturbed(self.optimizer._assembly, grads, self.rho, self.adaptive)

    def step(
        self,
        closure: Callable[[], Any],
        *,
        grad_scale: float = 1.0,
        hessian: Any = None,
        lr: StepRate | None = None,
    ) -> StepInfo:
        """Take one step.

        Parameters
        ----------
        closure : callable
            Returns the gradients at the parameters as they are. It is called twice, the second
            time with the parameters moved.
        grad_scale, hessian, lr
            As in `Optimizer.step`.

        Returns
        -------
        StepInfo
            Of the optimizer's step. Where the gradients at p are not finite and the optimizer has
            `skip_nonfinite`, the step is skipped for these.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As in `perturbed` and `Optimizer.step`. Nothing has changed then.
        FloatingPointError
            If a norm is NaN or infinite. Nothing has changed then.
        """
        grads = closure()
        skips = self.optimizer._assembly.options.skip_nonfinite
        if not skips or math.isfinite(global_norm(grads)):
            with self.perturbed(grads):
                grads = closure()
        return self.optimizer.step(grads, grad_scale=grad_scale, hessian=hessian, lr=lr)
