"""Arrays that know how far rounding may have carried a computation from their value.

Wilkinson's running error analysis: each value is computed in float64, and beside it a bound on
what the same expression, evaluated in a narrower format in any usual order, may differ by. NumPy's
functions work on them, so that a rule's reference is written once, in plain NumPy, and yields both
the value and what a correct kernel is allowed to return.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..arrays.order import flattened


class Bounded(NDArrayOperatorsMixin):
    """value: float64; error: the bound, of the same shape; dtype: the kernel's.

    `np.sign` returns four candidates along a new first axis: the value's own sign, and -1, 0 and 1
    where the value is within its error of zero (elsewhere its own sign again).
    """

    def __init__(self, value: np.ndarray, error: np.ndarray | float, dtype: np.dtype) -> None:
        limits = np.finfo(dtype)
        beyond = np.abs(value) > float(limits.max)
        self.value = np.where(beyond, np.copysign(np.inf, value), value)
        self.dtype = dtype
        error = np.broadcast_to(error, self.value.shape)
        # An infinity or NaN is either met or not; near the largest number it may go either way.
        finite = np.isfinite(self.value)
        edge = finite & (np.abs(self.value) + error > float(limits.max))
        self.error = np.where(edge, np.inf, np.where(finite, error, 0.0))
        self._unit = float(limits.eps) / 2
        self._least = float(limits.smallest_subnormal)

    @classmethod
    def exact(cls, array: np.ndarray, dtype: np.dtype) -> Bounded:
        """Return the values of an array, rounded once to dtype if they are wider."""
        value = array.astype(np.float64)
        with np.errstate(all="ignore"):
            return cls(value, np.abs(value.astype(dtype).astype(np.float64) - value), dtype)

    def flat(self, order: str) -> Bounded:
        """One-dimensional, in memory order."""
        return self._like(flattened(self.value, order), flattened(self.error, order))

    def where(self, chosen: np.ndarray, other: Bounded) -> Bounded:
        """The other's elements where chosen."""
        value = np.where(chosen, other.value, self.value)
        return self._like(value, np.where(chosen, other.error, self.error))

    def pick(self, chosen: np.ndarray) -> Bounded:
        """The chosen elements of a flat array."""
        return self._like(self.value[..., chosen], self.error[..., chosen])

    def stored(self, least: float) -> Bounded:
        """Return the array as a state, which is zero where it would be below `least`."""
        return self._like(self.value, self.error + least)

    def divides(self, numerator: Bounded) -> Bounded:
        """numerator / self, zero where self is zero."""
        zero = self.value == 0
        quotient = numerator / self._like(np.where(zero, np.inf, self.value), self.error)
        # Where the kernel may have seen something other than a zero, every result is possible.
        return self._like(quotient.value, np.where(zero & (self.error > 0), np.inf, quotient.error))

    def capped(self, limit: float) -> Bounded:
        """Return the value with no magnitude above `limit`, which is known by other means."""
        return self._like(self.value, np.minimum(self.error, limit + np.abs(self.value)))

    def by_sign(self, negative: Bounded, zero: Bounded, positive: Bounded) -> Bounded:
        """Select from three arrays by the sign of each element; the signs are taken as exact."""
        below, above = self.value < 0, self.value > 0
        return self._like(
            np.where(below, negative.value, np.where(above, positive.value, zero.value)),
            np.where(below, negative.error, np.where(above, positive.error, zero.error)),
        )

    def through(self, function: Callable[[np.ndarray], np.ndarray], gain: float) -> Bounded:
        """`function` of the value, for one that amplifies rounding up to `gain` times."""
        value = function(self.value)
        largest = float(np.max(np.abs(value), initial=0.0))
        return self._like(value, MATRIX_FACTOR * gain * self._unit * largest)

    def within(self, function: Callable[[np.ndarray], np.ndarray], error: float) -> Bounded:
        """`function` of the value, for one whose results differ by at most `error`."""
        return self._like(function(self.value), error)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def T(self) -> Bounded:  # noqa: N802  # as NumPy has it
        return self._like(self.value.T, self.error.T)

    def reshape(self, *shape: int) -> Bounded:
        """Return the elements in another shape, in C order."""
        return self._like(self.value.reshape(*shape), self.error.reshape(*shape))

    def sum(self, axis: int, keepdims: bool = False) -> Bounded:
        """Added up in any order."""
        with np.errstate(all="ignore"):
            total = self.value.sum(axis, keepdims=keepdims)
            rounding = self.value.shape[axis] * self._unit * np.abs(self.value)
            return self._like(total, (self.error + rounding).sum(axis, keepdims=keepdims))

    def _like(self, value: np.ndarray, error: np.ndarray | float) -> Bounded:
        return Bounded(value, error, self.dtype)

    def _lift(self, x: Any) -> Bounded:
        if isinstance(x, Bounded):
            return x
        with np.errstate(over="ignore", under="ignore"):
            simple = float(np.float32(x)) == x
        # Constants are folded with others and rounded; a few short ones, such as 1, are exact.
        inexact = 0.0 if simple else self._unit * abs(x)
        return self._like(np.float64(x) * np.ones_like(self.value), inexact)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        operation = _OPERATIONS.get(ufunc)
        if method != "__call__" or kwargs or operation is None:
            return NotImplemented
        with np.errstate(all="ignore"):
            return operation(*(self._lift(x) for x in inputs))


MATRIX_FACTOR = 64.0
"""Newton-Schulz results differ by at most this times largest slope, unit roundoff and largest
element. Measured in float32, over all sets of coefficients: up to 12 for rank-one matrices, 20 for
those with positive elements only, 100 where all elements are equal (sums then round all the same
way; `verify` allows for twice the bound), 5 for low rank, 6 for power laws, 0.6 for Gaussian
matrices."""


def _rounded(value: np.ndarray, error: np.ndarray, x: Bounded) -> Bounded:
    """The result of one operation: what came in with its operands, and its own rounding."""
    return x._like(value, error + x._unit * np.abs(value) + x._least)


def _negative(a: Bounded) -> Bounded:
    return a._like(-a.value, a.error)


def _absolute(a: Bounded) -> Bounded:
    return a._like(np.abs(a.value), a.error)


def _add(a: Bounded, b: Bounded) -> Bounded:
    return _rounded(a.value + b.value, a.error + b.error, a)


def _subtract(a: Bounded, b: Bounded) -> Bounded:
    return _add(a, _negative(b))


def _spread(x: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the reach of an error that x multiplies: what is zero adds nothing to any error."""
    reach: np.ndarray = np.where((x == 0) | (error == 0), 0.0, x * error)
    return reach


def _multiply(a: Bounded, b: Bounded) -> Bounded:
    error = _spread(np.abs(a.value), b.error) + _spread(np.abs(b.value), a.error)
    error += _spread(a.error, b.error)
    return _rounded(a.value * b.value, error, a)


def _matmul(a: Bounded, b: Bounded) -> Bounded:
    x, y = np.abs(a.value), np.abs(b.value)
    error = x @ (b.error + x.shape[1] * b._unit * y) + a.error @ (y + b.error)
    return _rounded(a.value @ b.value, np.where(np.isnan(error), np.inf, error), a)


def _divide(a: Bounded, b: Bounded) -> Bounded:
    value = a.value / b.value
    error = (a.error + np.abs(value) * b.error) / np.maximum(np.abs(b.value) - b.error, 0.0)
    return _rounded(value, np.where(np.isnan(error), np.where(b.error > 0, np.inf, 0.0), error), a)


def _sqrt(a: Bounded) -> Bounded:
    value = np.sqrt(a.value)
    above = np.sqrt(np.maximum(a.value + a.error, 0.0)) - value
    below = value - np.sqrt(np.maximum(a.value - a.error, 0.0))
    return _rounded(value, np.fmax(above, below), a)


def _maximum(a: Bounded, b: Bounded) -> Bounded:
    return a._like(np.maximum(a.value, b.value), np.maximum(a.error, b.error))


def _minimum(a: Bounded, b: Bounded) -> Bounded:
    return a._like(np.minimum(a.value, b.value), np.maximum(a.error, b.error))


def _sign(a: Bounded) -> Bounded:
    sign = np.sign(a.value)
    undecided = (np.abs(a.value) <= a.error) & (a.error > 0)
    candidates = [np.where(undecided, c, sign) for c in (-1.0, 0.0, 1.0)]
    return a._like(np.stack([sign, *candidates]), 0.0)


_OPERATIONS: dict[np.ufunc, Callable[..., Bounded]] = {
    np.add: _add,
    np.subtract: _subtract,
    np.multiply: _multiply,
    np.matmul: _matmul,
    np.divide: _divide,
    np.negative: _negative,
    np.absolute: _absolute,
    np.sqrt: _sqrt,
    np.maximum: _maximum,
    np.minimum: _minimum,
    np.sign: _sign,
}
