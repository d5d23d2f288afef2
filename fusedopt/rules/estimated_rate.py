"""The base of rules that find their learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import ClassVar, Literal

from ..programs.arithmetic import correction
from .base import Rule
from .hyperparameters import LearningRate, Normal


@dataclass(frozen=True, kw_only=True)
class EstimatedRate(Rule):
    """Base of the rules whose learning rate is an estimate d, which only grows, of the distance
    from all parameters to the solution."""

    over: ClassVar[Literal["parameter", "group", "optimizer"]] = "optimizer"

    lr: LearningRate = 1.0
    d0: Normal = 1e-6

    def initial(self, state: str) -> float:
        return self.d0 if state == "d" else 0.0

    @staticmethod
    def larger(d: float, found: float) -> tuple[float, float]:
        """Return the next estimate, and the ratio of d to it."""
        new = found if d < found < inf else d
        return new, d / new


def corrected(lr: float, betas: tuple[float, float], t: int) -> float:
    """Return lr with Adam's bias correction."""
    b1, b2 = betas
    return lr * sqrt(correction(b2, t)) / correction(b1, t)
