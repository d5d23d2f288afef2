"""Slow weights, to which parameters return every few steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..rules.hyperparameters import Count, Number, check_fields


@dataclass(frozen=True, kw_only=True)
class Lookahead:
    """Slow weights of an `Optimizer`, to which its parameters return every k steps.

    Parameters
    ----------
    k : int
        Number of steps >= 1 from one return to the next; default 5.
    alpha : float
        Share in (0, 1) of the way to the parameters that the slow weights take; default 0.5.
    reset : bool
        Begin anew after each return: states as they were at first, and bias corrections from step
        1; default False. It does not go with rounding="stochastic" or wait=False.

    Raises
    ------
    TypeError
        If a value is of the wrong kind.
    ValueError
        If a value is out of range.

    Notes
    -----
    ::

        every k-th step:  slow := slow + alpha (p - slow),  p := slow

    in the pass of that step itself. Slow weights begin as the parameters, in float32, or float64
    for float64 parameters, and follow the masters where there are some. They are the state
    "slow_weights", which is saved and loaded with the others. The steps are the optimizer's, as
    for schedules: a leaf without a gradient in a k-th step stays where it is. Learning rates go on
    over a reset.

    References
    ----------
    Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back", algorithm 1; `reset` is
    `reset_state` of optax.lookahead.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([1.0])
    >>> opt = fo.Optimizer(p, fo.SGD(lr=0.25), slow_weights=fo.Lookahead(k=2))
    >>> for _ in range(2):
    ...     _ = opt.step(np.ones(1))
    >>> print(p)
    [0.75]
    """

    k: Count = 5
    alpha: Annotated[float, Number(low=2.0**-126, high=1.0)] = 0.5
    reset: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def share(self, step: int) -> float:
        """Return the share of the way that slow weights take in a step of the optimizer; 0 where
        they stay."""
        return 0.0 if step % self.k else self.alpha
