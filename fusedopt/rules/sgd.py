"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from ..programs.arithmetic import Array
from .base import Rule
from .hyperparameters import LearningRate


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Stochastic gradient descent: no state.

    Parameters
    ----------
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        p := p - lr g

    References
    ----------
    "The Evolution of AdamW", eq. (2).

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, -2.0]), np.array([0.5, 0.5])
    >>> fo.update(fo.SGD(lr=0.1), 1, p, g)
    >>> p
    array([ 0.95, -2.05])
    """

    name = "sgd"
    year = 1951

    lr: LearningRate = 1e-2

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return (lr,)

    @staticmethod
    def element(p, g, lr):
        return lr * g

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        return lr * g, ()
