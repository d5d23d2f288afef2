"""Arrays that know how far rounding may have carried a computation from their value.

Wilkinson's running error analysis: each value is computed in float64, and beside it a bound on
what the same expression, evaluated in a narrower format in any usual order, may differ by. NumPy's
functions work on them, so that a rule's reference is written once, in plain NumPy, and yields both
the value and what a correct kernel is allowed to return.

Underflow is bounded apart from rounding. Rounding is relative, and does not change where a kernel
folds a constant into another; what is lost below the smallest number is absolute, and grows with
each constant that is applied after it. So a constant below one does not shrink it here, wherever
the kernel may apply that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ..arrays.formats import SEGMENT
from ..arrays.order import flattened
from ..programs.arithmetic import Summed


class Bounded(NDArrayOperatorsMixin):
    """value: float64; error: the bound on rounding, of the same shape; lost: that on underflow, of
    the same shape; dtype: the kernel's.

    `np.sign` returns four candidates along a new first axis: the value's own sign, and -1, 0 and 1
    where the value is within its error of zero (elsewhere its own sign again).
    """

    def __init__(
        self,
        value: np.ndarray,
        error: np.ndarray | float,
        dtype: np.dtype,
        lost: np.ndarray | float = 0.0,
    ) -> None:
        limits = np.finfo(dtype)
        self.dtype = dtype
        self._unit = float(limits.eps) / 2
        self._least = FOLDED * float(limits.smallest_subnormal)
        self._largest = float(limits.max)
        size, reach = np.abs(value), error + lost
        # Where a constant or rounding decides whether the largest number is passed, it may go
        # either way.
        passes = size - reach > FOLDED * self._largest
        self.value = np.where(passes, np.copysign(np.inf, value), value)
        finite = np.isfinite(self.value)
        anything = finite & ~(size + reach <= self._largest)  # also where a bound is NaN
        # An infinity or NaN is either met or not.
        self.error = np.where(anything, np.inf, np.where(finite, error, 0.0))
        self.lost = np.where(finite & ~anything, lost, 0.0)

    @classmethod
    def exact(cls, array: np.ndarray, dtype: np.dtype) -> Bounded:
        """Return the values of an array, rounded to dtype if they are wider."""
        with np.errstate(all="ignore"):
            return cls(array.astype(dtype).astype(np.float64), 0.0, dtype)

    @property
    def reach(self) -> np.ndarray:
        """The bound on both kinds of error together."""
        return self.error + self.lost

    @property
    def undecided(self) -> np.ndarray:
        """Where the sign is up to rounding."""
        undecided: np.ndarray = (np.abs(self.value) <= self.reach) & (self.reach > 0)
        return undecided

    def flat(self, order: str, ndim: int) -> Bounded:
        """The last `ndim` axes as one, in memory order; candidates stay on the axes before."""

        def flat(a: np.ndarray) -> np.ndarray:
            if a.ndim > ndim:
                return np.stack([flat(each) for each in a])
            elements: np.ndarray = flattened(a, order)
            return elements

        return self._map(flat)

    def __getitem__(self, k: Any) -> Bounded:
        return self._map(lambda a: a[k])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def where(self, chosen: np.ndarray, other: Bounded) -> Bounded:
        """The other's elements where chosen."""

        def select(mine: np.ndarray, others: np.ndarray) -> np.ndarray:
            return np.where(chosen, others, mine)

        return self._map(select, other)

    def pick(self, chosen: np.ndarray) -> Bounded:
        """The chosen elements of a flat array."""
        return self._map(lambda a: a[..., chosen])

    def stored(self, least: float) -> Bounded:
        """Return the array as a state, which is zero where it would be below `least`."""
        return self._like(self.value, self.error, self.lost + least)

    def divides(self, numerator: Bounded) -> Bounded:
        """numerator / self, zero where self is zero."""
        zero = self.value == 0
        divisor = self._like(np.where(zero, np.inf, self.value), self.error, self.lost)
        quotient = numerator / divisor
        # Where the kernel may have seen something other than a zero, every result is possible.
        error = np.where(zero & (self.reach > 0), np.inf, quotient.error)
        return self._like(quotient.value, error, quotient.lost)

    def loosened(self, share: float) -> Bounded:
        """Return the value with a bound that is wider by a share of it."""
        return self._like(self.value, self.error + share * np.abs(self.value), self.lost)

    def capped(self, limit: float) -> Bounded:
        """Return the value with no magnitude above `limit`, which is known by other means."""
        most = limit + np.abs(self.value)
        return self._like(self.value, np.minimum(self.error, most), np.minimum(self.lost, most))

    def by_sign(self, negative: Bounded, zero: Bounded, positive: Bounded) -> Bounded:
        """Select from three arrays by the sign of each element; the signs are taken as exact."""
        below, above = self.value < 0, self.value > 0

        def select(_: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            return np.where(below, a, np.where(above, c, b))

        return self._map(select, negative, zero, positive)

    def unless_opposed(self, a: Bounded, b: Bounded) -> Bounded:
        """The value, and 0 where one of a and b is positive and the other negative; either where
        the sign of a is up to rounding."""
        opposed = (a.value > 0) & (b.value < 0) | (a.value < 0) & (b.value > 0)
        size = np.where(a.undecided, np.abs(self.value), 0.0)
        value, error, lost = (
            np.where(opposed, 0.0, part) for part in (self.value, self.error, self.lost)
        )
        return self._like(value, error + size, lost)

    def moved(self, function: Callable[..., np.ndarray], *others: Bounded) -> Bounded:
        """`function`, which picks, moves and scales elements and adds zeros, of the arrays."""
        return self._map(function, *others)

    def through(self, function: Callable[[np.ndarray], np.ndarray], gain: float) -> Bounded:
        """`function` of the value, for one that amplifies rounding up to `gain` times, and rounds
        in float64 itself."""
        error = MATRIX_FACTOR * gain * self._unit + 8 * 2.0**-53
        return self._through(function, lambda largest: error * largest)

    def within(self, function: Callable[[np.ndarray], np.ndarray], error: float) -> Bounded:
        """`function` of the value, for one whose results differ by at most `error`."""
        return self._through(function, lambda largest: error)

    def _through(
        self, function: Callable[[np.ndarray], np.ndarray], error: Callable[[float], float]
    ) -> Bounded:
        """error: the bound on rounding, of the largest element of the result."""
        value = function(self.value)
        if not np.isfinite(self.error).all():  # one such element reaches all others
            return self._like(value, np.inf, 0.0)
        inside, outside = (float(np.max(np.abs(a), initial=0.0)) for a in (self.value, value))
        lost = MATRIX_FACTOR * float(np.max(self.lost, initial=0.0))
        if lost:  # which may be all that there is
            lost = lost * outside / inside if inside else np.inf
        return self._like(value, error(outside), lost)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def T(self) -> Bounded:  # noqa: N802  # as NumPy has it
        return self._map(np.transpose)

    def reshape(self, *shape: int) -> Bounded:
        """Return the elements in another shape, in C order."""
        return self._map(lambda a: a.reshape(*shape))

    def sum(self, axis: int, keepdims: bool = False) -> Bounded:
        """Added up in any order."""
        with np.errstate(all="ignore"):
            total = self.value.sum(axis, keepdims=keepdims)
            rounding = self.value.shape[axis] * self._unit * np.abs(self.value)
            error = (self.error + rounding).sum(axis, keepdims=keepdims)
            return self._like(total, error, self.lost.sum(axis, keepdims=keepdims))

    def wide(self) -> Bounded:
        """Return the elements for arithmetic in float64, with constants in their own type."""
        error = self.error + 2 * self._unit * np.abs(self.value)
        return Bounded(self.value, error, np.dtype(np.float64), self.lost)

    def total(self) -> Bounded:
        """All elements added up in float64."""
        with np.errstate(all="ignore"):
            rounding = self.value.size * 2.0**-53 * np.abs(self.value)
            error = np.sum(self.error + rounding)
            return self._like(np.sum(self.value), error, np.sum(self.lost))

    def squares(self, run: int) -> Bounded:
        """The squares added up in float64, runs of them in the own type before."""
        wide = self.wide()
        product: Bounded = wide * wide
        return product.total().loosened(run * self._unit)

    def _like(
        self, value: np.ndarray, error: np.ndarray | float, lost: np.ndarray | float
    ) -> Bounded:
        return Bounded(value, error, self.dtype, lost)

    def _map(self, function: Callable[..., np.ndarray], *others: Bounded) -> Bounded:
        """`function` of the values, of the errors and of what is lost, which picks or moves."""
        every = (self, *others)
        value, error, lost = (
            function(*(getattr(each, name) for each in every))
            for name in ("value", "error", "lost")
        )
        return self._like(value, error, lost)

    def _lift(self, x: Any) -> Bounded:
        if isinstance(x, Bounded):
            return x
        with np.errstate(over="ignore", under="ignore"):
            simple = float(np.float32(x)) == x
        if x != x:  # it came from a sum with an element that may be anything
            return Constant(np.zeros_like(self.value), np.inf, self.dtype)
        # Constants are folded with others and rounded; a few short ones, such as 1, are exact.
        inexact = 0.0 if simple else self._unit * abs(x)
        if isinstance(x, Summed):
            inexact += 2.0**-53 * abs(x) * roundings(x.terms)
        ones = np.ones_like(self.value)
        return Constant(x * ones, inexact, self.dtype, 0.0 if simple else self._least)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        operation = _OPERATIONS.get(ufunc)
        if method != "__call__" or kwargs or operation is None:
            return NotImplemented
        with np.errstate(all="ignore"):
            return operation(*(self._lift(x) for x in inputs))


class Constant(Bounded):
    """A number that a kernel may have folded into another, or applied elsewhere."""


def roundings(terms: int) -> float:
    """Return how many roundings, each of half a unit, a number made of a few such sums has.

    A sum has as many as a lane of a segment has terms, and one for each segment.
    """
    return 32 + min(terms, SEGMENT) / 16 + terms / SEGMENT


MATRIX_FACTOR = 64.0
"""Newton-Schulz results differ by at most this times largest slope, unit roundoff and largest
element. Measured in float32, over all sets of coefficients: up to 12 for rank-one matrices, 20 for
those with positive elements only, 100 where all elements are equal (sums then round all the same
way; `verify` allows for twice the bound), 5 for low rank, 6 for power laws, 0.6 for Gaussian
matrices."""


FOLDED = 2.0**10
"""How much larger or smaller than in the textbook the constants that a kernel has folded may make
an intermediate value, such as the root of Adam's c2, which is at least 0.01 where b2 is 0.9999."""


def _rounded(value: np.ndarray, error: np.ndarray, lost: np.ndarray, *operands: Bounded) -> Bounded:
    """The result of one operation: what came in with its operands, and its own rounding."""
    x = operands[0]
    for each in operands:  # not an infinity that must be met, where an operand may be anything
        value = np.where(np.isinf(each.error) & ~np.isfinite(value), 0.0, value)
        error = np.where(np.isinf(each.error), np.inf, error)
    return x._like(value, error + x._unit * np.abs(value), lost)


def _negative(a: Bounded) -> Bounded:
    return a._like(-a.value, a.error, a.lost)


def _absolute(a: Bounded) -> Bounded:
    return a._like(np.abs(a.value), a.error, a.lost)


def _add(a: Bounded, b: Bounded) -> Bounded:  # without underflow of its own
    return _rounded(a.value + b.value, a.error + b.error, a.lost + b.lost, a, b)


def _subtract(a: Bounded, b: Bounded) -> Bounded:
    return _add(a, _negative(b))


def _spread(x: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the reach of an error that x multiplies: what is zero adds nothing to any error."""
    reach: np.ndarray = np.where((x == 0) | (error == 0), 0.0, x * error)
    return reach


def _multiply(a: Bounded, b: Bounded) -> Bounded:
    x, y = np.abs(a.value), np.abs(b.value)
    error = _spread(x, b.error) + _spread(y, a.error) + _spread(a.error, b.error)
    lost = _spread(_gain(a), b.lost) + _spread(_gain(b), a.lost)
    lost += _spread(a.reach, b.lost) + _spread(a.lost, b.error)
    inexact = (x != 0) & (y != 0) | (error > 0) | (lost > 0)
    return _rounded(a.value * b.value, error, lost + a._least * inexact, a, b)


def _gain(a: Bounded) -> np.ndarray:
    """Return how much of another's underflow is left in a product with a."""
    size: np.ndarray = np.abs(a.value)
    return np.maximum(size, 1.0) if isinstance(a, Constant) else size


def _matmul(a: Bounded, b: Bounded) -> Bounded:
    x, y = np.abs(a.value), np.abs(b.value)
    error = x @ (b.error + x.shape[-1] * b._unit * y) + a.error @ (y + b.error)
    lost = (x + a.error) @ b.lost + a.lost @ (y + b.reach) + x.shape[-1] * a._least
    # What infinite and NaN elements make of a sum in any order, if its finite part stays in range.
    special = _unsized(a.value) @ _unsized(b.value)
    value = np.where(np.isfinite(special), a.value @ b.value, special)
    # Partial sums that pass the largest number may end as anything, so do those with an element
    # that may be anything, and an infinity times what may have either sign.
    passes = np.where(np.isinf(x), 0.0, x) @ np.where(np.isinf(y), 0.0, y) > a._largest
    passes |= np.isinf(a.error).any(-1, keepdims=True) | np.isinf(b.error).any(-2, keepdims=True)
    either = np.isinf(x) @ b.undecided | a.undecided @ np.isinf(y)
    anything = passes & ~np.isnan(special) | either
    error = np.where(anything | np.isnan(error), np.inf, error)
    return a._like(np.where(anything, 0.0, value), error + a._unit * np.abs(value), lost)


def _unsized(x: np.ndarray) -> np.ndarray:
    """The signs of what is finite, whose sums stay in range, and all else as it is."""
    return np.where(np.isfinite(x), np.sign(x), x)


def _divide(a: Bounded, b: Bounded) -> Bounded:
    value = a.value / b.value
    divisor = np.maximum(np.abs(b.value) - b.reach, 0.0)
    error = (a.error + np.abs(value) * b.error) / divisor
    error = np.where(np.isnan(error), np.where(b.reach > 0, np.inf, 0.0), error)
    # An infinity may meet a numerator that a constant has carried to another.
    both = np.isinf(b.value) & (FOLDED * np.abs(a.value) > a._largest)
    error = np.where(both, np.inf, error)
    least = np.minimum(divisor, 1.0) if isinstance(b, Constant) else divisor
    # The kernel may have multiplied the numerator by a constant before.
    below = a._least * (a.value != 0)
    lost = (a.lost + below + _spread(np.abs(value), b.lost)) / least
    return _rounded(value, error, np.where(np.isnan(lost), 0.0, lost) + below, a, b)


def _sqrt(a: Bounded) -> Bounded:  # without underflow of its own
    value = np.sqrt(a.value)

    def reach(error: np.ndarray) -> np.ndarray:
        above = np.sqrt(np.maximum(a.value + error, 0.0)) - value
        below = value - np.sqrt(np.maximum(a.value - error, 0.0))
        either: np.ndarray = np.fmax(above, below)
        return either

    both = reach(a.reach)
    error = np.minimum(reach(a.error), both)
    return _rounded(value, error, np.where(np.isfinite(error), both - error, 0.0), a)


def _maximum(a: Bounded, b: Bounded) -> Bounded:
    value, above = np.maximum(a.value, b.value), a.value - b.value
    apart = np.abs(above) > a.reach + b.reach  # else a kernel may take either

    def select(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(apart, np.where(above > 0, x, y), np.maximum(x, y))

    return a._like(value, select(a.error, b.error), select(a.lost, b.lost))


def _minimum(a: Bounded, b: Bounded) -> Bounded:
    return _negative(_maximum(_negative(a), _negative(b)))


def _sign(a: Bounded) -> Bounded:
    sign = np.sign(a.value)
    candidates = [np.where(a.undecided, c, sign) for c in (-1.0, 0.0, 1.0)]
    return a._like(np.stack([sign, *candidates]), 0.0, 0.0)


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
