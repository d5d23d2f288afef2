"""Signum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..programs.arithmetic import Array
from ..programs.elements import Element
from .base import DecayForm, Rule
from .hyperparameters import Fraction, LearningRate
from .lion import Lion


@dataclass(frozen=True, kw_only=True)
class Signum(Rule):
    """Steps of one size, with the sign of the momentum.

    Parameters
    ----------
    momentum : float
        Decay rate mu in [0, 1) of the average of the gradient; default 0.9.
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        m := mu m + (1 - mu) g,  p := p - lr sign(m)

    sign(0) = 0; momentum 0 is signSGD. It is Lion with two equal betas, and has its kernel.

    State: m.

    References
    ----------
    Bernstein et al. 2018, algorithm 2; optax's `signum`.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, g = np.array([1.0, 1.0, 1.0]), np.array([0.01, -100.0, 0.0])
    >>> rule = fo.Signum(lr=0.1)
    >>> fo.update(rule, 1, p, g, *rule.init(p))
    >>> print(p)
    [0.9 1.1 1. ]
    """

    name = "signum"
    year = 2018

    lr: LearningRate = 1e-4
    momentum: Fraction = 0.9
    decay: DecayForm = "decoupled"

    @property
    def states(self) -> tuple[str, ...]:
        return ("m",)

    @property
    def kernel(self) -> str:
        return "lion"

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        mu = self.momentum
        return mu, 1.0 - mu, mu, 1.0 - mu, lr

    @property
    def element(self) -> Element:
        return Lion.element

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        m = self.momentum * states[0] + (1 - self.momentum) * g
        return lr * np.sign(m), (m,)
