"""AdaBelief."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import quotient
from .base import Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class AdaBelief(Rule):
    """Adam with the variance about the mean in place of the mean square.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of the squared
        distance from it; default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-16.
    eps_root : float
        Number >= 0 added to s in each step; default 1e-16.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  s := b2 s + (1 - b2) (g - m)^2 + eps_root
        p := p - lr (m / c1) / (sqrt(s / c2) + eps),  c1 = 1 - b1^t,  c2 = 1 - b2^t

    The m in s is the new one; eps_root gathers in s. float16 has no number as small as the default
    of either eps.

    States: m, s.

    References
    ----------
    Zhuang et al. 2020, algorithm 2; optax's `adabelief`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.AdaBelief(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # nothing was expected: belief is low, and steps are Adam's / 0.9
    [0.888889 0.888889]
    """

    name = "adabelief"
    year = 2020

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-16
    eps_root: NonNegative = 1e-16

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "s")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("s",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        root = sqrt(correction(b2, t))
        step = lr * root / correction(b1, t)
        return b1, 1.0 - b1, b2, 1.0 - b2, step, self.eps_root, self.eps * root

    @staticmethod
    def element(p, g, m, s, b1, one_b1, b2, one_b2, step, eps_root, eps):
        m = b1 * m + one_b1 * g
        off = g - m
        s = b2 * s + one_b2 * (off * off) + eps_root
        return quotient(step * m, sqrt(s) + eps), m, s

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, s = states
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * ((g - m) * (g - m)) + self.eps_root
        m_hat, s_hat = m / textbook_correction(b1, t), s / textbook_correction(b2, t)
        return ratio(lr * m_hat, np.sqrt(s_hat) + self.eps), (m, s)
