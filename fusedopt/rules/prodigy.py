"""Prodigy."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np

from ..programs.arithmetic import (
    Array,
    Pooling,
    correction,
    grown,
    ratio,
    textbook_correction,
    total,
    wide,
)
from ..programs.elements import magnitude, moments, quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative, Normal


@dataclass(frozen=True, kw_only=True)
class Prodigy(Rule):
    """Adam whose learning rate is found from the distance that the parameters have come.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m and v; default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator, times d; default 1e-8.
    d0 : float
        The first estimate, a number > 0 that is smaller than any distance; default 1e-6.
    coef : float
        Factor >= 0 on the estimate, by which to tune it; default 1.
    bias_correction : bool
        Whether steps have Adam's bias correction; default False.
    safeguard : bool
        Whether s leaves out the learning rate, for one that warms up; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`; lr 1, and decay "scaled": by d lr lambda p.

    Notes
    -----
    ::

        c = sqrt(1 - b2^t) / (1 - b1^t) with `bias_correction`, else 1;  b3 = sqrt(b2)
        r := b3 r + d^2 lr c <g, u>
        s := b3 s + d^2 lr c g                              s := b3 s + d^2 g with `safeguard`
        m := b1 m + (1 - b1) d g,  v := b2 v + (1 - b2) d^2 g^2
        p := p - d lr c (m / (sqrt(v) + d' eps) + lambda p),  d := d' = max(d, coef r / ||s||_1)

    u is p0 - p, the sum of all steps so far, which weight decay of another form than "scaled" is no
    part of. The product and the norm are over all parameters of
    the optimizer that a `Prodigy` updates: groups may differ in lr and weight decay alone. lr is a
    factor on what is found, 1 or a schedule with the peak 1.

    States: m, v, s, u, and the numbers d and r. m is kept over d, and v, s and r over d^2, so that
    a narrow format holds them from the first step.

    References
    ----------
    Mishchenko and Defazio 2023, algorithm 4, in the form of the authors' code; optax's `prodigy`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([4.0, -3.0])
    >>> opt = fo.Optimizer(p, fo.Prodigy())
    >>> for _ in range(60):
    ...     info = opt.step(2 * p)
    >>> print(np.abs(p).max() < 1, opt.state["params"]["d"] > 0.1)
    True True
    """

    name = "prodigy"
    year = 2023
    over = "optimizer"
    kept = ("d", "r")
    scales_decay = True
    examples = (
        {},
        {"bias_correction": True, "betas": (0.8, 0.9)},
        {"safeguard": True, "coef": 0.5},
    )

    lr: LearningRate = 1.0
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    d0: Normal = 1e-6
    coef: NonNegative = 1.0
    bias_correction: bool = False
    safeguard: bool = False
    decay: DecayForm = "scaled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v", "s", "u")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def initial(self, state: str) -> float:
        return self.d0 if state == "d" else 0.0

    def scalars(self, t: int, lr: float, d: float, r: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        w = lr * sqrt(correction(b2, t)) / correction(b1, t) if self.bias_correction else lr
        k = 1.0 if self.safeguard else w
        step = d * w
        means = b1, 1.0 - b1, b2, 1.0 - b2, sqrt(b2)
        return *means, w, k, step * self.scaled_decay, step

    @staticmethod
    def measure(p, g, m, v, s, u, b1, one_b1, b2, one_b2, b3, w, k, decay, step):
        return w * (g * u), magnitude(b3 * s + k * g)

    def measured(
        self, t: int, lr: float, sums: tuple[float, ...], d: float, r: float
    ) -> tuple[float, ...]:
        product, size = sums
        r = sqrt(self.betas[1]) * r + product
        found = self.coef * r / size if size else 0.0
        new = found if d < found < inf else d
        shrink = d / new
        return self.eps * (new / d), shrink, shrink * shrink, new, r * shrink * shrink

    @staticmethod
    def element(
        p, g, m, v, s, u,
        b1, one_b1, b2, one_b2, b3, w, k, decay, step, eps, shrink, shrink2,
    ):  # fmt: skip
        m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
        delta = quotient(step * m, sqrt(v) + eps) + decay * p
        return delta, shrink * m, shrink2 * v, shrink2 * (b3 * s + k * g), u + delta

    def textbook_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v, s, u, d, r = states
        b1, b2 = self.betas
        c: Any = 1.0
        if self.bias_correction:
            c = np.sqrt(textbook_correction(b2, t)) / textbook_correction(b1, t)
        b3 = np.sqrt(b2)
        s = b3 * s + (1.0 if self.safeguard else lr * c) * g
        x = wide(g)
        y = b3 * wide(states[2]) + (1.0 if self.safeguard else lr * c) * x
        product, size = pool((total(lr * c * (x * wide(u))), total(np.abs(y))))
        r = b3 * wide(r) + product
        new = grown(d, 0.0 * d + self.coef * ratio(r, size))  # in the type of d again
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        delta = ratio(d * lr * c * m, np.sqrt(v) + self.eps * (new / d))
        if self.decay == "scaled":
            delta = delta + d * lr * c * self.weight_decay * p
        k = d / new
        return delta, (m * k, v * k * k, s * k * k, u + delta, new, r * k * k)
