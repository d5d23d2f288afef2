"""AdaGrad."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, ratio
from ..programs.elements import quotient
from .base import Rule
from .hyperparameters import LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class AdaGrad(Rule):
    """Steps divided by the root of the sum of all squared gradients.

    Parameters
    ----------
    eps_root : float
        Number >= 0 added inside the root; default 1e-16.
    eps : float
        Number >= 0 added to the root in the denominator; default 0.
    lr_decay : float
        Number >= 0: lr is divided by 1 + (t - 1) lr_decay; default 0.
    initial_accumulator : float
        First value >= 0 of the sum of squares; default 0.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        G := G + g^2,  p := p - lr_t g / (sqrt(G + eps_root) + eps)
        lr_t = lr / (1 + (t - 1) lr_decay)

    Where the denominator is zero there is no step. G starts at `initial_accumulator`.

    State: G.

    References
    ----------
    "The Evolution of AdamW", eq. (10)-(11); Duchi, Hazan & Singer 2011 has eps outside the root.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.AdaGrad(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # the first step is lr, whatever the gradient's size
    [0.9 0.9]
    """

    name = "adagrad"
    year = 2011
    settled = ("initial_accumulator",)
    examples = ({}, {"eps_root": 0.0, "eps": 1e-10, "lr_decay": 0.1, "initial_accumulator": 0.1})

    lr: LearningRate = 1e-2
    eps_root: NonNegative = 1e-16
    eps: NonNegative = 0.0
    lr_decay: NonNegative = 0.0
    initial_accumulator: NonNegative = 0.0

    @property
    def states(self) -> tuple[str, ...]:
        return ("G",)

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("G",))

    def initial(self, state: str) -> float:
        return float(self.initial_accumulator)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return lr / (1.0 + (t - 1) * self.lr_decay), self.eps_root, self.eps

    @staticmethod
    def element(p, g, G, lr, eps_root, eps):
        G = G + g * g
        return quotient(lr * g, sqrt(G + eps_root) + eps), G

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (G,) = states
        G = G + g * g
        lr_t = lr / (1 + (t - 1) * self.lr_decay)
        return ratio(lr_t * g, np.sqrt(G + self.eps_root) + self.eps), (G,)
