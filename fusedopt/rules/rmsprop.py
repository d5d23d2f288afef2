"""RMSProp."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import Element, quotient
from .base import Rule
from .hyperparameters import Fraction, LearningRate, NonNegative


def rmsprop(p, g, v, rho, one_rho, lr, eps_root, eps):
    v = rho * v + one_rho * (g * g)
    return quotient(lr * g, sqrt(v + eps_root) + eps), v


def rmsprop_centered(p, g, v, a, rho, one_rho, lr, eps_root, eps, k):
    v = rho * v + one_rho * (g * g)
    a = rho * a + one_rho * g
    w = v - k * (a * a)
    w = rho - rho if w < 0 else w  # a zero of their type
    return quotient(lr * g, sqrt(w + eps_root) + eps), v, a


def rmsprop_momentum(p, g, b, v, rho, one_rho, lr, eps_root, eps, mu, x, y):
    u, v = rmsprop(p, g, v, rho, one_rho, lr, eps_root, eps)
    b = mu * b + u
    return x * u + y * b, b, v


def rmsprop_centered_momentum(p, g, b, v, a, rho, one_rho, lr, eps_root, eps, k, mu, x, y):
    u, v, a = rmsprop_centered(p, g, v, a, rho, one_rho, lr, eps_root, eps, k)
    b = mu * b + u
    return x * u + y * b, b, v, a


_ELEMENTS: dict[str, Element] = {
    f.__name__: f for f in (rmsprop, rmsprop_centered, rmsprop_momentum, rmsprop_centered_momentum)
}


@dataclass(frozen=True, kw_only=True)
class RMSProp(Rule):
    """Steps divided by the root of a moving average of squared gradients.

    Parameters
    ----------
    rho : float
        Decay rate in [0, 1) of the averages; default 0.9.
    eps_root : float
        Number >= 0 added inside the root; default 1e-16.
    eps : float
        Number >= 0 added to the root in the denominator; default 0.
    lr_decay : float
        Number >= 0: lr is divided by 1 + (t - 1) lr_decay; default 0.
    initial_accumulator : float
        First value >= 0 of v; default 0.
    centered : bool
        Divide by the root of the variance about the mean; default False.
    momentum : float
        Decay rate mu in [0, 1) of a velocity over the steps; default 0, without one.
    nesterov : bool
        Look one step ahead with the velocity; default False.
    lr_in_buffer : bool
        Let the velocity gather steps that hold lr; default False.
    bias_correction : bool
        Divide v and a by their bias; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        v := rho v + (1 - rho) g^2                   w = v
        a := rho a + (1 - rho) g                     w = max(v - a^2, 0)   with `centered`
        u = g / (sqrt(w + eps_root) + eps)           p := p - lr_t u
        b := mu b + u                                p := p - lr_t b       with `momentum`
                                                     p := p - lr_t (u + mu b)  and `nesterov`

    lr_t = lr / (1 + (t - 1) lr_decay). `lr_in_buffer` has b gather lr_t u instead (optax, Keras).
    `bias_correction` divides v and a by 1 - rho^t. v starts at `initial_accumulator`. States: b
    with momentum, v, a where centered.

    References
    ----------
    "The Evolution of AdamW", eq. (12)-(13).

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.RMSProp(lr=0.1, rho=0.75)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.8 0.8]
    """

    name = "rmsprop"
    year = 2012
    settled = ("initial_accumulator", "lr_in_buffer")
    examples = (
        {},
        {"eps_root": 0.0, "eps": 1e-8, "lr_decay": 0.1, "initial_accumulator": 1.0},
        {"centered": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "bias_correction": True},
        {"momentum": 0.9, "centered": True, "lr_in_buffer": True},
        {"momentum": 0.9, "centered": True, "lr_in_buffer": True, "nesterov": True},
        {"centered": True, "bias_correction": True, "eps": 1e-6},
    )

    lr: LearningRate = 1e-3
    rho: Fraction = 0.9
    eps_root: NonNegative = 1e-16
    eps: NonNegative = 0.0
    lr_decay: NonNegative = 0.0
    initial_accumulator: NonNegative = 0.0
    centered: bool = False
    momentum: Fraction = 0.0
    nesterov: bool = False
    lr_in_buffer: bool = False
    bias_correction: bool = False

    def check_together(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("RMSProp(nesterov): needs momentum > 0, got 0")

    @property
    def states(self) -> tuple[str, ...]:
        return ("b",) * bool(self.momentum) + ("v",) + ("a",) * self.centered

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    def initial(self, state: str) -> float:
        return self.initial_accumulator if state == "v" else 0.0

    @property
    def kernel(self) -> str:
        return "rmsprop" + "_centered" * self.centered + "_momentum" * bool(self.momentum)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        lr_t = lr / (1.0 + (t - 1) * self.lr_decay)
        inside, outside = (lr_t, 1.0) if self.lr_in_buffer or not self.momentum else (1.0, lr_t)
        c = correction(self.rho, t) if self.bias_correction else 1.0
        root = sqrt(c)
        values: tuple[float, ...] = (
            self.rho,
            1.0 - self.rho,
            inside * root,
            self.eps_root * c,
            self.eps * root,
        )
        if self.centered:
            values += (1.0 / c,)
        if self.momentum:
            mu = self.momentum
            values += (mu, outside, outside * mu) if self.nesterov else (mu, 0.0, outside)
        return values

    @property
    def element(self) -> Element:
        return _ELEMENTS[self.kernel]

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        s = dict(zip(self.states, states, strict=True))
        rho, mu = self.rho, self.momentum
        lr_t = lr / (1 + (t - 1) * self.lr_decay)
        c = textbook_correction(rho, t) if self.bias_correction else 1.0
        s["v"] = rho * s["v"] + (1 - rho) * (g * g)
        w = s["v"] / c
        if self.centered:
            s["a"] = rho * s["a"] + (1 - rho) * g
            mean = s["a"] / c
            w = np.maximum(w - mean * mean, 0.0)
        u = ratio(g, np.sqrt(w + self.eps_root) + self.eps)
        if not mu:
            return lr_t * u, tuple(s.values())
        gathered = lr_t * u if self.lr_in_buffer else u
        s["b"] = mu * s["b"] + gathered
        delta = gathered + mu * s["b"] if self.nesterov else s["b"]
        return (delta if self.lr_in_buffer else lr_t * delta), tuple(s.values())
