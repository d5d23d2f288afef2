"""MARS."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, norm, ratio, summed, textbook_correction
from ..programs.elements import moments, quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class MARS(Rule):
    """AdamW on gradients whose variance is reduced by how they change.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m and v; default (0.95, 0.99).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    gamma : float
        Strength >= 0 of the correction; default 0.025.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        c = g + gamma b1 / (1 - b1) (g - prev),  prev := g
        c := c / max(1, ||c||), the norm of the whole parameter's
        m := b1 m + (1 - b1) c,  v := b2 v + (1 - b2) c^2,  c1 = 1 - b1^t,  c2 = 1 - b2^t
        p := p - lr (m / c1) / (sqrt(v / c2) + eps) - lr lambda p

    The approximate form, with the gradient of the last batch as prev, zero at first. The authors
    give vectors to AdamW(betas=(0.9, 0.95)).

    States: m, v, prev.

    References
    ----------
    Yuan et al. 2024, algorithm 2 (MARS-AdamW, approximate), in the form of the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.MARS(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(4))  # eps is seen: clipped, the first gradient is 0.0001
    [0.9 0.9]
    """

    name = "mars"
    year = 2024

    lr: LearningRate = 3e-3
    betas: Betas = (0.95, 0.99)
    eps: NonNegative = 1e-8
    gamma: NonNegative = 0.025
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v", "prev")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        root = sqrt(correction(b2, t))
        gain = self.gamma * b1 / (1.0 - b1)
        step = lr * root / correction(b1, t)
        return b1, 1.0 - b1, b2, 1.0 - b2, gain, step, self.eps * root

    @staticmethod
    def measure(p, g, m, v, prev, b1, one_b1, b2, one_b2, gain, step, eps):
        c = g + gain * (g - prev)
        return (c * c,)

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        size = sqrt(sums[0])
        return (1.0 if size <= 1.0 else 1.0 / size,)

    @staticmethod
    def element(p, g, m, v, prev, b1, one_b1, b2, one_b2, gain, step, eps, k):
        c = k * (g + gain * (g - prev))
        m, v = moments(c, m, v, b1, one_b1, b2, one_b2)
        return quotient(step * m, sqrt(v) + eps), m, v, g

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v, prev = states
        b1, b2 = self.betas
        c = g + self.gamma * b1 / (1 - b1) * (g - prev)
        size = norm(c)
        c = c * summed(1.0 if size <= 1 else 1 / size, c)
        m = b1 * m + (1 - b1) * c
        v = b2 * v + (1 - b2) * (c * c)
        m_hat, v_hat = m / textbook_correction(b1, t), v / textbook_correction(b2, t)
        return ratio(lr * m_hat, np.sqrt(v_hat) + self.eps), (m, v, g)
