"""Grams."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import magnitude, moments, quotient, signed_like
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class Grams(Rule):
    """Adam's step size for each element, in the direction of the gradient itself.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  v := b2 v + (1 - b2) g^2,  c1 = 1 - b1^t,  c2 = 1 - b2^t
        p := p - lr |(m / c1) / (sqrt(v / c2) + eps)| sign(g)

    Where the gradient is zero there is no step.

    States: m, v.

    References
    ----------
    Cao et al. 2024, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, rule = np.array([1.0, 1.0]), fo.Grams(lr=0.1, betas=(0.5, 0.75), eps=0.0)
    >>> states = rule.init(p)
    >>> for t, g in ((1, [1.0, 1.0]), (2, [1.0, -0.25])):
    ...     fo.update(rule, t, p, np.array(g), *states)
    >>> print(p.round(6))  # Adam would go on with the other weight, to 0.87554
    [0.8     0.92446]
    """

    name = "grams"
    year = 2024

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
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
        step = lr * root / correction(b1, t)
        return b1, 1.0 - b1, b2, 1.0 - b2, step, self.eps * root

    @staticmethod
    def element(p, g, m, v, b1, one_b1, b2, one_b2, step, eps):
        m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
        return signed_like(magnitude(quotient(step * m, sqrt(v) + eps)), g), m, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        m_hat, v_hat = m / textbook_correction(b1, t), v / textbook_correction(b2, t)
        return np.abs(ratio(lr * m_hat, np.sqrt(v_hat) + self.eps)) * np.sign(g), (m, v)
