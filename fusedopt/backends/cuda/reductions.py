"""Kernels of sums of squares, of norms, and of what these decide."""

from __future__ import annotations

import functools
import math
import textwrap
from typing import Any

import numpy as np

from ...arrays.formats import FLOAT64, SEGMENT, Format
from ...jit.tiles import LANES
from ...programs.elements import squares
from .kernels import CODECS, THREADS, indented
from .toolkit import Kernel
from .vectors import loader, storer, word_loader, word_storer

GROUPS = 8
"""The number of segments of a block, each of which has a thread for each lane."""

REDUCED = """
    lanes[thread] = total
    cuda.syncthreads()
    half = LANES // 2
    while half:
        if lane < half:
            lanes[thread] += lanes[thread + half]
        cuda.syncthreads()
        half //= 2
    if lane == 0 and index < count:
        store(partials + 8 * index, (lanes[thread],))
"""

_SQUARES = """
def kernel(table, blocks, partials, count, scale):
    lanes = cuda.shared.array(THREADS, SUM)
    thread = cuda.threadIdx.x
    lane = thread % LANES
    index = cuda.blockIdx.x * GROUPS + thread // LANES
    total = SUM(0)
    if index < count:
        where = word(blocks + 8 * index)
        row = table + (where >> 32) * 16
        start = (where & 0xFFFFFFFF) * SEGMENT
        stop = min(start + SEGMENT, word(row))
        x = word(row + 8)
        i = start + lane
        while i + {ahead} < stop:
{loads}
{additions}
            i += {step}
        while i < stop:
            total += squares(T(decode(load(x + SIZE * i)[0])), scale)
            i += LANES
{reduced}
"""

_ROW_SQUARES = """
def kernel(parts, pairs, partials, count, scale):
    lanes = cuda.shared.array(THREADS, SUM)
    thread = cuda.threadIdx.x
    lane = thread % LANES
    index = cuda.blockIdx.x * GROUPS + thread // LANES
    total = SUM(0)
    if index < count:
        part = parts + 40 * index
        x = word(part)
        length = word(part + 8)
        start = word(part + 16)
        for k in range(word(part + 24), word(part + 32)):
            row = word(pairs + 16 * k)
            ahead = (word(pairs + 16 * k + 8) - row) * length
            begin = max(row * length, start)
            stop = min((row + 1) * length, start + SEGMENT)
            # Every element goes to the lane that it has in the whole gradient.
            i = begin + (lane + LANES - begin % LANES) % LANES
            while i < stop:
                total += squares(T(decode(load(x + SIZE * (i + ahead))[0])), scale)
                i += LANES
{reduced}
"""
UNROLLED = 8


@functools.cache
def squares_kernel(format: Format, dtype: np.dtype) -> Kernel:
    """Return the kernel of sums of squares of arrays, one sum for each segment.

    It takes (table, blocks, partial sums, number of segments, scale). A row of the table: elements,
    address.
    """
    wide = textwrap.indent
    source = _SQUARES.format(
        reduced=REDUCED,
        ahead=(UNROLLED - 1) * LANES,
        step=UNROLLED * LANES,
        loads=wide(indented(f"v{k} = load(x + SIZE * (i + {k * LANES}))[0]" for k in
                             range(UNROLLED)), " " * 8),
        additions=wide(indented(f"total += squares(T(decode(v{k})), scale)" for k in
                                 range(UNROLLED)), " " * 8),
    )  # fmt: skip
    return Kernel(source, 4, 1, dtype, _squares_names(format, dtype))


@functools.cache
def row_squares_kernel(format: Format, dtype: np.dtype) -> Kernel:
    """Return the kernel of sums of squares of rows, one sum for each segment of their parameter.

    It takes (parts, pairs, partial sums, number of parts, scale). A part: the address of the
    values, elements of a row, where the segment begins, the first of its pairs and the one behind
    the last. A pair: a row of the parameter, and that of the values.
    """
    names = _squares_names(format, dtype)
    return Kernel(_ROW_SQUARES.format(reduced=REDUCED), 4, 1, dtype, names)


def _squares_names(format: Format, dtype: np.dtype) -> dict[str, Any]:
    return {
        "__name__": __name__,
        "word": word_loader(),
        "load": loader(format.bits, 1),
        "store": storer(64, 1),
        "decode": CODECS[format.codec][0],
        "squares": squares,
        "T": dtype.type,
        "SUM": np.float64,
        "SIZE": format.bits // 8,
        "LANES": LANES,
        "SEGMENT": SEGMENT,
        "GROUPS": GROUPS,
        "THREADS": GROUPS * LANES,
    }


_TOTALS = """
def kernel(table, sums):
    tile = cuda.shared.array(THREADS, SUM)
    thread = cuda.threadIdx.x
    row = table + 16 * cuda.blockIdx.x
    partials = word(row)
    count = word(row + 8)
    total = SUM(0)
    start = 0
    while start < count:
        if start + thread < count:
            tile[thread] = load(partials + 8 * (start + thread))[0]
        cuda.syncthreads()
        if thread == 0:
            for k in range(min(THREADS, count - start)):
                total += tile[k]
        cuda.syncthreads()
        start += THREADS
    if thread == 0:
        store(sums + 8 * cuda.blockIdx.x, (total,))
"""


@functools.cache
def totals_kernel() -> Kernel:
    """Sum up each leaf's partial sums in index order, a block for each: (table, sums). A row of
    the table: the address of a leaf's partial sums, and how many there are."""
    return Kernel(_TOTALS, 2, 0, FLOAT64, _float64_names())


def _float64_names() -> dict[str, Any]:
    return {
        "word": word_loader(),
        "load": loader(64, 1),
        "store": storer(64, 1),
        "SUM": np.float64,
        "THREADS": THREADS,
    }


# ---------------------------------------------------------------- the norm, and what it decides

BINS = 68
"""Words of 32 bits, together as long as the range of a float64, with room for carries."""

_GUARD = """
def kernel(table, sums, count, limits, norms, control, kept, told, number, unscaled):
    bins = cuda.shared.array(BINS, WORD)
    flags = cuda.shared.array(1, WORD)
    thread = cuda.threadIdx.x
    for m in range(norms):
        k = thread
        while k < BINS:
            bins[k] = 0
            k += THREADS
        if thread == 0:
            flags[0] = 0
        cuda.syncthreads()
        i = thread
        while i < count:
            if word(table + 16 * i) == m:
                bits = word(sums + 8 * i) & 0x7FFFFFFFFFFFFFFF
                exponent = bits >> 52
                mantissa = bits & 0xFFFFFFFFFFFFF
                if exponent == 2047:
                    cuda.atomic.max(flags, 0, 2 if mantissa else 1)
                else:
                    if exponent:
                        mantissa |= 0x10000000000000
                        exponent -= 1
                    low = (mantissa & 0xFFFFFFFF) << (exponent & 31)
                    high = (mantissa >> 32) << (exponent & 31)
                    k = exponent >> 5
                    cuda.atomic.add(bins, k, low & 0xFFFFFFFF)
                    cuda.atomic.add(bins, k + 1, (low >> 32) + (high & 0xFFFFFFFF))
                    cuda.atomic.add(bins, k + 2, high >> 32)
            i += THREADS
        cuda.syncthreads()
        if thread == 0:
            norm = NAN if flags[0] == 2 else INFINITE
            if flags[0] == 0:
                norm = sqrt(rounded(bins)) * unscaled
            store(told + 16 * m, (norm,))
        cuda.syncthreads()
    if thread == 0:
        stopped = word(control) != 0
        finite = True
        for m in range(norms):
            if not load(told + 16 * m)[0] < INFINITE:
                finite = False
        flags[0] = 0
        if not stopped and not finite:
            flags[0] = 1
            store_word(control, number)
        for m in range(norms):
            norm = load(told + 16 * m)[0]
            limit = load(limits + 8 * m)[0]
            scale = limit / norm if norm > limit else ONE
            if stopped or not finite:
                scale = NAN
            store(told + 16 * m + 8, (scale,))
            store(control + FACTORS + 16 * m, (unscaled * scale,))
            store32(control + FACTORS + 16 * m + 8, (SINGLE(unscaled * scale),))
    cuda.syncthreads()
    if flags[0]:
        i = thread
        while i < count:
            store(kept + 8 * word(table + 16 * i + 8), (load(sums + 8 * i)[0],))
            i += THREADS
"""

FACTORS = 16
"""Bytes of the control block before its factors."""


def rounded(bins: Any) -> Any:
    """The number that stands in bins, rounded once: no order of what was added shows."""
    carry = 0
    for k in range(BINS):
        value = bins[k] + carry
        bins[k] = value & 0xFFFFFFFF
        carry = value >> 32
    top = BINS - 1
    while top > 2 and bins[top] == 0:
        top -= 1
    rest = 0
    for k in range(top - 2):
        if bins[k] != 0:
            rest = 1
    high = bins[top] << 20 | bins[top - 1] >> 12
    low = (bins[top - 1] & 0xFFF) << 33 | bins[top - 2] << 1 | rest
    # Both are exact, and so is the larger one's scaling: only the sum is rounded.
    total = np.float64(high) * 2.0**45 + np.float64(low)
    exponent = 32 * top - 64 - 1075
    half = exponent // 2
    return total * power(half) * power(exponent - half)


def power(exponent: Any) -> Any:
    """2 to a power, of normal numbers."""
    return np.int64((np.int64(exponent) + 1023) << 52).view(np.float64)


@functools.cache
def guard_kernel() -> Kernel:
    """Norms from leaves' sums, and the factors on the gradients of one step, in one block.

    Words: a table with a row for each leaf (its norm, its place among all), the leaves' sums, how
    many, limits, how many norms, the control block, where to keep the sums, what is told, the
    step's number. Scalar: the inverse of the gradients' scale. The control block: the number of the
    first step that found a norm that was not finite, 0 as long as there was none, and from FACTORS
    on, for each norm, its factor as float64 and as float32, 16 bytes apart: NaN where the step is
    not to be taken, because its own norm or one before is not finite. kept: float64 by place, the
    sums of that first step. told: for each norm itself and its clip scale, or NaN.
    """
    names = {
        **_float64_names(),
        "WORD": np.int64,
        "BINS": BINS,
        "FACTORS": FACTORS,
        "SINGLE": np.float32,
        "ONE": 1.0,
        "NAN": math.nan,
        "INFINITE": math.inf,
        "rounded": rounded,
        "sqrt": math.sqrt,
        "store32": storer(32, 1),
        "store_word": word_storer(),
    }
    return Kernel(_GUARD, 9, 1, FLOAT64, names)
