"""Cautious AdamW and Lion."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import (
    Array,
    by_sign,
    correction,
    plain,
    ratio,
    textbook_correction,
    undecided,
)
from ..programs.elements import agree, moments, quotient, signed_like
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative
from .lion import Lion

LEAST = 1e-3
"""The share of elements that move is taken to be no less."""


def cautious(u: Array, direction: Array, g: Array) -> Array:
    """Return u where it moves against the gradient, scaled for those that do not move."""
    moves = plain(direction) * plain(g) > 0
    share = max(float(moves.mean()), LEAST) if moves.size else 1.0
    still = 0.0 * u
    result = by_sign(np.sign(direction * g), still, still, u / share)
    doubtful = undecided(direction)  # whether they count is up to the kernel's rounding
    return result.loosened(doubtful / max(1.0, share * moves.size)) if doubtful else result


def scale(lr: float, sums: tuple[float, ...]) -> float:
    """Return the learning rate over the share of elements that move."""
    moving, count = sums
    return lr / max(moving / count, LEAST) if count else lr


@dataclass(frozen=True, kw_only=True)
class CautiousAdamW(Rule):
    """AdamW that moves only the elements whose gradient agrees with their step.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m and v; default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    eps_root : float
        Number >= 0 added inside the root; default 0.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        u = (m / c1) / (sqrt(v / c2 + eps_root) + eps), with m, v, c1 and c2 of AdamW
        p := p - lr u [u g > 0] / max(share of elements with u g > 0, 0.001) - lr lambda p

    The share is that of the whole parameter. The first form of the authors' code had (count + 1)
    below the line.

    States: m, v.

    References
    ----------
    Liang et al. 2024, algorithm 2, in the present form of the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.5, 0.0])
    >>> rule = fo.CautiousAdamW(lr=0.1, weight_decay=0.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # half of the elements move, twice as far
    [0.8 1. ]
    """

    name = "cautiousadamw"
    year = 2024
    examples = ({}, {"eps_root": 1e-6})

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    weight_decay: NonNegative = 0.01
    decay: DecayForm = "decoupled"

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
        return *means, root / correction(b1, t), self.eps_root * c2, self.eps * root

    @staticmethod
    def measure(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps):
        return agree(b1 * m + one_b1 * g, g), 1.0

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        return (scale(lr, sums),)

    @staticmethod
    def element(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps, rate):
        m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
        u = rate * quotient(step * m, sqrt(v + eps_root) + eps)
        return u if agree(m, g) > 0 else u - u, m, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        b1, b2 = self.betas
        m = b1 * states[0] + (1 - b1) * g
        v = b2 * states[1] + (1 - b2) * (g * g)
        m_hat, v_hat = m / textbook_correction(b1, t), v / textbook_correction(b2, t)
        u = ratio(m_hat, np.sqrt(v_hat + self.eps_root) + self.eps)
        return lr * cautious(u, m, g), (m, v)


@dataclass(frozen=True, kw_only=True)
class CautiousLion(Lion):
    """Lion that moves only the elements whose gradient agrees with their step.

    Parameters
    ----------
    betas
        As in `Lion`.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        c = b1 m + (1 - b1) g,  m := b2 m + (1 - b2) g                                   of Lion
        p := p - lr sign(c) [c g > 0] / max(share of elements with c g > 0, 0.001) - lr lambda p

    The share is that of the whole parameter.

    State: m.

    References
    ----------
    Liang et al. 2024, algorithm 1 on Lion, in the present form of the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 0.0])
    >>> rule = fo.CautiousLion(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.8 1. ]
    """

    name = "cautiouslion"
    year = 2024

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        return b1, 1.0 - b1, b2, 1.0 - b2

    @staticmethod
    def measure(p, g, m, b1, one_b1, b2, one_b2):
        return agree(b1 * m + one_b1 * g, g), 1.0

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        return (scale(lr, sums),)

    @staticmethod
    def element(p, g, m, b1, one_b1, b2, one_b2, rate):
        c = b1 * m + one_b1 * g
        m = b2 * m + one_b2 * g
        u = signed_like(rate, c)
        return u if agree(c, g) > 0 else u - u, m

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (m,) = states
        b1, b2 = self.betas
        c = b1 * m + (1 - b1) * g
        return lr * cautious(np.sign(c), c, g), (b2 * m + (1 - b2) * g,)
