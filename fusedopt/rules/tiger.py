"""Tiger."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np

from ..programs.arithmetic import Array, plain, summed
from ..programs.elements import signed_like
from .base import DecayForm, Rule
from .hyperparameters import Fraction, LearningRate, NonNegative


@dataclass(frozen=True, kw_only=True)
class Tiger(Rule):
    """Steps of one size, a share of the parameter's root mean square, by the momentum's sign.

    Parameters
    ----------
    beta : float
        Decay rate in [0, 1) of the average of the gradient; default 0.965.
    lr, weight_decay, decay, maximize
        As in `Rule`; decay "scaled" by default.

    Notes
    -----
    ::

        m := beta m + (1 - beta) g
        p := p - lr RMS(p) (sign(m) + lambda p), RMS(p) of the whole parameter, 1 where it is 0

    The author's code takes half the learning rate, no RMS and no weight decay for biases and gains,
    which is `Signum(lr=lr / 2, momentum=beta)` here, and the RMS of each row for embeddings. With
    an RMS of 0 it never moves; 1 stands for that here.

    State: m.

    References
    ----------
    Su 2023, https://kexue.fm/archives/9512, and the author's code.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([7.0, -1.0]), np.array([0.01, -100.0])
    >>> rule = fo.Tiger(lr=0.1, weight_decay=0.0)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))  # a tenth of 5, the root mean square
    [ 6.5 -0.5]
    """

    name = "tiger"
    year = 2023
    scales_decay = True

    lr: LearningRate = 1e-3
    beta: Fraction = 0.965
    weight_decay: NonNegative = 0.01
    decay: DecayForm = "scaled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",)

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return self.beta, 1.0 - self.beta, self.scaled_decay

    @staticmethod
    def measure(p, g, m, beta, one_beta, decay):
        return p * p, 1.0

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        squares, count = sums
        return (lr * (sqrt(squares / count) if squares else 1.0),)

    @staticmethod
    def element(p, g, m, beta, one_beta, decay, rate):
        m = beta * m + one_beta * g
        return signed_like(rate, m) + rate * (decay * p), m

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m = self.beta * states[0] + (1 - self.beta) * g
        squares = plain(p) ** 2
        size = float(np.sqrt(squares.mean())) if squares.size else 0.0
        rate = summed(lr * (size if size else 1.0), p)
        return rate * np.sign(m) + rate * (self.scaled_decay * p), (m,)
