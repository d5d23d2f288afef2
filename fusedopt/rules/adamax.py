"""AdaMax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import magnitude, maximum, quotient
from .base import Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class AdaMax(Rule):
    """Adam with the largest recent gradient in place of the root of the mean square.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the average of the gradient and of its largest
        magnitude; default (0.9, 0.999).
    eps_inside : float
        Number >= 0 added to the magnitude of the gradient; default 0.
    eps : float
        Number >= 0 added to the denominator; default 0.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  u := max(b2 u, |g| + eps_inside),  c1 = 1 - b1^t
        p := p - lr (m / c1) / (u + eps)

    States: m, u. Where the denominator is zero there is no step. PyTorch and optax have their eps
    inside of the maximum, Keras has it outside, and the paper has none.

    References
    ----------
    Kingma & Ba 2015, algorithm 2.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.AdaMax(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.9 0.9]
    """

    name = "adamax"
    year = 2014
    examples = ({}, {"eps_inside": 1e-3, "eps": 1e-2})

    lr: LearningRate = 2e-3
    betas: Betas = (0.9, 0.999)
    eps_inside: NonNegative = 0.0
    eps: NonNegative = 0.0

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "u")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("u",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        return b1, 1.0 - b1, b2, lr / correction(b1, t), self.eps_inside, self.eps

    @staticmethod
    def element(p, g, m, u, b1, one_b1, b2, step, eps_inside, eps):
        m = b1 * m + one_b1 * g
        u = maximum(b2 * u, magnitude(g) + eps_inside)
        return quotient(step * m, u + eps), m, u

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, u = states
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        u = np.maximum(b2 * u, np.abs(g) + self.eps_inside)
        return ratio(lr * (m / textbook_correction(b1, t)), u + self.eps), (m, u)
