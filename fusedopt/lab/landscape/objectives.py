"""Losses of two weights, with gradients by hand.

Every objective has `value(w)`, of weights of shape (..., 2), and `gradient(w)`, of one pair of
shape (2,), all float64. The sampled ones are means over `count` samples, and `pull(w, chosen)` is
their gradient over some of them, given by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]


class Objective(Protocol):
    """A loss of two weights. minimum: where it is lowest."""

    @property
    def minimum(self) -> tuple[float, float]: ...

    def value(self, w: Array) -> Any: ...

    def gradient(self, w: Array) -> Array: ...


class Sampled(Objective, Protocol):
    """A mean over samples."""

    @property
    def count(self) -> int: ...

    def pull(self, w: Array, chosen: Indices) -> Array: ...


@dataclass(frozen=True)
class Quadratic:
    """A valley, (a x^2 + b y^2) / 2, with `curvatures` (a, b)."""

    curvatures: tuple[float, float]
    minimum: tuple[float, float] = (0.0, 0.0)

    def value(self, w: Array) -> Any:
        return (np.array(self.curvatures) * (w - self.minimum) ** 2).sum(axis=-1) / 2

    def gradient(self, w: Array) -> Array:
        return np.array(self.curvatures) * (w - self.minimum)


@dataclass(frozen=True)
class Rosenbrock:
    """(1 - x)^2 + 100 (y - x^2)^2: a bent valley with a nearly level floor (Rosenbrock 1960)."""

    minimum: tuple[float, float] = (1.0, 1.0)

    def value(self, w: Array) -> Any:
        x, y = w[..., 0], w[..., 1]
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    def gradient(self, w: Array) -> Array:
        x, y = w
        away = y - x**2
        return np.array([-2 * (1 - x) - 400 * x * away, 200 * away])


@dataclass(frozen=True)
class Beale:
    """The sum over k = 1, 2, 3 of (c_k - x + x y^k)^2, c = (1.5, 2.25, 2.625) (Beale 1958).

    Steep walls round a plateau, where the way leads past a saddle at (0, 1).
    """

    minimum: tuple[float, float] = (3.0, 0.5)

    def value(self, w: Array) -> Any:
        x, y = w[..., 0, None], w[..., 1, None]
        return (self._residuals(x, y) ** 2).sum(axis=-1)

    def gradient(self, w: Array) -> Array:
        x, y = w
        r, k = self._residuals(x, y), np.arange(1, 4)
        return np.array([(2 * r * (y**k - 1)).sum(), (2 * r * x * k * y ** (k - 1)).sum()])

    @staticmethod
    def _residuals(x: Any, y: Any) -> Array:
        fitted: Array = np.array([1.5, 2.25, 2.625]) - x + x * y ** np.arange(1, 4)
        return fitted


@dataclass(frozen=True)
class Line:
    """Half the mean squared error of a line, slope x + intercept, through noisy points.

    `count` points round the line `true`, with unit noise, drawn from `seed`. The weights are
    (slope, intercept).
    """

    true: tuple[float, float] = (1.0, 0.5)
    count: int = 200
    seed: int = 0

    @cached_property
    def samples(self) -> tuple[Array, Array]:
        """Inputs of shape (count, 2), whose second column is one, and outputs (count,)."""
        rng = np.random.default_rng(self.seed)
        inputs = np.stack([rng.normal(0.6, 1.0, self.count), np.ones(self.count)], axis=1)
        return inputs, inputs @ self.true + rng.standard_normal(self.count)

    @cached_property
    def minimum(self) -> tuple[float, float]:
        slope, intercept = np.linalg.lstsq(*self.samples)[0]
        return float(slope), float(intercept)

    def value(self, w: Array) -> Any:
        inputs, outputs = self.samples
        return ((w @ inputs.T - outputs) ** 2).mean(axis=-1) / 2

    def gradient(self, w: Array) -> Array:
        return self.pull(w, np.arange(self.count))

    def pull(self, w: Array, chosen: Indices) -> Array:
        inputs, outputs = (part[chosen] for part in self.samples)
        mean: Array = (inputs @ w - outputs) @ inputs / len(chosen)
        return mean


@dataclass(frozen=True)
class TugOfWar:
    """The mean of linear samples, +- a x +- b y with `strengths` (a, b): all four signs, so zero.

    The samples pull hard, and in sum nowhere: what moves the weights for good is decay alone.
    """

    strengths: tuple[float, float]
    minimum: tuple[float, float] = (0.0, 0.0)
    count: int = 4

    def value(self, w: Array) -> Any:
        return np.zeros(w.shape[:-1])

    def gradient(self, w: Array) -> Array:
        return np.zeros(2)

    def pull(self, w: Array, chosen: Indices) -> Array:
        signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
        mean: Array = signs[chosen].mean(axis=0) * self.strengths
        return mean
