"""ADOPT."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, ratio
from ..programs.elements import clamp, maximum, quotient
from .base import Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class ADOPT(Rule):
    """Adam that converges with any b2: v divides before it takes the gradient in.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.9999).
    eps : float
        Least value >= 0 of the denominator; default 1e-6.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        t = 1:  v := g^2, and p stays
        t > 1:  n = g / max(sqrt(v), eps), clipped to +-(t - 1)^(1/4)
                m := b1 m + (1 - b1) n,  p := p - lr m,  v := b2 v + (1 - b2) g^2

    States: m, v.

    References
    ----------
    Taniguchi et al. 2024, algorithm 2 (clipped); optax's `contrib.adopt`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.ADOPT(lr=0.1)
    >>> states = rule.init(p)
    >>> for t in (1, 2):
    ...     fo.update(rule, t, p, g, *states)
    >>> print(p.round(6))
    [0.99 0.99]
    """

    name = "adopt"
    year = 2024
    examples = ({}, {"eps": 0.5})

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.9999)
    eps: NonNegative = 1e-6

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        if t == 1:  # m as it is
            return 1.0, 0.0, 0.0, 1.0, 0.0, self.eps, 0.0
        return b1, 1.0 - b1, b2, 1.0 - b2, lr, self.eps, sqrt(sqrt(t - 1))

    @staticmethod
    def element(p, g, m, v, b1, one_b1, b2, one_b2, lr, eps, limit):
        n = clamp(quotient(g, maximum(sqrt(v), eps)), limit)
        m = b1 * m + one_b1 * n
        return lr * m, m, b2 * v + one_b2 * (g * g)

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        b1, b2 = self.betas
        if t == 1:
            return 0.0 * m, (m, g * g)
        limit = (t - 1) ** 0.25
        n = ratio(g, np.maximum(np.sqrt(v), self.eps))
        m = b1 * m + (1 - b1) * np.minimum(np.maximum(n, -limit), limit)
        return lr * m, (m, b2 * v + (1 - b2) * (g * g))
