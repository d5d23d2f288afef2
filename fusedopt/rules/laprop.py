"""LaProp."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class LaProp(Rule):
    """Adam with momentum of the divided gradients, which decouples b1 from b2.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-15.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        v := b2 v + (1 - b2) g^2,  c1 = 1 - b1^t,  c2 = 1 - b2^t
        m := b1 m + (1 - b1) g / (sqrt(v / c2) + eps),  p := p - lr m / c1

    States: m, v.

    References
    ----------
    Ziyin, Wang & Ueda 2020, algorithm 1. The authors' code gathers the learning rate in m, the same
    where it is constant.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.LaProp(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.9 0.9]
    """

    name = "laprop"
    year = 2020

    lr: LearningRate = 4e-4
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-15
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        root = sqrt(correction(b2, t))
        step, gain = lr / correction(b1, t), (1.0 - b1) * root
        return b1, gain, b2, 1.0 - b2, step, self.eps * root

    @staticmethod
    def element(p, g, m, v, b1, gain, b2, one_b2, step, eps):
        v = b2 * v + one_b2 * (g * g)
        m = b1 * m + quotient(gain * g, sqrt(v) + eps)
        return step * m, m, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        b1, b2 = self.betas
        v = b2 * v + (1 - b2) * (g * g)
        n = ratio(g, np.sqrt(v / textbook_correction(b2, t)) + self.eps)
        m = b1 * m + (1 - b1) * n
        return lr * (m / textbook_correction(b1, t)), (m, v)
