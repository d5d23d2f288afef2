"""RAdam."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import sqrt
from typing import Annotated

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import moments, quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative, Number

AboveFour = Annotated[float, Number(low=4.0)]


@dataclass(frozen=True, kw_only=True)
class RAdam(Rule):
    """Adam that does not divide by v while v tells too little, and less than fully after.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    eps_root : float
        Number >= 0 added inside the root; default 0.
    threshold : float
        Length r, at least 4, from which on v divides; default 5.
    hat : bool
        Add eps to the uncorrected root, as PyTorch does; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  v := b2 v + (1 - b2) g^2,  c1 = 1 - b1^t,  c2 = 1 - b2^t
        r_inf = 2 / (1 - b2) - 1,  r = r_inf - 2 t b2^t / c2
        k = sqrt((r - 4) (r - 2) r_inf / ((r_inf - 4) (r_inf - 2) r))
        r > threshold:  p := p - lr k (m / c1) / (sqrt(v / c2 + eps_root) + eps)
        otherwise:      p := p - lr m / c1

    `hat` (PyTorch): sqrt(c2) m / (sqrt(v + eps_root) + eps) in the quotient's place.

    States: m, v.

    References
    ----------
    Liu et al. 2020, algorithm 2, whose threshold is 4; the authors' code and the libraries have 5.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.5, 1.0])
    >>> rule = fo.RAdam(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # the first five steps are momentum's
    [0.95 0.9 ]
    """

    name = "radam"
    year = 2019
    examples = ({}, {"threshold": 5.7, "eps_root": 1e-6, "hat": True})
    branches = 6

    lr: LearningRate = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    threshold: AboveFour = 5.0
    hat: bool = False
    decay: DecayForm = "l2"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        c2 = correction(b2, t)
        step, root = lr / correction(b1, t), sqrt(c2)
        r, last = _length(b2, t), 2.0 / (1.0 - b2) - 1.0
        plain = 0.0 if r > self.threshold else 1.0
        if not plain:
            step *= root * sqrt((r - 4.0) * (r - 2.0) * last / ((last - 4.0) * (last - 2.0) * r))
        eps_root, eps = self.eps_root, self.eps
        if not self.hat:
            eps_root, eps = eps_root * c2, eps * root
        return b1, 1.0 - b1, b2, 1.0 - b2, step, eps_root, eps, plain

    @staticmethod
    def element(p, g, m, v, b1, one_b1, b2, one_b2, step, eps_root, eps, plain):
        m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
        adaptive = sqrt(v + eps_root) + eps
        return quotient(step * m, adaptive if plain == 0 else plain), m, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        m_hat, c2 = m / textbook_correction(b1, t), textbook_correction(b2, t)
        last = 2 / (1 - Decimal(b2)) - 1
        r = last - 2 * t * Decimal(b2) ** t / (1 - Decimal(b2) ** t)
        if float(r) <= self.threshold:
            return lr * m_hat, (m, v)
        k = float((r - 4) * (r - 2) * last / ((last - 4) * (last - 2) * r)) ** 0.5
        if self.hat:
            quotient_ = ratio(c2**0.5 * m_hat, np.sqrt(v + self.eps_root) + self.eps)
        else:
            quotient_ = ratio(m_hat, np.sqrt(v / c2 + self.eps_root) + self.eps)
        return lr * k * quotient_, (m, v)


def _length(b2: float, t: int) -> float:
    """r, in 28 decimal digits: all but one in a thousand of its two terms cancels at first."""
    b = Decimal(b2)
    power = b**t
    return float(2 / (1 - b) - 1 - 2 * t * power / (1 - power))
