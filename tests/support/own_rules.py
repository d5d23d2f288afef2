"""Rules of one's own whose arithmetic is that of built-in ones."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

import fusedopt as fo


class OwnLARS(fo.CustomRule):
    """The arithmetic of `fo.LARS`, whose bits are known."""

    momentum: float = 0.9
    trust: float = 1e-3

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return (self.momentum,)

    @staticmethod
    def measure(p: float, g: float, v: float, momentum: float) -> tuple[float, float]:
        return p * p, g * g

    def measured(self, t: int, lr: float, sums: tuple[float, ...]) -> tuple[float, ...]:
        p, g = map(math.sqrt, sums)
        return (lr * (self.trust * p / g if p and g else 1.0),)

    @staticmethod
    def element(p: float, g: float, v: float, momentum: float, rate: float) -> tuple[float, float]:
        v = momentum * v + rate * g
        return v, v


class RowLARS(fo.LARS):
    """The built-in rule with one trust ratio for each row."""

    over: ClassVar[Any] = "row"

    def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
        p, g = np.sqrt(sums)
        moves = (p > 0) & (g > 0)
        return (lr * np.where(moves, self.trust * p / (g + self.eps), 1.0),)


class OwnRowLARS(OwnLARS):
    """The arithmetic of `RowLARS`."""

    over: ClassVar[Any] = "row"

    def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
        p, g = np.sqrt(sums)
        return (lr * np.where((p > 0) & (g > 0), self.trust * p / g, 1.0),)


class Extremes(fo.CustomRule):
    """Steps by the mean of each row's gradient, its largest and its smallest element."""

    over: ClassVar[Any] = "row"
    maxima = 2

    def scalars(self, t: int, lr: float) -> tuple[float, ...]:
        return ()

    @staticmethod
    def measure(p: float, g: float) -> tuple[float, float, float, float]:
        return g, 1.0, g, -g

    def measured(self, t: int, lr: float, sums: Any) -> tuple[Any, ...]:
        total, count, largest, smallest = sums
        return total / count, largest, -smallest

    @staticmethod
    def element(p: float, g: float, mean: float, largest: float, smallest: float) -> float:
        return mean + largest - smallest
