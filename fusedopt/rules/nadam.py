"""NAdam."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

import numpy as np

from ..programs.arithmetic import Array, correction, ratio, textbook_correction
from ..programs.elements import Element
from .adam import adam_nesterov
from .base import DecayForm, Rule
from .hyperparameters import Betas, LearningRate, NonNegative

VANISHED = 1e-20
"""A product of momenta that is no longer told from zero: 1 minus it is 1."""


@dataclass(frozen=True, kw_only=True)
class NAdam(Rule):
    """Adam with Nesterov's momentum, which warms up.

    Parameters
    ----------
    betas : pair of float
        Decay rates b1 and b2 in [0, 1) of the averages of the gradient and of its square;
        default (0.9, 0.999).
    eps : float
        Number >= 0 added to the root in the denominator; default 1e-8.
    momentum_decay : float
        Speed >= 0 at which the momentum warms up; default 0.004.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := b1 m + (1 - b1) g,  v := b2 v + (1 - b2) g^2,  c2 = 1 - b2^t
        mu_t = b1 (1 - 0.96^(t momentum_decay) / 2),  P_t = mu_1 mu_2 ... mu_t
        n = mu_{t+1} m / (1 - P_{t+1}) + (1 - mu_t) g / (1 - P_t)
        p := p - lr n / (sqrt(v / c2) + eps)

    Keras has momentum_decay = 1. optax's `nadam` keeps the momentum constant, which is
    `Adam(nesterov=True)` here.

    States: m, v.

    References
    ----------
    Dozat 2016.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0]), np.array([0.01, 100.0])
    >>> rule = fo.NAdam(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p.round(6))
    [0.894355 0.894355]
    """

    name = "nadam"
    year = 2016

    lr: LearningRate = 2e-3
    betas: Betas = (0.9, 0.999)
    eps: NonNegative = 1e-8
    momentum_decay: NonNegative = 4e-3
    decay: DecayForm = "l2"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m", "v")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("v",))

    @property
    def kernel(self) -> str:
        return "adam_nesterov"

    def momentum(self, t: int) -> float:
        """Return mu_t."""
        return float(self.betas[0] * (1.0 - 0.5 * 0.96 ** (t * self.momentum_decay)))

    def product(self, t: int) -> float:
        """Return P_t; all that differ from zero are kept, some hundreds where b1 is 0.9."""
        known: list[float] = self.__dict__.setdefault("_products", [1.0])
        if t >= len(known) and known[-1] > VANISHED:
            grown = list(known)  # another thread may read, or do the same
            while len(grown) <= 2 * t and grown[-1] > VANISHED:
                grown.append(grown[-1] * self.momentum(len(grown)))
            self.__dict__["_products"] = known = grown
        return known[t] if t < len(known) else 0.0

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        b1, b2 = self.betas
        root = sqrt(correction(b2, t))
        mu, ahead, product = self.momentum(t), self.momentum(t + 1), self.product(t)
        step = lr * root * ahead / (1.0 - product * ahead)
        step_g = lr * root * (1.0 - mu) / (1.0 - product)
        return b1, 1.0 - b1, b2, 1.0 - b2, step, 0.0, self.eps * root, step_g

    @property
    def element(self) -> Element:
        return adam_nesterov

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m, v = states
        b1, b2 = self.betas
        mu = [b1 * (1 - 0.96 ** (k * self.momentum_decay) / 2) for k in range(1, t + 2)]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g)
        n = mu[t] * m / (1 - prod(mu)) + (1 - mu[t - 1]) * g / (1 - prod(mu[:t]))
        return ratio(lr * n, np.sqrt(v / textbook_correction(b2, t)) + self.eps), (m, v)
