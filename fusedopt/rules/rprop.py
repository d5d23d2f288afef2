"""Rprop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..programs.arithmetic import Array, by_sign
from ..programs.elements import signed_like
from .base import Rule
from .hyperparameters import LearningRate, Pair


@dataclass(frozen=True, kw_only=True)
class Rprop(Rule):
    """Resilient propagation: a step size for each element, that only signs of gradients change.

    Parameters
    ----------
    etas : pair of float
        Factors >= 0 of a step size where signs differ and where they agree; default (0.5, 1.2).
    step_sizes : pair of float
        Smallest and largest step size; default (1e-6, 50).
    lr, weight_decay, decay, maximize
        As in `Rule`.

    Notes
    -----
    ::

        agreement = sign(g) sign(prev)
        s := s etas[1], s etas[0] or s where the agreement is 1, -1 or 0, within `step_sizes`
        prev := g, 0 where the agreement is -1
        p := p - s sign(prev)

    States: prev (the last gradient), s, which starts at lr: the learning rate is the size of the
    first steps and nothing after them, and what a schedule says later only scales a decoupled
    weight decay. For gradients of the whole data: noise turns their signs.

    References
    ----------
    Riedmiller & Braun 1993; the form without weight-backtracking (iRprop-) of Igel & Huesken 2000,
    as PyTorch has it. optax 0.2.8 applies every step one step late, which no setting here does.

    Examples
    --------
    >>> import numpy as np, fusedopt as fo
    >>> p, rule = np.array([1.0, 1.0]), fo.Rprop(lr=0.1)
    >>> states = rule.init(p)
    >>> for t, g in ((1, [0.01, 100.0]), (2, [0.02, -1.0])):
    ...     fo.update(rule, t, p, np.array(g), *states)
    >>> print(p.round(6))
    [0.78 0.9 ]
    """

    name = "rprop"
    year = 1993
    settled = ("lr",)
    examples = ({}, {"lr": 0.025, "etas": (0.4, 3.0), "step_sizes": (0.02, 0.06)})

    lr: LearningRate = 1e-2
    etas: Pair = (0.5, 1.2)
    step_sizes: Pair = (1e-6, 50.0)

    def check_together(self) -> None:
        if self.scheduled:  # the values of a step are checked in it
            return
        down, up = self.etas
        if not 0.0 < down < 1.0 < up:
            raise ValueError(f"Rprop(etas): expected 0 < etas[0] < 1 < etas[1], got {self.etas}")
        if self.step_sizes[0] > self.step_sizes[1]:
            raise ValueError(
                f"Rprop(step_sizes): expected the smallest and the largest, got {self.step_sizes}"
            )

    @property
    def states(self) -> tuple[str, ...]:
        return ("prev", "s")

    @property
    def nonnegative(self) -> frozenset[str]:
        return frozenset(("s",))

    def initial(self, state: str) -> float:
        return self.lr_at(1) if state == "s" else 0.0

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return *self.etas, *self.step_sizes

    @staticmethod
    def element(p, g, prev, s, down, up, low, high):
        agreement = signed_like(prev, g)
        s = up * s if agreement > 0 else (down * s if agreement < 0 else s)
        s = low if s < low else (high if s > high else s)
        prev = low - low if agreement < 0 else g  # a zero of their type
        return signed_like(s, prev), prev, s

    def textbook(
        self, p: Array, g: Array, states: tuple[Array, ...], *, t: int, lr: float
    ) -> tuple[Array, tuple[Array, ...]]:
        prev, s = states
        down, up = self.etas
        direction = np.sign(g)
        agreement = direction * np.sign(prev)
        s = by_sign(agreement, down * s, s, up * s)
        s = np.minimum(np.maximum(s, self.step_sizes[0]), self.step_sizes[1])
        taken = by_sign(agreement, 0.0 * direction, direction, direction)
        return s * taken, (by_sign(agreement, 0.0 * g, g, g), s)
