"""Momentum in its three forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..programs.arithmetic import Array
from .base import Rule
from .hyperparameters import Fraction, LearningRate


@dataclass(frozen=True, kw_only=True)
class Momentum(Rule):
    """Gradient descent with momentum.

    Parameters
    ----------
    momentum : float
        Decay rate mu in [0, 1) of the velocity; default 0.9.
    dampening : float
        Share in [0, 1) of the gradient that the form "buffer" leaves out; default 0.
    form : {"ema", "heavy_ball", "buffer"}
        Form of the velocity; default "ema".
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        "ema"         v := mu v + (1 - mu) g         p := p - lr v     eq. (3)-(4)
        "heavy_ball"  v := mu v + lr g               p := p - v        eq. (5); Keras
        "buffer"      v := mu v + (1 - dampening) g  p := p - lr v     PyTorch, optax

    The forms differ where lr changes: the heavy ball keeps the old rate in its velocity. The
    buffer's first step takes the gradient undampened.

    State: v.

    References
    ----------
    "The Evolution of AdamW".

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0]), np.array([0.5])
    >>> rule = fo.Momentum(lr=0.1, momentum=0.9, form="heavy_ball")
    >>> v, = rule.init(p)
    >>> for t in (1, 2):
    ...     fo.update(rule, t, p, g, v)
    >>> print(p.round(12))
    [0.855]
    """

    name = "momentum"
    year = 1964
    settled = ("form",)
    examples = ({}, {"form": "heavy_ball"}, {"form": "buffer", "dampening": 0.3})

    lr: LearningRate = 1e-2
    momentum: Fraction = 0.9
    dampening: Fraction = 0.0
    form: Literal["ema", "heavy_ball", "buffer"] = "ema"

    def check_together(self) -> None:
        if self.dampening and self.form != "buffer":
            raise ValueError(f"Momentum(dampening): form {self.form!r} has none; only 'buffer' has")

    @property
    def states(self) -> tuple[str, ...]:
        return ("v",)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        mu = self.momentum
        if self.form == "ema":
            return mu, 1.0 - mu, lr
        if self.form == "heavy_ball":
            return mu, lr, 1.0
        return mu, 1.0 if t == 1 else 1.0 - self.dampening, lr

    @staticmethod
    def element(p, g, v, mu, a, b):
        v = mu * v + a * g
        return b * v, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (v,) = states
        mu, tau = self.momentum, self.dampening
        if self.form == "ema":
            v = mu * v + (1 - mu) * g
            return lr * v, (v,)
        if self.form == "heavy_ball":
            v = mu * v + lr * g
            return v, (v,)
        v = mu * v + (g if t == 1 else (1 - tau) * g)
        return lr * v, (v,)
