"""Adam and SGD with D-Adaptation."""

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
    plain,
    ratio,
    textbook_correction,
    total,
    wide,
)
from ..programs.elements import magnitude, quotient
from .base import DecayForm, Rule
from .hyperparameters import Betas, Fraction, LearningRate, NonNegative, Normal


@dataclass(frozen=True, kw_only=True)
class DAdaptAdam(Rule):
    """Adam whose learning rate is found from a lower bound on the distance to the solution.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m and v; default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    d0 : float
        The first estimate, a number > 0 that is smaller than any distance; default 1e-6.
    bias_correction : bool
        Whether steps have Adam's bias correction; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`; lr 1, and decay "scaled": by d lr lambda p.

    Notes
    -----
    ::

        c = sqrt(1 - b2^t) / (1 - b1^t) with `bias_correction`, else 1;  b3 = sqrt(b2)
        r := b3 r + (1 - b3) d lr c <g, s / (sqrt(v) + eps)>, with s and v of the step before
        s := b3 s + (1 - b3) d lr c g
        m := b1 m + (1 - b1) d lr c g,  v := b2 v + (1 - b2) g^2
        p := p - m / (sqrt(v) + eps) - d lr c lambda p,  d := max(d, r / ((1 - b3) ||s||_1))

    The product and the norm are over all parameters of the optimizer that a `DAdaptAdam` updates:
    groups may differ in lr and weight decay alone. lr is a factor on what is found, 1 or a schedule
    with the peak 1.

    States: m, v, s, and the numbers d and r. m and s are kept over d, r over d^2.

    References
    ----------
    Defazio and Mishchenko 2023, algorithm 5; optax's `dadapt_adamw`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([4.0, -3.0])
    >>> opt = fo.Optimizer(p, fo.DAdaptAdam())
    >>> for _ in range(60):
    ...     info = opt.step(2 * p)
    >>> print(np.abs(p).max() < 1, opt.state["params"]["d"] > 0.1)
    True True
    """

    name = "dadaptadam"
    year = 2023
    over = "optimizer"
    kept = ("d", "r")
    scales_decay = True
    examples = ({}, {"bias_correction": True, "betas": (0.8, 0.9)})

    lr: LearningRate = 1.0
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    d0: Normal = 1e-6
    bias_correction: bool = False
    decay: DecayForm = "scaled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v", "s")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def initial(self, state: str) -> float:
        return self.d0 if state == "d" else 0.0

    def scalars(self, t: int, lr: float, d: float, r: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        b3 = sqrt(b2)
        w = lr * sqrt(correction(b2, t)) / correction(b1, t) if self.bias_correction else lr
        means = b1, (1.0 - b1) * w, b2, 1.0 - b2, b3
        return *means, w, (1.0 - b3) * w, self.eps, d * w * self.scaled_decay, d

    @staticmethod
    def measure(p, g, m, v, s, b1, gain, b2, one_b2, b3, w, k, eps, decay, d):
        return w * (g * quotient(s, sqrt(v) + eps)), magnitude(b3 * s + k * g)

    def measured(
        self, t: int, lr: float, sums: tuple[float, ...], d: float, r: float
    ) -> tuple[float, ...]:
        product, size = sums
        b3 = sqrt(self.betas[1])
        r = b3 * r + (1.0 - b3) * product
        size *= 1.0 - b3
        found = d * r / size if size else 0.0
        new = found if d < found < inf else d
        shrink = d / new
        return shrink, new, r * shrink * shrink

    @staticmethod
    def element(p, g, m, v, s, b1, gain, b2, one_b2, b3, w, k, eps, decay, d, shrink):
        m = b1 * m + gain * g
        v = b2 * v + one_b2 * (g * g)
        delta = quotient(d * m, sqrt(v) + eps) + decay * p
        return delta, shrink * m, v, shrink * (b3 * s + k * g)

    def textbook_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v, s, d, r = states
        b1, b2 = self.betas
        b3 = np.sqrt(b2)
        c: Any = 1.0
        if self.bias_correction:
            c = np.sqrt(textbook_correction(b2, t)) / textbook_correction(b1, t)
        x, y = wide(g), wide(s)
        mine = total(lr * c * (x * ratio(y, np.sqrt(wide(v)) + self.eps)))
        s = b3 * s + (1 - b3) * lr * c * g
        y = b3 * y + (1 - b3) * lr * c * x
        product, size = pool((mine, total(np.abs(y))))
        r = b3 * wide(r) + (1 - b3) * product
        new = grown(d, d * ratio(r, (1 - b3) * size))
        m = b1 * m + (1 - b1) * lr * c * g
        v = b2 * v + (1 - b2) * (g * g)
        delta = ratio(d * m, np.sqrt(v) + self.eps)
        if self.decay == "scaled":
            delta = delta + d * lr * c * self.weight_decay * p
        k = d / new
        return delta, (m * k, v, s * k, new, r * k * k)


@dataclass(frozen=True, kw_only=True)
class DAdaptSGD(Rule):
    """SGD with momentum whose learning rate is found from the distance to the solution.

    Parameters
    ----------
    momentum : float
        Share in [0, 1) of the parameter that a step keeps; default 0.9.
    d0 : float
        The first estimate, a number > 0 that is smaller than any distance; default 1e-6.
    lr, weight_decay, decay, maximize
        As in `Rule`; lr 1.

    Notes
    -----
    ::

        x = (d lr / ||g_1||) g
        r := r + <x, s>,  s := s + x
        v := v + x,  p := p - (1 - momentum) v,  v := momentum v
        d := max(d, 2 r / ||s||)

    p is so an average of the iterates p0 - s: momentum p + (1 - momentum) (p0 - s). The norms and
    the product are over all parameters of the optimizer that a `DAdaptSGD` updates: groups may
    differ in lr and weight decay alone; g_1 is the first of their gradients that is not zero. lr is
    a factor on what is found, 1 or a schedule with the peak 1.

    States: s, v, and the numbers d, r and g0 = ||g_1||. s and v are kept over d, r over d^2.

    References
    ----------
    Defazio and Mishchenko 2023, algorithm 4, in the form of the authors' code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([4.0, -3.0])
    >>> opt = fo.Optimizer(p, fo.DAdaptSGD())
    >>> for _ in range(100):
    ...     info = opt.step(2 * p)
    >>> print(np.abs(p).max() < 2, opt.state["params"]["d"] > 0.1)
    True True
    """

    name = "dadaptsgd"
    year = 2023
    over = "optimizer"
    kept = ("d", "r", "g0")
    examples = ({}, {"momentum": 0.0, "lr": 0.5})

    lr: LearningRate = 1.0
    momentum: Fraction = 0.9
    d0: Normal = 1e-6

    @property
    def states(self) -> tuple[str, ...]:
        return ("s", "v")

    def initial(self, state: str) -> float:
        return self.d0 if state == "d" else 0.0

    def scalars(self, t: int, lr: float, d: float, r: float, g0: float) -> tuple[float, ...]:
        return lr, self.momentum, 1.0 - self.momentum, d

    @staticmethod
    def measure(p, g, s, v, lr, mu, one_mu, d):
        x = lr * g
        return g * g, x * s, s * s, x * x

    def measured(
        self, t: int, lr: float, sums: tuple[float, ...], d: float, r: float, g0: float
    ) -> tuple[float, ...]:
        squares, product, before, added = sums
        g0 = g0 or sqrt(squares)
        k = 1.0 / g0 if g0 else 0.0
        r = r + k * product
        size = before + 2.0 * k * product + k * k * added  # ||s + k lr g||^2
        found = 2.0 * d * r / sqrt(size) if size > 0.0 else 0.0
        new = found if d < found < inf else d
        shrink = d / new
        return k, shrink, new, r * shrink * shrink, g0

    @staticmethod
    def element(p, g, s, v, lr, mu, one_mu, d, k, shrink):
        x = k * (lr * g)
        v = v + x
        return one_mu * (d * v), shrink * (s + x), shrink * (mu * v)

    def textbook_over(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float, pool: Pooling
    ) -> tuple[Array, tuple[Array, ...]]:
        s, v, d, r, g0 = states
        x, y = wide(g), wide(s)
        mine = total(x * x), total(lr * x * y), total(y * y), total(lr * x * (lr * x))
        squares, product, before, added = pool(mine)
        g0 = g0 if plain(g0).any() else g0 + np.sqrt(squares)
        r = wide(r) + ratio(product, g0)
        size = np.sqrt(before + 2 * ratio(product, g0) + ratio(ratio(added, g0), g0))
        new = grown(d, 2 * d * ratio(r, size))
        x, k = ratio(lr * g, g0), d / new
        s, v = s + x, v + x
        delta = (1 - self.momentum) * (d * v)
        return delta, (s * k, self.momentum * v * k, new, r * k * k, g0)
