"""Check parameters and gradients, and explain every refusal."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ..system.extension import Mean
from .device_interface import on_device
from .foreign import host_array, read_only, remedy
from .formats import DTYPES
from .order import axes_of, memory_order, slices_are_dense, turned, turned_back
from .trees import Fixed

EXPECTED = "float32, float64, bfloat16 (of ml_dtypes) or float16"

SLICES = {
    0: ("rows", "C order, made with np.ascontiguousarray"),
    -1: ("columns", "Fortran order, made with np.asfortranarray"),
}
"""Names of what an index of the first or last axis selects, and the order in which it is dense."""


class Refusing(Protocol):
    """The part of a rule that may refuse a parameter: see `fusedopt.rules.base.Rule`."""

    @property
    def program(self) -> Any:
        """The program of a step on an element, in one phase or several."""

    def refuses(self, p: np.ndarray) -> str | None:
        """Return why this parameter cannot be updated, with the remedy, or None."""


def _check_array(label: str, array: Any, use: str = "update") -> np.ndarray:
    given, array = array, host_array(array)
    if not isinstance(array, np.ndarray):
        if on_device(array):
            raise TypeError(
                f"{label}: is on a CUDA device, where only the backend 'cuda' takes it; give it no"
                " array of the host beside it, or copy it there"
            )
        raise TypeError(
            f"{label}: expected an ndarray, got a {type(given).__name__}; {remedy(given, use)}"
        )
    a: np.ndarray = array
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(f"{label}: masks are not supported; pass a.filled(0) or a.data")
    if a.dtype not in DTYPES:
        if a.dtype.newbyteorder() in DTYPES:
            raise TypeError(
                f"{label}: expected native byte order, got {a.dtype.str}; convert it with"
                " a.astype(a.dtype.newbyteorder('='))"
            )
        inside = a.dtype == object and any(isinstance(each, np.ndarray) for each in a.flat)
        other = "a.tolist(), a list of its arrays" if inside else "an array of one of these dtypes"
        raise TypeError(f"{label}: expected {EXPECTED}, got {a.dtype}; pass {other}")
    return a


def _check_read(label: str, array: Any) -> np.ndarray:
    """Return an array that will only be read, or raise TypeError.

    The scalars that NumPy's reductions give are arrays without dimensions.
    """
    return _check_array(
        label, np.asarray(array) if isinstance(array, np.generic) else array, "read"
    )


def _plain(a: np.ndarray) -> np.ndarray:
    """Return the array as an exact ndarray whose dtype is the object that NumPy has for it."""
    if type(a) is np.ndarray and any(a.dtype is dtype for dtype in DTYPES):
        return a
    dtype = next(dtype for dtype in DTYPES if dtype == a.dtype)
    order = memory_order(a)
    # By way of bytes: bfloat16 does not go through the buffer protocol.
    memory = turned(a.view(np.ndarray), order).view(f"u{a.itemsize}")
    plain: np.ndarray = turned_back(np.ndarray(memory.shape, dtype, memory), order)
    return plain


def check_target(label: str, array: Any) -> np.ndarray:
    """An array that will be updated in place, as a plain ndarray over the same memory.

    Raises TypeError for another kind or dtype, ValueError where it is read-only, unaligned or not
    dense.
    """
    a = _check_array(label, array)
    if not a.flags.writeable:
        raise ValueError(f"{label}: {read_only(array)}")
    if not a.flags.aligned:
        raise ValueError(f"{label}: is not aligned in memory; pass a copy")
    if not memory_order(a):
        raise ValueError(
            f"{label}: is not dense (shape {a.shape}, strides {a.strides}), and a copy would be"
            " updated instead of it; pass an array made with np.ascontiguousarray, and copy it back"
        )
    return _plain(a)


def check_input(label: str, array: Any) -> np.ndarray:
    """An array that will only be read, dense: itself, or a copy. Raises TypeError for another kind
    or dtype."""
    a = _check_read(label, array)
    if a.flags.aligned and memory_order(a):
        return _plain(a)
    return _plain(np.array(a, subok=False))


def check_parameter(label: str, array: Any, rule: Refusing) -> np.ndarray:
    """A parameter that this rule can update; raises as `check_target`, and where it cannot."""
    a = check_target(label, array)
    check_rule(label, a, rule)
    return a


def check_rule(label: str, dense: Any, rule: Refusing) -> None:
    """Raise ValueError where a rule cannot update an array, of the host or a device."""
    reason, order = rule.refuses(dense), memory_order(dense)
    if not reason and rule.program.matrices and order not in ("C", "F"):
        axes = ", ".join(map(str, axes_of(order, dense.ndim)))
        reason = (
            f"{type(rule).__name__} updates matrices in C or Fortran order, and in memory the axes"
            f" are in the order ({axes}); pass the view a.transpose({axes}), and gradients alike"
        )
    axis = rule.program.axis if rule.program.slices(dense.shape) else None
    if not reason and axis is not None and not slices_are_dense(dense.shape, order, axis):
        what, remedy = SLICES[axis]
        reason = (
            f"{type(rule).__name__} takes sums over {what}, each of which must be dense, and in"
            f" memory the axes are in the order {axes_of(order, dense.ndim)}; pass a copy in"
            f" {remedy}, and gradients alike"
        )
    if reason:
        raise ValueError(f"{label}: {reason}")


def check_apart(labels: Sequence[str], arrays: Sequence[np.ndarray]) -> None:
    """Raise ValueError where two of these dense arrays share memory."""
    ranges = sorted((*_range(a), k) for k, a in enumerate(arrays) if a.size)
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            a, b = sorted((first, second))
            raise ValueError(
                f"{labels[b]}: shares memory with {labels[a]}, so that one update would disturb the"
                " other; pass each array once, or a copy"
            )


def apart(sources: Sequence[Any], targets: Sequence[Any]) -> list[Any]:
    """Return the sources, with a copy of each array that shares memory with a target."""
    spans = sorted(_range(a) for a in targets if isinstance(a, np.ndarray) and a.size)
    kept = []
    for a in sources:
        if not isinstance(a, np.ndarray):
            kept.append(a)
            continue
        low, high = np.lib.array_utils.byte_bounds(a)
        last = bisect_left(spans, (high,)) - 1  # they share no memory among themselves
        kept.append(a.copy() if a.size and last >= 0 and spans[last][1] > low else a)
    return kept


def _range(dense: np.ndarray) -> tuple[int, int]:
    begin = dense.__array_interface__["data"][0]
    return begin, begin + dense.nbytes


class GradientChecks:
    """Check of gradients against the arrays that a step writes, which lays them out alike.

    labels, parameters: of each leaf. written: of each leaf all the arrays that the step writes, the
    caller's parameter first, then its copies, whose number `copies` gives.
    """

    def __init__(
        self,
        labels: Sequence[str],
        parameters: Sequence[np.ndarray],
        written: Sequence[Sequence[np.ndarray]],
        copies: Sequence[int] | None = None,
    ) -> None:
        self._copies = copies or [0] * len(labels)
        self._labels, self._parameters = labels, parameters
        ranges = sorted(
            (*_range(a), k, j) for k, group in enumerate(written) for j, a in enumerate(group)
        )
        self._ranges = [r for r in ranges if r[0] < r[1]]
        self._written = written

    def check_unmoved(self) -> None:
        """Raise ValueError where the caller made a parameter unfit after it was handed over."""
        for label, p in zip(self._labels, self._parameters, strict=True):
            check_target(label, p)

    def check_exclusive(self, inputs: Sequence[tuple[str, Any]], grads: int) -> None:
        """Raise ValueError where gradients that are to be zeroed are read-only or share memory.

        inputs: the gradients, of which there are `grads`, and the other inputs; None for none.
        """
        given = [(label, g) for label, g in inputs if g is not None]
        for label, g in inputs[:grads]:
            if g is not None and not g.flags.writeable:
                raise ValueError(
                    f"{label}: is read-only, and zero_grads is to zero it; pass a copy"
                )
        spans = sorted(
            (*np.lib.array_utils.byte_bounds(g), k) for k, (_, g) in enumerate(given) if g.size
        )
        for (_, end, first), (begin, _, second) in pairwise(spans):
            if begin < end and np.shares_memory(given[first][1], given[second][1]):
                a, b = sorted((first, second))
                raise ValueError(
                    f"{given[b][0]}: shares memory with {given[a][0]}, which zero_grads is to zero;"
                    " pass each array once, or a copy"
                )

    def opened(self, what: str, tree: Any) -> Any:
        """A tree as it was given; TypeError where it is `Fixed`."""
        if isinstance(tree, Fixed):
            raise TypeError(
                f"{what}: Fixed is for arrays on a CUDA device; for arrays on the host pass the"
                " tree that it was made of"
            )
        return tree

    def copied(self, given: Sequence[Any], fitted: Sequence[Any]) -> list[int]:
        """Return the gradients of which the step may have been given a copy."""
        return [k for k, g in enumerate(given) if g is not None]

    def gradient(self, k: int, label: str, g: Any) -> Any:
        """The k-th leaf's gradient in its parameter's layout: itself, or a scratch copy.

        None stays None. Raises TypeError for another kind or dtype, ValueError for another shape
        or for memory that the step writes.
        """
        if g is None or isinstance(g, Mean):  # whose maker has checked its arrays
            return g
        g, p = _check_read(label, g), self._parameters[k]
        if g.shape != p.shape:
            raise ValueError(
                f"{label}: expected the shape {p.shape} of {self._labels[k]}, got {g.shape}"
            )
        self.check_apart(label, g)
        order = memory_order(p)
        if memory_order(g) == order and g.flags.aligned:
            return _plain(g)
        return _plain(turned_back(np.array(turned(g, order), order="C", subok=False), order))

    def check_apart(self, label: str, g: np.ndarray) -> None:
        """Raise ValueError where an input shares memory with what the step writes."""
        if not g.size:
            return
        low, high = np.lib.array_utils.byte_bounds(g)
        first = bisect_left(self._ranges, (low + 1,)) - 1  # they share no memory among themselves
        for begin, end, k, j in self._ranges[max(first, 0) :]:
            if begin >= high:
                break
            if end > low and np.shares_memory(g, self._written[k][j]):
                p, copies = self._labels[k], self._copies[k]
                what = p if j == 0 else f"a state of {p}"
                if 0 < j <= copies:
                    what = "copy_out" + p.removeprefix("params")
                raise ValueError(
                    f"{label}: shares memory with {what}, which this step writes; pass a copy"
                )
