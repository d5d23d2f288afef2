"""Adan."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import quotient
from .base import DecayForm, Rule
from .hyperparameters import LearningRate, NonNegative, ThreeBetas


@dataclass(frozen=True, kw_only=True)
class Adan(Rule):
    """Adam with Nesterov's momentum from differences of gradients.

    Parameters
    ----------
    betas : triple of float
        Decay rates b1, b2 and b3 in [0, 1) of m, d and n; default (0.98, 0.92, 0.99).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    eps_root : float
        Number >= 0 added inside the root; default 0.
    form : {"official", "optax"}
        Weight k of the differences; default "official".
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        e = g - prev, 0 in the first step;  prev := g
        m := b1 m + (1 - b1) g,  d := b2 d + (1 - b2) e,  n := b3 n + (1 - b3) (g + k e)^2
        p := p - lr (m / c1 + k d / c2) / (sqrt(n / c3 + eps_root) + eps),  c_i = 1 - b_i^t

    form "official" has k = b2, the paper's and its code's (the paper calls 1 - b_i what is b_i
    here), "optax" k = 1 - b2. The paper divides by 1 + lr lambda for weight decay, which is the
    form "decoupled" to first order.

    States: m, d, n, prev.

    References
    ----------
    Xie et al. 2022, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.Adan(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.9 0.9]
    """

    name = "adan"
    year = 2022
    examples = ({}, {"form": "optax", "eps_root": 1e-6})

    lr: LearningRate = 1e-3
    betas: ThreeBetas = (0.98, 0.92, 0.99)
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    form: Literal["official", "optax"] = "official"
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "d", "n", "prev")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("n",))

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2, b3 = self.betas
        c1, c2, c3 = (correction(b, t) for b in self.betas)
        root, k = sqrt(c3), b2 if self.form == "official" else 1.0 - b2
        step, step_d = lr * root / c1, lr * k * root / c2
        means = b1, 1.0 - b1, b2, 1.0 - b2, b3, 1.0 - b3
        return *means, float(t > 1), k, step, step_d, self.eps_root * c3, self.eps * root

    @staticmethod
    def element(
        p, g, m, d, n, prev, b1, one_b1, b2, one_b2, b3, one_b3, past, k, step, ahead, eps_root, eps
    ):
        e = past * (g - prev)
        mixed = g + k * e
        m = b1 * m + one_b1 * g
        d = b2 * d + one_b2 * e
        n = b3 * n + one_b3 * (mixed * mixed)
        return quotient(step * m + ahead * d, sqrt(n + eps_root) + eps), m, d, n, g

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, d, n, prev = states
        b1, b2, b3 = self.betas
        k = b2 if self.form == "official" else 1 - b2
        e = g - prev if t > 1 else 0.0 * g
        m = b1 * m + (1 - b1) * g
        d = b2 * d + (1 - b2) * e
        n = b3 * n + (1 - b3) * ((g + k * e) * (g + k * e))
        c1, c2, c3 = (textbook_correction(b, t) for b in self.betas)
        delta = ratio(lr * (m / c1 + k * d / c2), np.sqrt(n / c3 + self.eps_root) + self.eps)
        return delta, (m, d, n, g)
