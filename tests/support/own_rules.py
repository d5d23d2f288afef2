"""Rules of one's own whose arithmetic is that of built-in ones."""

from __future__ import annotations

import math

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
