"""Gradients of some rows: their checks, the sums of rows that come twice, and rows of tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...arrays import device_interface
from ...arrays.formats import PLAIN_OF, TILE, Format, compute_dtype
from ...arrays.rows import Rows, UniqueRows, check_indices
from .arrays import DeviceArray
from .buffers import Memory, on_device, wait_for
from .checks import check_input
from .kernels import CODECS, THREADS, Variant
from .launching import Place, uploaded
from .toolkit import Kernel
from .vectors import VECTOR_BYTES, loader, storer, word_loader


def unique_rows(label: str, rows: Rows, p: DeviceArray) -> UniqueRows:
    """`arrays.rows.unique_rows` on a device.

    Indices may be an ndarray or lie on the device, which is waited for then; values lie on the
    device.
    """
    indices = check_indices(f"{label}.indices", _on_host(rows.indices), p.shape)
    values = check_input(f"{label}.values", rows.values)
    if not values.flags.c_contiguous:
        dense = device_interface.relaid(rows.values, values.library, "C")
        if dense is None:
            raise ValueError(f"{label}.values: expected C order; pass a dense copy in that order")
        values = check_input(f"{label}.values", dense)
    expected = (indices.size, *p.shape[1:])
    if values.shape != expected:
        raise ValueError(
            f"{label}.values: expected the shape {expected}, for {indices.size} indices and rows"
            f" of a parameter of shape {p.shape}; got {values.shape}"
        )
    if values.device != p.device:
        raise ValueError(
            f"{label}.values: is on the device {values.device}, and its parameter on {p.device};"
            " move it there"
        )
    found, places, counts = np.unique(indices, return_index=True, return_counts=True)
    if found.size < indices.size:
        values = _added(indices, values, counts, p)
        places = np.arange(found.size)
    there: Any = values
    return UniqueRows(found, places.astype(np.int64), there)


def _on_host(indices: Any) -> Any:
    if isinstance(indices, np.ndarray) or not device_interface.on_device(indices):
        return indices
    if hasattr(indices, "get"):  # of CuPy
        return indices.get()
    if hasattr(indices, "cpu"):  # of PyTorch
        return indices.cpu().numpy()
    return indices.copy_to_host() if hasattr(indices, "copy_to_host") else indices


_ADDED = """
def kernel(values, order, bounds, sums, length):
    row = cuda.blockIdx.x
    first = word(bounds + 8 * row)
    last = word(bounds + 8 * row + 8)
    i = cuda.threadIdx.x
    while i < length:
        total = T(decode(load(values + SIZE * (word(order + 8 * first) * length + i))[0]))
        for k in range(first + 1, last):
            total += T(decode(load(values + SIZE * (word(order + 8 * k) * length + i))[0]))
        store(sums + WIDE * (row * length + i), (total,))
        i += THREADS
"""


@functools.cache
def added_kernel(format: Format, dtype: np.dtype) -> Kernel:
    """The sums of rows of equal indices, in order of appearance, a block for each: (values, the
    places of the rows by index, where each sum begins there, the sums, elements of a row)."""
    namespace = {
        "word": word_loader(),
        "load": loader(format.bits, 1),
        "store": storer(8 * dtype.itemsize, 1),
        "decode": CODECS[format.codec][0],
        "T": dtype.type,
        "SIZE": format.bits // 8,
        "WIDE": dtype.itemsize,
        "THREADS": THREADS,
    }
    return Kernel(_ADDED, 5, 0, dtype, namespace)


def _added(
    indices: np.ndarray, values: DeviceArray, counts: np.ndarray, p: DeviceArray
) -> DeviceArray:
    """The sums of the rows of equal indices, in the type that the parameter is computed in."""
    dtype, stream = compute_dtype(p.dtype), p.current_stream
    length = math.prod(values.shape[1:])
    with on_device(p.device):
        order = uploaded(np.argsort(indices, kind="stable").astype(np.int64), stream)
        bounds = uploaded(np.concatenate(([0], np.cumsum(counts))).astype(np.int64), stream)
        memory = Memory.reused(counts.size * length * dtype.itemsize, stream)
        memory.written_on, other = stream, values.stream
        wait_for(stream, other)
        words = (values.address, order.address, bounds.address, memory.address, length)
        kernel = added_kernel(PLAIN_OF[values.dtype], dtype)
        kernel.launch(counts.size, THREADS, (p.device, stream), words)
        wait_for(other, stream)
    return values.like(memory.address, dtype, memory, (counts.size, *values.shape[1:]))


# ---------------------------------------------------------------- tables


def table_rows(
    variant: Variant,
    places: Mapping[str, Place],
    numbers: Mapping[str, np.ndarray],
    length: int,
    first_tile: int = 0,
) -> list[list[int]]:
    """A row of a launch's table for each row of a leaf that is touched.

    places: of the leaf's arrays. numbers: of the touched rows, under the name of an array that has
    them elsewhere, or "p". length: elements of a row. first_tile: see `RandomKey`.
    """
    rows = numbers["p"]
    words, aligned = [], np.ones(rows.size, bool)
    for name, format in variant.arrays:
        steps = [length * format.bits // 8]
        if format.quantized:
            steps.append(4 * length // format.block)
        elif format.aux_dtype is not None:
            steps.append(length * format.aux_dtype.itemsize)
        place, number = places[name], numbers.get(name, rows)
        own = [word + number * step for word, step in zip(place.words, steps, strict=False)]
        for addresses in own:
            aligned &= addresses % VECTOR_BYTES == 0
        words += own + [np.full(rows.size, word) for word in place.words[len(steps) :]]
    flags = 2 * (first_tile + rows * length // TILE) + aligned
    table = np.stack([np.full(rows.size, length), flags, *words], axis=1)
    found: list[list[int]] = table.tolist()
    return found
