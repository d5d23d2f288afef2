"""Nesterov's accelerated gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..programs.arithmetic import Array
from ..programs.elements import Element
from ..programs.program import Operation
from .base import Rule
from .hyperparameters import Fraction, LearningRate, NonNegative
from .momentum import Momentum


def nesterov(p, g, v, mu, a, b, c):
    v = mu * v + a * g
    return b * g + c * v, v


@dataclass(frozen=True, kw_only=True)
class Nesterov(Rule):
    """Nesterov's accelerated gradient.

    Parameters
    ----------
    momentum : float
        Decay rate mu in [0, 1) of the velocity; default 0.9.
    form : {"rearranged", "heavy_ball", "lookahead"}
        Form of the velocity; default "rearranged".
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        "rearranged"  v := mu v + g     p := p - lr (g + mu v)   eq. (8)-(9); PyTorch, optax
        "heavy_ball"  v := mu v + lr g  p := p - (lr g + mu v)   Keras: lr inside the velocity
        "lookahead"   v := mu v + lr g  p := p - v               eq. (6)-(7)

    In the last form the gradient is to be taken at p - mu v, inside of `with opt.lookahead(): ...`.

    State: v.

    References
    ----------
    "The Evolution of AdamW".

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p = np.array([1.0])
    >>> opt = fo.Optimizer(p, fo.Nesterov(lr=0.1, form="lookahead"))
    >>> for _ in range(2):
    ...     with opt.lookahead():
    ...         g = 2 * p  # the gradient of p^2, where the momentum will have carried p
    ...     _ = opt.step(g)
    >>> print(p.round(12))
    [0.496]
    """

    name = "nesterov"
    year = 1983
    settled = ("form",)
    examples = ({}, {"form": "heavy_ball"}, {"form": "lookahead"})

    lr: LearningRate = 1e-2
    momentum: Fraction = 0.9
    form: Literal["rearranged", "heavy_ball", "lookahead"] = "rearranged"

    @property
    def states(self) -> tuple[str, ...]:
        return ("v",)

    @property
    def kernel(self) -> str:
        return "momentum" if self.form == "lookahead" else "nesterov"

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        mu = self.momentum
        if self.form == "rearranged":
            return mu, 1.0, lr, lr * mu
        if self.form == "heavy_ball":
            return mu, lr, lr, mu
        return mu, lr, 1.0

    @property
    def element(self) -> Element:
        return Momentum.element if self.form == "lookahead" else nesterov

    @property
    def ahead(self) -> tuple[Rule, str] | None:
        return (LookAhead(momentum=self.momentum), "v") if self.form == "lookahead" else None

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (v,) = states
        mu = self.momentum
        if self.form == "rearranged":
            v = mu * v + g
            return lr * (g + mu * v), (v,)
        v = mu * v + lr * g
        return (v if self.form == "lookahead" else lr * g + mu * v), (v,)


@dataclass(frozen=True, kw_only=True)
class LookAhead(Rule):
    """Moves p to p - mu v: v takes the gradient's place."""

    name = "lookahead"

    momentum: NonNegative = 0.9

    def operations(self) -> tuple[Operation, ...]:
        scalars = (self.momentum,)
        return (Operation("lookahead", ("p", "g"), lambda t, lr: scalars, "other"),)

    def reference(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        return p - self.momentum * g, ()
