"""Gradients of some rows of a table, such as an embedding's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .checks import check_input
from .formats import compute_dtype


@dataclass(frozen=True, eq=False)
class Rows:
    """The gradient of some rows of a parameter; that of all others is zero.

    indices: integers in [0, number of rows), shape (n,), in any order; rows that come more than
    once are added up, in order of appearance. values: shape (n, *shape of a row), of any dtype that
    a gradient may have; values[j] is the gradient of row indices[j].

    A step touches these rows of the parameter and of its states alone, and only their states decay:
    the lazy form of PyTorch's SparseAdam and of LazyAdam. `Optimizer(exact=True)` and `catch_up`
    make it the dense step, bit for bit.
    """

    indices: np.ndarray
    values: np.ndarray


class Touched(NamedTuple):
    """Rows as plans take them: parameter's row rows[j] has values[places[j]].

    rows: int64, ascending, each once. places: int64. values: C-contiguous.
    """

    rows: np.ndarray
    places: np.ndarray
    values: np.ndarray

    @property
    def gathered(self) -> np.ndarray:
        """The values of `rows`, in their order; a copy."""
        gathered: np.ndarray = self.values[self.places]
        return gathered

    def dense(self, shape: Sequence[int]) -> np.ndarray:
        """The gradient of the whole parameter."""
        whole = np.zeros(shape, self.values.dtype)
        whole[self.rows] = self.gathered
        return whole


def as_rows(label: str, gradient: Any) -> Rows | None:
    """A gradient that is `Rows`, or a SciPy CSR matrix as such; None for any other.

    Of a matrix, those rows count that store something.
    """
    if isinstance(gradient, Rows):
        return gradient
    if getattr(gradient, "format", None) != "csr" or not hasattr(gradient, "indptr"):
        return None
    rows = np.flatnonzero(np.diff(gradient.indptr))
    values = check_input(label, gradient[rows].toarray())
    return Rows(rows, values)


def touched(label: str, rows: Rows, p: np.ndarray) -> Touched:
    """Checked against the parameter, each row once.

    Raises TypeError for other kinds and dtypes, ValueError for other shapes and for indices out of
    range.
    """
    indices = check_indices(f"{label}.indices", rows.indices, p.shape)
    values = np.ascontiguousarray(check_input(f"{label}.values", rows.values))
    if values.shape != (indices.size, *p.shape[1:]):
        raise ValueError(
            f"{label}.values: expected the shape {(indices.size, *p.shape[1:])}, for so many"
            f" indices and rows of a parameter of shape {p.shape}; got {values.shape}"
        )
    return _unique(indices, values, compute_dtype(p.dtype))


def added_up(label: str, rows: Rows) -> np.ndarray:
    """The values of each row once, for whom the parameter is not known."""
    values = np.ascontiguousarray(check_input(f"{label}.values", rows.values))
    if values.ndim == 0 or np.shape(rows.indices) != values.shape[:1]:
        raise ValueError(
            f"{label}: expected as many indices as values, got the shapes {np.shape(rows.indices)}"
            f" and {values.shape}"
        )
    return _unique(np.asarray(rows.indices), values, compute_dtype(values.dtype)).gathered


def _unique(indices: np.ndarray, values: np.ndarray, dtype: np.dtype) -> Touched:
    """Each row once; those of equal indices are added up in dtype."""
    found, places, counts = np.unique(indices, return_index=True, return_counts=True)
    if found.size < indices.size:
        values, places = _added(indices, values, counts, dtype), np.arange(found.size)
    return Touched(found, places.astype(np.int64), values)


def _added(
    indices: np.ndarray, values: np.ndarray, counts: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    """The sums of the rows of equal indices, in order of appearance."""
    order = np.argsort(indices, kind="stable")
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    with np.errstate(all="ignore"):
        total = values[order[starts]].astype(dtype)
        for k in range(1, int(counts.max())):  # the k-th of those that have so many
            more = np.flatnonzero(counts > k)
            total[more] += values[order[starts[more] + k]].astype(dtype)
    return total


def check_indices(label: str, indices: Any, shape: Sequence[int]) -> np.ndarray:
    """Indices of rows, int64; TypeError or ValueError where they are not."""
    if not isinstance(indices, np.ndarray) or indices.dtype.kind not in "iu":
        kind = indices.dtype if isinstance(indices, np.ndarray) else f"a {type(indices).__name__}"
        raise TypeError(f"{label}: expected an ndarray of integers, got {kind}")
    if indices.ndim != 1:
        raise ValueError(f"{label}: expected one dimension, got the shape {indices.shape}")
    if not shape:
        raise ValueError(f"{label}: the parameter has no rows; give an array for its gradient")
    outside = (indices < 0) | (indices >= shape[0])
    if outside.any():
        first = int(np.argmax(outside))
        raise ValueError(
            f"{label}: expected integers in [0, {shape[0]}), got {int(indices[first])} at {first}"
        )
    return indices.astype(np.int64)


def joined(parts: Sequence[Rows]) -> Rows:
    """All rows, one after the other."""
    indices, values = zip(*((part.indices, part.values) for part in parts), strict=True)
    return Rows(np.concatenate(indices), np.concatenate(values))


def values_of(gradient: Any) -> Any:
    """The array of a gradient's values, whatever it is; None for None."""
    if isinstance(gradient, (Rows, Touched)):
        return gradient.values
    return gradient.data if hasattr(gradient, "indptr") else gradient


def whole(gradient: Any, shape: Sequence[int]) -> Any:
    """The gradient of the whole parameter; None for None."""
    return gradient.dense(shape) if isinstance(gradient, Touched) else gradient


def selected(gradient: Any) -> Any:
    """What there is of it."""
    return gradient.gathered if isinstance(gradient, Touched) else gradient
