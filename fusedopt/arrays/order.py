"""Memory orders of dense arrays: the axes from the slowest to the fastest in memory.

An order is "C", "F", or for any other permutation its axes, such as "0,2,3,1" of a channels-last
image. Arrays with the same shape and order have each element in the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def memory_order(a: Any) -> str:
    """The memory order of an array: "C" where it is in several, "" where it is not dense."""
    if not isinstance(a, np.ndarray):  # of a device, which knows it
        order: str = a.order
        return order
    if a.flags.c_contiguous:
        return "C"
    return "F" if a.flags.f_contiguous else order_of(a.shape, a.strides, a.itemsize)


def order_of(shape: Sequence[int], strides: Sequence[int] | None, itemsize: int) -> str:
    """The `memory_order` of an array by its strides in bytes; None: those of C order.

    Axes of length 1, whose strides say nothing, come first.
    """
    if strides is None or 0 in shape:
        return "C"
    ones = [k for k, n in enumerate(shape) if n == 1]
    others = sorted((k for k, n in enumerate(shape) if n != 1), key=lambda k: -strides[k])
    size = itemsize
    for k in reversed(others):
        if strides[k] != size:
            return ""
        size *= shape[k]
    if others == sorted(others):
        return "C"
    return "F" if others[::-1] == sorted(others) else ",".join(map(str, ones + others))


def axes_of(order: str, ndim: int) -> tuple[int, ...]:
    """The axes from the slowest to the fastest in memory."""
    if order == "C":
        return tuple(range(ndim))
    return tuple(range(ndim))[::-1] if order == "F" else tuple(map(int, order.split(",")))


def slices_are_dense(shape: Sequence[int], order: str, axis: int) -> bool:
    """Return whether what each index of the first axis, 0, or of the last, -1, selects is one piece
    of memory.
    """
    long = [k for k in axes_of(order, len(shape)) if shape[k] != 1]
    return shape[axis] == 1 or long[0] == axis % len(shape)


def turned(a: Any, order: str) -> Any:
    """An array with its axes as they are in memory: a view in C order of one in this order."""
    return a if order == "C" else a.transpose(axes_of(order, a.ndim))


def flattened(a: Any, order: str) -> Any:
    """The elements of an array one after the other in a memory order."""
    return turned(a, order).reshape(-1)


def turned_shape(shape: Sequence[int], order: str) -> tuple[int, ...]:
    """The shape of `turned`."""
    return tuple(shape[k] for k in axes_of(order, len(shape)))


def shaped(elements: Any, shape: Sequence[int], order: str) -> Any:
    """The array of a shape whose elements in a memory order these are."""
    if order == "C":
        return elements.reshape(shape)
    return turned_back(elements.reshape(turned_shape(shape, order)), order)


def turned_back(a: Any, order: str) -> Any:
    """The array whose `turned` this is."""
    return a if order == "C" else a.transpose(inverse(order, a.ndim))


def inverse(order: str, ndim: int) -> tuple[int, ...]:
    """The place of each axis among those of `axes_of`."""
    return tuple(int(k) for k in np.argsort(axes_of(order, ndim)))
