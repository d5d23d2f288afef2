"""LARS."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from ..programs.arithmetic import Array, norm, summed, trust_ratio
from .base import Rule
from .hyperparameters import Fraction, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class LARS(Rule):
    """Momentum of gradients whose norm is made a fixed share of their parameter's.

    Parameters
    ----------
    momentum : float
        Decay rate in [0, 1) of the velocity; default 0.9.
    trust : float
        Share >= 0 of the parameter's norm that a gradient gets; default 1e-3.
    eps : float
        Number >= 0 added to the gradient's norm; default 0.
    nesterov : bool
        Whether to look ahead by Nesterov's momentum; default False.
    lr, weight_decay, decay, maximize
        As in `Rule`; lr 1 by default.

    Notes
    -----
    ::

        r = trust ||p|| / (||g|| + eps), 1 where either norm is 0
        v := momentum v + lr r g
        p := p - v                               p := p - (lr r g + momentum v) with `nesterov`

    The norms are those of the whole parameter and of its gradient, weight decay of the form "l2"
    included (optax); the paper's denominator is ||g|| + lambda ||p||, which bounds that norm.

    State: v.

    References
    ----------
    You, Gitman and Ginsburg 2017, algorithm 1; optax's `lars`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([3.0, 4.0]), np.array([0.0, 1000.0])
    >>> rule = fo.LARS(lr=1.0, trust=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # a tenth of the parameter's norm, whatever the gradient's
    [3.  3.5]
    """

    name = "lars"
    year = 2017
    examples = ({}, {"nesterov": True, "trust": 0.02, "eps": 0.1})

    lr: LearningRate = 1.0
    momentum: Fraction = 0.9
    trust: NonNegative = 1e-3
    eps: NonNegative = 0.0
    nesterov: bool = False

    @property
    def states(self) -> tuple[str, ...]:
        return ("v",)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return (self.momentum, 1.0, self.momentum) if self.nesterov else (self.momentum, 0.0, 1.0)

    @staticmethod
    def measure(p, g, v, mu, x, y):
        return p * p, g * g

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        p, g = map(sqrt, sums)
        return (lr * (self.trust * p / (g + self.eps) if p and g else 1.0),)

    @staticmethod
    def element(p, g, v, mu, x, y, rate):
        u = rate * g
        v = mu * v + u
        return x * u + y * v, v

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (v,) = states
        mu, g_norm = self.momentum, norm(g)
        r = trust_ratio(self.trust * norm(p), g_norm + self.eps) if g_norm else 1.0
        u = summed(r, g) * (lr * g)
        v = mu * v + u
        return (u + mu * v if self.nesterov else v), (v,)
