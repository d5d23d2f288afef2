"""Lion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..programs.arithmetic import Array
from ..programs.elements import signed_like
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Evolved sign momentum.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of m: b1 where it gives the sign, b2 where it is stored;
        default (0.9, 0.99).
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        c = b1 m + (1 - b1) g,  p := p - lr sign(c),  m := b2 m + (1 - b2) g

    sign(0) = 0; c is made of the old m.

    State: m.

    References
    ----------
    "The Evolution of AdamW", eq. (19); Chen et al. 2023, algorithm 2 (the state's own beta,
    decoupled decay).

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0, 1.0]), np.array([0.01, -100.0, 0.0])
    >>> rule = fo.Lion(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p)
    [0.9 1.1 1. ]
    """

    name = "lion"
    year = 2023

    lr: LearningRate = 1e-4
    betas: Betas = (0.9, 0.99)
    weight_decay: NonNegative = 0.0
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        return b1, 1.0 - b1, b2, 1.0 - b2, lr

    @staticmethod
    def element(p, g, m, b1, one_b1, b2, one_b2, lr):
        c = b1 * m + one_b1 * g
        m = b2 * m + one_b2 * g
        return signed_like(lr, c), m

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        (m,) = states
        b1, b2 = self.betas
        c = b1 * m + (1 - b1) * g
        return lr * np.sign(c), (b2 * m + (1 - b2) * g,)
