"""Gradients of some rows of a table, such as an embedding's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..system.extension import core, reason
from .checks import check_input
from .formats import TILE, Format, compute_dtype


@dataclass(frozen=True, eq=False)
class Rows:
    """The gradient of some rows of a parameter, of which all other rows are zero.

    Parameters
    ----------
    indices : array of int, shape (n,)
        Row numbers in any order. Rows that come more than once are added up, in order of
        appearance.
    values : array, shape (n, ...)
        The rows' gradients, in any dtype that a gradient may have: values[j] is that of row
        indices[j].
    padding_index : int, optional
        An index whose rows are left out, as if they had not been given.

    Notes
    -----
    A step touches these rows of the parameter and of its states alone, and only their states decay:
    the lazy form of PyTorch's SparseAdam and of LazyAdam. `Optimizer(exact=True)` and `catch_up`
    make it the dense step, bit for bit.
    """

    indices: np.ndarray
    values: np.ndarray
    padding_index: int | None = None


class UniqueRows(NamedTuple):
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


def unique_rows(label: str, rows: Rows, p: np.ndarray) -> UniqueRows:
    """Checked against the parameter, each row once.

    Raises TypeError for other kinds and dtypes, ValueError for other shapes and for indices out of
    range.
    """
    indices = check_indices(f"{label}.indices", rows.indices, p.shape)
    values = np.ascontiguousarray(check_input(f"{label}.values", rows.values))
    if values.shape != (indices.size, *p.shape[1:]):
        raise ValueError(
            f"{label}.values: expected the shape {(indices.size, *p.shape[1:])}, for"
            f" {indices.size} indices and a parameter of shape {p.shape}; got {values.shape}"
        )
    padding = rows.padding_index
    accepted = f"{label}.padding_index: expected an integer in [0, {p.shape[0]}) or None"
    if padding is not None and not isinstance(padding, (int, np.integer)):
        raise TypeError(f"{accepted}, got {padding!r}")
    if padding is not None and not 0 <= padding < p.shape[0]:
        raise ValueError(f"{accepted}, got {padding!r}")
    return _unique(indices, values, compute_dtype(p.dtype), padding)


def added_up(label: str, rows: Rows) -> np.ndarray:
    """The values of each row once, for whom the parameter is not known."""
    values = np.ascontiguousarray(check_input(f"{label}.values", rows.values))
    if values.ndim == 0 or np.shape(rows.indices) != values.shape[:1]:
        raise ValueError(
            f"{label}: expected as many indices as values, got the shapes {np.shape(rows.indices)}"
            f" and {values.shape}"
        )
    indices = _integers(f"{label}.indices", rows.indices)
    return _unique(indices, values, compute_dtype(values.dtype), rows.padding_index).gathered


def _unique(
    indices: np.ndarray, values: np.ndarray, dtype: np.dtype, padding: int | None
) -> UniqueRows:
    """Each row once, those of `padding` not; the values of equal indices are added up in dtype, in
    order of appearance."""
    rows, starts, order = _sorted(np.ascontiguousarray(indices, np.int64), padding)
    if rows.size == indices.size:
        return UniqueRows(rows, order, values)
    sums = np.empty((rows.size, *values.shape[1:]), dtype)
    if reason is not None or not core.add_rows(values, starts, order, sums):
        sums[...] = -0.0  # x + -0.0 is x for every x, -0.0 too
        counts = np.diff(starts, append=order.size)
        with np.errstate(all="ignore"):
            places = np.repeat(np.arange(rows.size), counts)
            np.add.at(sums, places, values[order].astype(dtype))
    return UniqueRows(rows, np.arange(rows.size), sums)


def _sorted(indices: np.ndarray, padding: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, starts, order): the rows, ascending; row r is given at order[starts[r]:starts[r+1]],
    in order of appearance."""
    if reason is None:
        return core.sort_rows(indices, padding)
    order = np.argsort(indices, kind="stable")
    if padding is not None:
        order = order[indices[order] != padding]
    rows, starts = np.unique(indices[order], return_index=True)
    return rows, starts, order


def _integers(label: str, indices: Any) -> np.ndarray:
    """An array of integers; TypeError for anything else."""
    if not isinstance(indices, np.ndarray) or indices.dtype.kind not in "iu":
        kind = indices.dtype if isinstance(indices, np.ndarray) else f"a {type(indices).__name__}"
        raise TypeError(f"{label}: expected an ndarray of integers, got {kind}")
    return indices


def check_indices(label: str, indices: Any, shape: Sequence[int]) -> np.ndarray:
    """Indices of rows, int64; TypeError or ValueError where they are not."""
    indices = _integers(label, indices)
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
    wide: np.ndarray = indices.astype(np.int64)
    return wide


def cut_by_slices(shape: Sequence[int], formats: Mapping[str, Format], axis: int = 0) -> str | None:
    """Return why rows, or with axis -1 columns, cannot be updated one by one, or None.

    formats: of what is stored.
    """
    what = "columns" if axis else "rows"
    length = math.prod([n for k, n in enumerate(shape) if k != axis % len(shape)])
    for name, format in formats.items():
        unit = TILE if format.random else format.block
        if length % unit and shape[axis] > 1:
            why = "random bits" if format.random else "blocks"
            return (
                f"{name} is stored as {format.name}, whose {why} need {what} of a multiple of"
                f" {unit} elements, and these have {length}"
            )
    return None


def check_slices(
    label: str, rule: str, shape: Sequence[int], formats: Mapping[str, Format], axis: int
) -> None:
    """Raise ValueError where a rule with sums of rows or columns meets formats that these cut."""
    cut = cut_by_slices(shape, formats, axis)
    if cut:
        what = "columns" if axis else "rows"
        raise ValueError(
            f"{label}: {rule} takes sums over {what}, but {cut}; take another state_dtype or"
            " rounding"
        )


def joined(parts: Sequence[Rows]) -> Rows:
    """Return all rows, one after the other."""
    indices, values = zip(*((part.indices, part.values) for part in parts), strict=True)
    return Rows(np.concatenate(indices), np.concatenate(values))


def values_of(gradient: Any) -> Any:
    """The array of a gradient's values, whatever it is; None for None."""
    if isinstance(gradient, (Rows, UniqueRows)):
        return gradient.values
    return gradient.data if hasattr(gradient, "indptr") else gradient


def whole(gradient: Any, shape: Sequence[int]) -> Any:
    """The gradient of the whole parameter; None for None."""
    return gradient.dense(shape) if isinstance(gradient, UniqueRows) else gradient


def selected(gradient: Any) -> Any:
    """Return the rows that a gradient has, or all."""
    return gradient.gathered if isinstance(gradient, UniqueRows) else gradient
