"""Adadelta."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, ratio
from ..programs.elements import quotient
from .base import Rule
from .hyperparameters import Fraction, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class Adadelta(Rule):
    """Steps in the parameter's own unit: the root mean square of past steps over that of gradients.

    Parameters
    ----------
    rho : float
        Decay rate in [0, 1) of both averages; default 0.95.
    eps : float
        Number >= 0 added inside both roots; default 1e-6.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        v := rho v + (1 - rho) g^2,  u = sqrt(d + eps) / sqrt(v + eps) g
        d := rho d + (1 - rho) u^2,  p := p - lr u

    States: v, d. The learning rate is a factor on steps that find their own size, 1 in the paper;
    eps is the square of the first of them.

    References
    ----------
    Zeiler 2012, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.Adadelta(rho=0.75, eps=1e-4)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # without eps both would have moved by 0.02
    [0.991056 0.98    ]
    """

    name = "adadelta"
    year = 2012

    lr: LearningRate = 1.0
    rho: Fraction = 0.95
    eps: NonNegative = 1e-6

    @property
    def states(self) -> tuple[str, ...]:
        return ("v", "d")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v", "d"))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return self.rho, 1.0 - self.rho, lr, self.eps

    @staticmethod
    def element(p, g, v, d, rho, one_rho, lr, eps):
        v = rho * v + one_rho * (g * g)
        moved = quotient(sqrt(d + eps) * g, sqrt(v + eps))
        return lr * moved, v, rho * d + one_rho * (moved * moved)

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        v, d = states
        rho = self.rho
        v = rho * v + (1 - rho) * (g * g)
        u = ratio(np.sqrt(d + self.eps) * g, np.sqrt(v + self.eps))
        return lr * u, (v, rho * d + (1 - rho) * (u * u))
