"""Running tables of leaves on the driver that Numba compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...arrays.formats import FLOAT64, PLAIN_OF, SEGMENT, compute_dtype
from ...arrays.rows import UniqueRows, values_of
from ...jit import tiles
from ...jit.driver import INPUT, LEAF, MAX_OPERANDS, OPERAND, STEP, SUMS, run_part
from ...programs.arithmetic import rescaling
from ...programs.elements import ELEMENTS
from ...system.threads import in_use
from .pool import parallel_for

# Python's threads take 0.1 ms to wake, several times as long as the core's.
SERIAL = 1 << 18
SMALLEST_PART = 1 << 16
PARTS_PER_THREAD = 16


def address(a: np.ndarray) -> int:
    """Return the address at which an array's memory begins."""
    return int(a.__array_interface__["data"][0])


class Table:
    """Leaves, and the steps of their programs, for one run over `operands`.

    operands: of dtype OPERAND, those of each leaf in a row; a run puts the places of sums there.
    """

    def __init__(self, operands: np.ndarray) -> None:
        self._operands = operands
        self._leaves: list[Any] = []
        self._steps: list[Any] = []
        self._elements = self._partials = 0
        self._rows: list[np.ndarray] = []
        self._row_count = 0
        self._places: dict[tuple[int, int], tuple[int, int, int, bool]] = {}

    def add_step(self, run: int, scalars: np.ndarray, slots: Sequence[int]) -> int:
        """The number of a new step. The scalars, which may be of each row, live until the run."""
        places = [*slots, *[0] * (MAX_OPERANDS - len(slots))]
        each = scalars.strides[0] if scalars.ndim > 1 else 0
        self._steps.append((run, address(scalars), len(slots), places, each))
        return len(self._steps) - 1

    def add_leaf(
        self,
        elements: int,
        first: int,
        count: int,
        steps: tuple[int, int],
        used: int,
        written: int,
        summed: int,
        maxima: int,
        gradient: Any,
        rows: int = 0,
    ) -> int:
        """The number of a new leaf. first, count: of its operands. steps: the first, and how many.
        used, written, summed, maxima: operands, as bits. gradient: says which rows are touched.
        rows: how many the leaf has, where each has its own sums; otherwise 0."""
        number, parts, each = len(self._leaves), 1, -(-elements // SEGMENT)
        row, length = self._row_count, 0
        if rows or isinstance(gradient, UniqueRows):
            touched = _touched(gradient, rows)
            length = elements // rows if rows else gradient.values[:1].size
            elements = len(touched) * length
            self._rows.append(touched)
            self._row_count += len(touched)
            if rows:
                parts, each = len(touched), -(-length // SEGMENT)
        self._leaves.append(
            (
                self._elements,
                elements,
                first,
                count,
                *steps,
                used,
                written,
                summed,
                maxima,
                row,
                length,
                rows > 0,
            )
        )
        self._elements += elements
        for k in range(count):
            if summed >> k & 1:
                self._operands[first + k]["data"] = self._partials
                self._places[number, k] = self._partials, parts, each, bool(maxima >> k & 1)
                self._partials += parts * each
        return number

    def run(self, threads: int | None) -> Callable[..., Any]:
        """Run the operations, on at most `threads` threads.

        Returns a function that gives a sum, or maximum, from the numbers of its leaf and operand;
        with `by_row` an array of those of each row.
        """
        partials = np.zeros(max(1, self._partials))
        if self._elements:
            leaves, steps = np.array(self._leaves, LEAF), np.array(self._steps, STEP)
            limit = in_use()
            threads = min(threads or limit, limit)
            parts = 1
            if threads > 1 and self._elements >= SERIAL:
                parts = min(self._elements // SMALLEST_PART, threads * PARTS_PER_THREAD)
            parts = max(1, parts)
            rows = np.concatenate([np.zeros((0, 2), np.int64), *self._rows])
            compiled = run_part()
            parallel_for(
                parts,
                threads,
                lambda part: compiled(leaves, self._operands, steps, rows, partials, part, parts),
            )

        def total(leaf: int, operand: int, by_row: bool = False) -> Any:
            at, parts, each, largest = self._places[leaf, operand]
            if not by_row:
                parts, each = 1, parts * each
                if each == 1:
                    return float(partials[at])
            found = partials[at : at + parts * each].reshape(parts, each)
            if largest:
                totals = np.max(found, axis=1, initial=-np.inf)
            else:  # in index order, which np.sum is not, nor, compensated, Python's
                totals = np.cumsum(found, axis=1)[:, -1] if found.size else np.zeros(parts)
            return totals if by_row else float(totals[0])

        return total


def _touched(gradient: Any, rows: int) -> np.ndarray:
    """Return which rows a gradient touches, each with its place in the gradient."""
    if isinstance(gradient, UniqueRows):
        return np.stack((gradient.rows, gradient.places), axis=1)
    return np.stack((np.arange(rows),) * 2, axis=1)


def sums_of_squares(
    arrays: Sequence[Any], dtypes: Sequence[np.dtype], threads: int | None
) -> list[tuple[float, float]]:
    """Return (sum, scale) of each gradient, an array or `UniqueRows`, as `Backend` defines it.

    dtypes: the types to compute them in.
    """
    found = _squares(arrays, dtypes, [1.0] * len(arrays), threads)
    # Once more for float64 arrays whose squares left the range: see csrc/norms.hpp.
    factors = rescaling(np.array([total for total, _ in found])).tolist()
    lost = [k for k, factor in enumerate(factors) if factor != 1.0 and dtypes[k] == FLOAT64]
    again = _squares(
        [arrays[k] for k in lost],
        [dtypes[k] for k in lost],
        [factors[k] for k in lost],
        threads,
    )
    for k, result in zip(lost, again, strict=True):
        found[k] = result
    return found


def _squares(
    arrays: Sequence[Any],
    dtypes: Sequence[np.dtype],
    scales: Sequence[float],
    threads: int | None,
) -> list[tuple[float, float]]:
    operands = np.zeros(2 * len(arrays), OPERAND)
    operands["source"] = -1
    operands["role"][::2], operands["role"][1::2] = SUMS, INPUT
    table = Table(operands)
    constants = [np.array([s], dtype) for s, dtype in zip(scales, dtypes, strict=True)]
    for k, (a, dtype) in enumerate(zip(arrays, dtypes, strict=True)):
        take_input(operands[2 * k + 1], values_of(a), dtype)
        run = tiles.sum_tile(ELEMENTS["squares"], 2, 1, dtype).address
        step = table.add_step(run, constants[k], (0, 1))
        table.add_leaf(elements_of(a), 2 * k, 2, (step, 1), 3, 0, 1, 0, a)
    total = table.run(threads)
    return [(total(k, 0), scale) for k, scale in enumerate(scales)]


def elements_of(a: Any) -> int:
    """Return the number of elements up to the last row that a gradient touches, or of all."""
    if not isinstance(a, UniqueRows):
        return int(a.size)
    return int(a.rows[-1] + 1) * a.values[:1].size if len(a.rows) else 0


def take_input(row: Any, a: np.ndarray, dtype: np.dtype, zeroed: bool = False) -> None:
    """Make an operand of an array that comes with a step; zeroed: it is to be set to zero."""
    format = PLAIN_OF[a.dtype]
    row["data"], row["bits"] = address(a), format.bits
    row["decode"] = 0 if a.dtype == dtype else tiles.decoder(format, dtype).address
    row["encode"] = tiles.zeroer(a.dtype).address if zeroed else 0


def sums_of_dense(arrays: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """`sums_of_squares` of arrays, each in the type that a parameter of its own would have."""
    return sums_of_squares(arrays, [compute_dtype(a.dtype) for a in arrays], None)
