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
    ratio,
    textbook_correction,
    total,
)
from ..programs.elements import magnitude, moments, quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, Fraction, LearningRate, NonNegative, Normal, check_field


@dataclass(frozen=True, kw_only=True)
class Prodigy(Rule):
    """Adam whose learning rate is found from the distance that the parameters have come.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m and v; default (0.9, 0.999).
    beta3 : float, optional
        Decay rate b3 in [0, 1) of s and r; by default the square root of b2.
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

        c = sqrt(1 - b2^t) / (1 - b1^t) with `bias_correction`, else 1
        r := b3 r + d^2 lr c <g, p0 - p>
        s := b3 s + d^2 lr c g                              s := b3 s + d^2 g with `safeguard`
        m := b1 m + (1 - b1) d g,  v := b2 v + (1 - b2) d^2 g^2
        p := p - d lr c (m / (sqrt(v) + d' eps) + lambda p),  d := d' = max(d, coef r / ||s||_1)

    p0 is the parameter before its first step. The product and the norm are over all parameters of
    the optimizer that a `Prodigy` updates: groups may differ in lr and weight decay alone. lr is a
    factor on what is found, 1 or a schedule with the peak 1.

    States: m, v, s, p0, and the numbers d and r. m is kept over d, v, s and r over d^2, in the type
    of the states as in any other; the subtraction from p0 wants that in the parameter's own.

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
    examples = ({}, {"bias_correction": True, "beta3": 0.9}, {"safeguard": True, "coef": 0.5})

    lr: LearningRate = 1.0
    betas: Betas = (0.9, 0.999)
    beta3: float | None = None
    eps: NonNegative = 1e-8
    d0: Normal = 1e-6
    coef: NonNegative = 1.0
    bias_correction: bool = False
    safeguard: bool = False
    decay: DecayForm = "scaled"

    def check_together(self) -> None:
        if self.beta3 is not None:
            check_field(f"{type(self).__name__}(beta3)", Fraction, self.beta3)

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v", "s", "p0")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def initial(self, state: str) -> float:
        return self.d0 if state == "d" else 0.0

    @property
    def _beta3(self) -> float:
        return sqrt(self.betas[1]) if self.beta3 is None else self.beta3

    def scalars(self, t: int, lr: float, d: float, r: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        w = lr * sqrt(correction(b2, t)) / correction(b1, t) if self.bias_correction else lr
        k = 1.0 if self.safeguard else w
        first = 1.0 if t == 1 else 0.0
        step = d * w
        means = b1, 1.0 - b1, b2, 1.0 - b2, self._beta3
        return *means, w, k, first, step * self.scaled_decay, step

    @staticmethod
    def measure(p, g, m, v, s, p0, b1, one_b1, b2, one_b2, b3, w, k, first, decay, step):
        origin = p if first != 0 else p0
        return w * (g * (origin - p)), magnitude(b3 * s + k * g)

    def measured(
        self, t: int, lr: float, sums: tuple[float, ...], d: float, r: float
    ) -> tuple[float, ...]:
        product, size = sums
        r = self._beta3 * r + product
        found = self.coef * r / size if size else 0.0
        new = found if d < found < inf else d
        shrink = d / new
        return self.eps * (new / d), shrink, shrink * shrink, new, r * shrink * shrink

    @staticmethod
    def element(
        p, g, m, v, s, p0,
        b1, one_b1, b2, one_b2, b3, w, k, first, decay, step, eps, shrink, shrink2,
    ):  # fmt: skip
        m, v = moments(g, m, v, b1, one_b1, b2, one_b2)
        delta = quotient(step * m, sqrt(v) + eps) + decay * p
        origin = p if first != 0 else p0
        return delta, shrink * m, shrink2 * v, shrink2 * (b3 * s + k * g), origin

    def textbook_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v, s, p0, d, r = states
        b1, b2 = self.betas
        p0 = p if t == 1 else p0
        c: Any = 1.0
        if self.bias_correction:
            c = np.sqrt(textbook_correction(b2, t)) / textbook_correction(b1, t)
        s = self._beta3 * s + (1.0 if self.safeguard else lr * c) * g
        product, size = pool((total(lr * c * (g * (p0 - p))), total(np.abs(s))))
        r = self._beta3 * r + product
        new = np.maximum(d, self.coef * ratio(r, size))
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        decay = self.weight_decay * p if self.decay == "scaled" else 0.0 * p
        delta = d * (lr * c) * (ratio(m, np.sqrt(v) + self.eps * (new / d)) + decay)
        grown = d / new
        return delta, (m * grown, v * grown * grown, s * grown * grown, p0, new, r * grown * grown)
