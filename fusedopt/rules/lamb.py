"""LAMB."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import (
    Array,
    correction,
    norm,
    plain,
    ratio,
    summed,
    textbook_correction,
    trust_ratio,
)
from ..programs.elements import quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class LAMB(Rule):
    """Adam whose steps have the norm of their parameter.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m and v; default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-6.
    eps_root : float
        Number >= 0 added inside the root; default 0.
    lr, weight_decay, decay, maximize
        As in `Rule`; decay "scaled" by default.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  v := b2 v + (1 - b2) g^2,  c1 = 1 - b1^t,  c2 = 1 - b2^t
        u = (m / c1) / (sqrt(v / c2 + eps_root) + eps) + weight_decay p
        p := p - lr (||p|| / ||u||) u, the quotient 1 where either norm is 0

    The norms are those of the whole parameter and of its u. Weight decay of the forms other than
    "scaled" is apart from u, and no part of its norm.

    States: m, v.

    References
    ----------
    You et al. 2019, algorithm 2, with the identity for phi; optax's `lamb`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([3.0, 4.0]), np.array([0.01, -100.0])
    >>> rule = fo.LAMB(lr=0.1, eps=0.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # Adam's direction, a tenth of the parameter's norm
    [2.646447 4.353553]
    """

    name = "lamb"
    year = 2019
    examples = ({}, {"eps_root": 1e-6})
    scales_decay = True

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-6
    eps_root: NonNegative = 0.0
    decay: DecayForm = "scaled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        c2 = correction(b2, t)
        root, means = sqrt(c2), (b1, 1.0 - b1, b2, 1.0 - b2)
        step = root / correction(b1, t)
        return *means, step, self.eps_root * c2, self.eps * root, self.scaled_decay

    @staticmethod
    def measure(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps, decay):
        m = b1 * m + one_b1 * g
        v = b2 * v + one_b2 * (g * g)
        u = quotient(step * m, sqrt(v + eps_root) + eps) + decay * p
        return p * p, u * u

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        p, u = map(sqrt, sums)
        return (lr * (p / u if p and u else 1.0),)

    @staticmethod
    def element(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps, decay, rate):
        m = b1 * m + one_b1 * g
        v = b2 * v + one_b2 * (g * g)
        u = quotient(step * m, sqrt(v + eps_root) + eps) + decay * p
        return rate * u, m, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        u, m, v = self._textbook_direction(t, p, g, *states)
        measured, *_ = self._textbook_direction(t, *map(plain, (p, g, *states)))
        return summed(lr * trust_ratio(norm(p), norm(measured)), u) * u, (m, v)

    def _textbook_direction(
        self, t: int, p: Array, g: Array, m: Array, v: Array
    ) -> tuple[Array, Array, Array]:
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        m_hat, v_hat = m / textbook_correction(b1, t), v / textbook_correction(b2, t)
        u = ratio(m_hat, np.sqrt(v_hat + self.eps_root) + self.eps)
        return (u + self.weight_decay * p if self.decay == "scaled" else u), m, v
