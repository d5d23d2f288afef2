"""Check parameters and gradients on a device: see `fusedopt.arrays.checks`."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays import device_interface
from ...arrays.checks import EXPECTED, check_rule
from ...arrays.formats import DTYPES
from ...arrays.order import order_of
from ...arrays.rows import values_of
from ...arrays.trees import opened
from .arrays import DeviceArray

if TYPE_CHECKING:
    from ...rules.base import Rule


def _read(label: str, array: Any) -> tuple[device_interface.Description, np.dtype]:
    if isinstance(array, np.ndarray) or not device_interface.on_device(array):
        raise TypeError(
            f"{label}: expected an array on a CUDA device, got a {type(array).__name__} in the"
            " host's memory; move it, or take another backend with all arrays on the host"
        )
    if device_interface.library_of(array) in ("jax", "jaxlib"):
        raise TypeError(
            f"{label}: JAX's arrays cannot be written to; take CuPy's, PyTorch's or Numba's"
        )
    if isinstance(array, DeviceArray):
        strides = array.__cuda_array_interface__["strides"]
        d = device_interface.Description(
            array.address, array.shape, strides, array.dtype, array.device, array.named_stream,
            True, array.library,
        )  # fmt: skip
        return d, array.dtype
    try:
        d = device_interface.describe(array)
    except TypeError as error:
        raise TypeError(f"{label}: {error}") from error
    if d.dtype is None or d.dtype not in DTYPES:
        found = getattr(array, "dtype", d.dtype)
        raise TypeError(
            f"{label}: expected {EXPECTED}, got {found}; pass an array of one of these dtypes"
        )
    return d, next(dtype for dtype in DTYPES if dtype == d.dtype)


def _device_array(
    d: device_interface.Description, dtype: np.dtype, order: str, owner: Any
) -> DeviceArray:
    from .buffers import current_device

    device = current_device() if d.device is None else d.device
    return DeviceArray(d.address, d.shape, dtype, order, device, owner, d.library, d.stream)


def check_target(label: str, array: Any) -> DeviceArray:
    """An array that will be updated in place.

    Raises TypeError for another kind or dtype, ValueError where it is read-only, unaligned or not
    dense.
    """
    if isinstance(array, DeviceArray):
        return array
    d, dtype = _read(label, array)
    if not d.writeable:
        raise ValueError(f"{label}: is read-only, and is to be updated in place; pass a copy")
    if d.address % dtype.itemsize:
        raise ValueError(f"{label}: is not aligned in memory; pass a copy")
    order = order_of(d.shape, d.strides, dtype.itemsize)
    if not order:
        raise ValueError(
            f"{label}: is not dense (shape {d.shape}, strides {d.strides}), and a copy would be"
            " updated instead of it; pass a contiguous array, and copy it back"
        )
    return _device_array(d, dtype, order, array)


def check_input(label: str, array: Any) -> DeviceArray:
    """An array that will only be read, dense: itself, or a copy by its library.

    Raises TypeError for another kind or dtype, ValueError where it is not dense and its library is
    not known.
    """
    d, dtype = _read(label, array)
    order = order_of(d.shape, d.strides, dtype.itemsize)
    if order and not d.address % dtype.itemsize:
        return _device_array(d, dtype, order, array)
    dense = device_interface.relaid(array, d.library, "C")
    if dense is None:
        raise ValueError(f"{label}: is not dense (strides {d.strides}); pass a dense copy")
    return check_input(label, dense)


def check_parameter(label: str, array: Any, rule: Rule) -> DeviceArray:
    """A parameter that this rule can update; raises as `check_target`, and where it cannot."""
    a = check_target(label, array)
    check_rule(label, a, rule)
    return a


def check_apart(labels: Sequence[str], arrays: Sequence[DeviceArray]) -> None:
    """Raise ValueError where these arrays are not all on one device, or two share memory."""
    for label, a in zip(labels, arrays, strict=True):
        if a.device != arrays[0].device:
            raise ValueError(
                f"{label}: is on the device {a.device}, and {labels[0]} on {arrays[0].device}; give"
                " each device an optimizer of its own"
            )
    ranges = sorted((a.address, a.address + a.nbytes, k) for k, a in enumerate(arrays) if a.size)
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            x, y = sorted((first, second))
            raise ValueError(
                f"{labels[y]}: shares memory with {labels[x]}, so that one update would disturb the"
                " other; pass each array once, or a copy"
            )


class GradientChecks:
    """Checks of gradients against the arrays that a step writes, as on the host.

    See `fusedopt.arrays.checks.GradientChecks`.
    """

    def __init__(
        self,
        labels: Sequence[str],
        parameters: Sequence[DeviceArray],
        written: Sequence[Sequence[DeviceArray]],
        copies: Sequence[int] | None = None,
    ) -> None:
        self._labels, self._parameters = labels, parameters
        self._copies = copies or [0] * len(labels)
        ranges = (
            (a.address, a.address + a.nbytes, k, j)
            for k, group in enumerate(written)
            for j, a in enumerate(group)
        )
        self._ranges = sorted(r for r in ranges if r[0] < r[1])

    def check_unmoved(self) -> None:
        """Raise ValueError where a parameter has other memory than when it was handed over."""
        for label, p in zip(self._labels, self._parameters, strict=True):
            if not p.unmoved:
                raise ValueError(f"{label}: has moved in memory; call rebind(params)")

    def check_exclusive(self, inputs: Sequence[tuple[str, Any]], grads: int) -> None:
        """Raise ValueError where gradients that are to be zeroed are read-only or share memory."""
        given = [(label, check_target(label, g)) for label, g in inputs if g is not None]
        if given:
            check_apart([label for label, _ in given], [g for _, g in given])

    def opened(self, what: str, tree: Any) -> Any:
        """A tree as it was given, or what it was `Fixed` of."""
        return opened(tree)

    def copied(self, given: Sequence[Any], fitted: Sequence[DeviceArray | None]) -> list[int]:
        """Return the gradients of which the step has been given a copy."""
        pairs = enumerate(zip(given, fitted, strict=True))
        return [
            k
            for k, (g, taken) in pairs
            if taken is not None and values_of(taken).owner is not values_of(g)
        ]

    def gradient(self, k: int, label: str, g: Any) -> DeviceArray | None:
        """The k-th leaf's gradient in its parameter's layout: itself, or a copy by its library.

        None stays None. Raises TypeError for another kind or dtype, ValueError for another shape or
        device, or for memory that the step writes.
        """
        if g is None:
            return None
        d, dtype = _read(label, g)
        p = self._parameters[k]
        if d.shape != p.shape:
            raise ValueError(
                f"{label}: expected the shape {p.shape} of {self._labels[k]}, got {d.shape}"
            )
        self._check_range(label, d, dtype.itemsize)
        order = order_of(d.shape, d.strides, dtype.itemsize)
        if p.order != order or d.address % dtype.itemsize:
            g = device_interface.relaid(g, d.library, p.order)
            if g is None:
                raise ValueError(
                    f"{label}: expected the memory order {p.order} of {self._labels[k]}, got"
                    f" strides {d.strides}; pass a dense copy in that order"
                )
            d, dtype = _read(label, g)
        taken = _device_array(d, dtype, p.order, g)
        if taken.device != p.device:
            raise ValueError(
                f"{label}: is on the device {taken.device}, and {self._labels[k]} on {p.device};"
                " move it there"
            )
        return taken

    def check_apart(self, label: str, g: Any) -> None:
        """Raise ValueError where an input shares memory with what the step writes."""
        d, dtype = _read(label, g)
        self._check_range(label, d, dtype.itemsize)

    def _check_range(self, label: str, d: device_interface.Description, size: int) -> None:
        if 0 in d.shape:
            return
        strides = d.strides
        if strides is None:
            low, high = d.address, d.address + size * math.prod(d.shape)
        else:
            steps = [(n - 1) * s for n, s in zip(d.shape, strides, strict=True)]
            low = d.address + sum(s for s in steps if s < 0)
            high = d.address + sum(s for s in steps if s > 0) + size
        # Arrays that the step writes are apart, so only the last that begins before `high` counts.
        at = bisect_left(self._ranges, (high,)) - 1
        if at >= 0 and self._ranges[at][1] > low:
            _, _, k, j = self._ranges[at]
            p = self._labels[k]
            what = p if j == 0 else f"a state of {p}"
            if 0 < j <= self._copies[k]:
                what = "copy_out" + p.removeprefix("params")
            raise ValueError(
                f"{label}: shares memory with {what}, which this step writes; pass a copy"
            )
