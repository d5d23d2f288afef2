"""Arithmetic that the rules' references and scalars share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import expm1, log, prod
from typing import Any, Self

import numpy as np

Array = Any
"""In a reference: an ndarray, or the array of `verification.running_error`, which carries the bound
of its rounding."""


Sums = tuple[Any, ...]
"""The sums that a rule has measured, and behind them the maxima."""


Pooling = Callable[[Sums], Sums]
"""A function from a leaf's sums to those of all leaves with which it is taken together."""


def alone(sums: Sums) -> Sums:
    """The sums of a leaf with which no other is taken together."""
    return sums


def correction(beta: float, t: int) -> float:
    """1 - beta^t without cancellation."""
    return -expm1(t * log(beta)) if beta else 1.0


def textbook_correction(beta: float, t: int) -> float:
    """1 - beta^t for the references, by another way than `correction`: in 28 decimal digits."""
    from decimal import Decimal  # only where a reference runs

    return float(1 - Decimal(beta) ** t)


def rescaling(sums: np.ndarray) -> np.ndarray:
    """Return the factor of each array whose squares left the range of float64, and 1 of the others.

    sums: of squares. The squares are added up once more, of elements times the factor; the core has
    the same limits in csrc/norms.cpp.
    """
    return np.select([sums < 2.0**-900, sums <= 2.0**1023], [2.0**600, 1.0], 2.0**-600)


def capped(x: Array, limit: float) -> Array:
    """x, whose magnitude never exceeds `limit`, as whoever bounds its rounding is to know."""
    return x if isinstance(x, np.ndarray) else x.capped(limit)


def moved(x: Array, function: Callable[[np.ndarray], np.ndarray]) -> Array:
    """`function` of an array, which only picks, moves and scales elements by powers of two, and
    adds zeros."""
    return function(x) if isinstance(x, np.ndarray) else x.moved(function)


def slice_of(a: Any, axis: int, k: int) -> Any:
    """Return what index k of the first axis, 0, or of the last one, -1, selects."""
    return a[k] if axis == 0 else a[..., k]


def stacked(slices: Sequence[Array], ndim: int, axis: int) -> Array:
    """The array with `ndim` axes that has these slices along its first one, 0, or its last one, -1.

    Candidates of a sign stand on an axis before all, of all slices as of those that have some.
    """

    def stack(*slices: np.ndarray) -> np.ndarray:
        return np.stack(np.broadcast_arrays(*slices), axis=-ndim if axis == 0 else -1)

    if isinstance(slices[0], (np.ndarray, np.generic)):
        return stack(*slices)
    return slices[0].moved(stack, *slices[1:])


def by_sign(sign: Array, negative: Array, zero: Array, positive: Array) -> Array:
    """Select from three arrays by each element of a result of `np.sign`; NaN selects `zero`."""
    if isinstance(sign, np.ndarray):
        return np.where(sign < 0, negative, np.where(sign > 0, positive, zero))
    return sign.by_sign(negative, zero, positive)


def unless_opposed(x: Array, a: Array, b: Array) -> Array:
    """x, and 0 where one of a and b is positive and the other negative."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.where((a > 0) & (b < 0) | (a < 0) & (b > 0), 0.0, x)
    return x.unless_opposed(a, b)


def undecided(x: Array) -> int:
    """The number of elements whose sign is up to rounding."""
    if isinstance(x, np.ndarray):
        return 0
    return int(np.count_nonzero(x.undecided))


def plain(x: Array) -> Array:
    """The values alone, in float64, of which kernels measure sums; NaN where any is possible."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x, np.float64)
    return np.where(np.isfinite(x.error), x.value, np.nan)


def wide(x: Array) -> Array:
    """The elements in float64, in which kernels measure."""
    return x if isinstance(x, (np.ndarray, np.generic)) else x.wide()


def total(x: Array) -> Array:
    """The sum of all elements, which kernels take in float64."""
    return np.sum(x) if isinstance(x, (np.ndarray, np.generic)) else x.total()


def squares(x: Array, run: int) -> Array:
    """The sum of all squares in float64, of which kernels add up runs in their own type before."""
    return np.sum(np.square(x)) if isinstance(x, (np.ndarray, np.generic)) else x.squares(run)


def grown(estimate: Array, found: Array) -> Array:
    """The larger of an estimate and one that was found, where that is finite."""
    value = found if isinstance(found, (np.ndarray, np.generic)) else found.value
    return np.maximum(estimate, found) if np.isfinite(value).all() else estimate


def norm(x: Array) -> float:
    """The Euclidean norm of all elements."""
    return float(np.sqrt(np.sum(plain(x) * plain(x))))


def trust_ratio(numerator: float, denominator: float) -> float:
    """The quotient of two norms, 1 where either is zero."""
    return numerator / denominator if numerator and denominator else 1.0


class Summed(float):
    """A number made of sums of `terms` numbers, which kernels add up in another order."""

    terms: int

    def __new__(cls, number: float, terms: int) -> Self:
        self = super().__new__(cls, number)
        self.terms = terms
        return self


def summed(number: float, over: Array) -> float:
    """A number made of sums over an array, for whoever bounds its rounding."""
    plain = isinstance(over, (np.ndarray, np.generic))
    return number if plain else Summed(number, prod(over.shape))


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, 0 where the denominator is 0: no step where nothing was accumulated."""
    if isinstance(denominator, (np.ndarray, np.generic)):
        return numerator / np.where(denominator == 0, np.inf, denominator).astype(denominator.dtype)
    return denominator.divides(numerator)
