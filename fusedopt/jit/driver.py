"""Parts -> leaves -> tiles -> programs: csrc/driver.cpp, compiled by Numba."""

from __future__ import annotations

import functools
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..arrays.formats import SEGMENT, TILE
from ..programs import elements
from . import scalar_codecs
from .compiler import device, jit, kept
from .tiles import LANES

MAX_OPERANDS = 20
ARRAY, INPUT, SCRATCH, SUMS = range(4)

OPERAND = np.dtype(
    [
        # INPUT: comes with the step; SCRATCH: a tile that lives as long as its program; SUMS: lanes
        ("role", np.int64),
        ("data", np.uint64),  # of sums: their place among the partial ones
        ("aux", np.uint64),  # beside it
        ("decode", np.uint64),  # functions; 0: none, it has the compute type
        ("encode", np.uint64),
        ("bits", np.int64),  # of an element
        ("aux_bytes", np.int64),  # of a tile
        ("source", np.int64),  # the operand whose tile it stores; -1: its own
        ("key", np.uint64),  # of this step's random bits
    ]
)
"""One array of a leaf."""

STEP = np.dtype(
    [
        ("run", np.uint64),
        ("scalars", np.uint64),
        ("count", np.int64),
        ("operands", np.uint8, (MAX_OPERANDS,)),
        ("each", np.int64),  # bytes from one row's scalars to the next one's; 0: all have the same
    ]
)
"""One operation on a tile."""

LEAF = np.dtype(
    [
        ("start", np.int64),  # in the concatenation of all leaves
        ("elements", np.int64),
        ("operand", np.int64),  # its first
        ("operands", np.int64),  # their number
        ("step", np.int64),
        ("steps", np.int64),
        ("used", np.int64),  # operands, as bits
        ("written", np.int64),
        ("summed", np.int64),
        ("maxima", np.int64),  # those of `summed` that are no sums but maxima
        # Of rows that alone are touched, each with its place in the inputs; length 0: all are.
        ("row", np.int64),  # the first of these among all leaves'
        ("length", np.int64),  # elements of each
        ("by_row", np.int64),  # whether each of them has its own sums, and may have its own scalars
    ]
)


@intrinsic
def _call(typing: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at an address with integers and addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * len(arguments))
        function = builder.inttoptr(values[0], kind.as_pointer())
        builder.call(function, [builder.extract_value(values[1], k) for k in range(len(arguments))])
        return context.get_dummy_value()

    return types.void(address, arguments), generate


X86 = platform.machine().lower() in ("x86_64", "amd64")
CONTROL = 0x1F80 if X86 else 0
"""The floating-point environment of csrc/floating_point.hpp."""


@intrinsic
def _exchange_control(typing: Any, control: Any) -> Any:
    """Set this thread's floating-point environment and return the one that it had."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word, half = ir.IntType(64), ir.IntType(32)

        def call(name: str, result: Any, *arguments: Any) -> Any:
            kind = ir.FunctionType(result, [a.type for a in arguments])
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            return builder.call(function, arguments)

        if X86:
            place = cgutils.alloca_once(builder, half)
            pointer = builder.bitcast(place, cgutils.voidptr_t)
            call("llvm.x86.sse.stmxcsr", ir.VoidType(), pointer)
            own = builder.zext(builder.load(place), word)
            builder.store(builder.trunc(values[0], half), place)
            call("llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer)
            return own
        own = call("llvm.aarch64.get.fpcr", word)
        call("llvm.aarch64.set.fpcr", ir.VoidType(), values[0])
        return own

    return types.int64(types.int64), generate


_subkey = device(scalar_codecs.subkey)


@jit
def _at(operand: Any, element: Any, ahead: Any) -> Any:
    """Return the address of an element; inputs have it `ahead` further on."""
    if operand.role == INPUT:
        element += ahead
    return operand.data + np.uint64(element * operand.bits // 8)


@jit
def _run_step(step: Any, row: int, tile: Any, pointers: Any, n: int) -> None:
    for k in range(step.count):
        pointers[k] = tile[step.operands[k]]
    scalars = step.scalars + np.uint64(row * step.each)
    _call(step.run, (np.uint64(pointers.ctypes.data), scalars, np.uint64(n)))


@jit
def _run_tiles(
    leaf: Any, operands: Any, steps: Any, low: int, high: int, place: Any, workspace: Any
) -> None:
    """Elements [low, high) of a leaf: decode, the program, encode. low: of a tile, or of a row.

    place: how far on the inputs have them, and the number of their row among those touched.
    """
    ahead, row = place
    scratch, lanes, tile, pointers = workspace
    zero = np.uint64(0)
    for at in range(low, high, TILE):
        n = min(TILE, high - at)
        size = np.uint64(n)
        for k in range(leaf.operands):
            operand = operands[leaf.operand + k]
            if not (leaf.used >> k) & 1:
                continue
            own = np.uint64(scratch.ctypes.data) + np.uint64(k * TILE * 8)
            if operand.role == SCRATCH:
                tile[k] = own
            elif operand.role == SUMS:
                tile[k] = np.uint64(lanes.ctypes.data) + np.uint64(k * LANES * 8)
            elif operand.source >= 0:
                tile[k] = tile[operand.source]
            elif operand.decode != zero:
                tile[k] = own
                beside = operand.aux + np.uint64(at * operand.aux_bytes // TILE)
                _call(operand.decode, (_at(operand, at, ahead), beside, tile[k], size))
            else:
                tile[k] = _at(operand, at, ahead)
        for k in range(leaf.steps):
            _run_step(steps[leaf.step + k], row, tile, pointers, n)
        for k in range(leaf.operands):
            operand = operands[leaf.operand + k]
            if (leaf.written >> k) & 1 and operand.encode != zero:
                beside = operand.aux + np.uint64(at * operand.aux_bytes // TILE)
                key = _subkey(operand.key, np.uint64(at // TILE))
                _call(operand.encode, (tile[k], _at(operand, at, ahead), beside, size, key))


@jit
def _run_span(
    leaf: Any, operands: Any, steps: Any, low: int, high: int, place: Any, workspace: Any
) -> None:
    _, lanes, tile, pointers = workspace
    ahead, row = place
    in_place = leaf.steps == 1
    for k in range(leaf.operands):
        operand = operands[leaf.operand + k]
        if not (leaf.used >> k) & 1:
            continue
        tile[k] = _at(operand, low, ahead)
        if operand.role == SUMS:
            tile[k] = np.uint64(lanes.ctypes.data) + np.uint64(k * LANES * 8)
        if (operand.decode | operand.encode) != np.uint64(0):
            in_place = False
    if in_place:
        _run_step(steps[leaf.step], row, tile, pointers, high - low)
    else:
        _run_tiles(leaf, operands, steps, low, high, place, workspace)


@jit
def _turn(lanes: Any, by: int) -> None:
    """A tile's first element goes to the first lane, whichever is the turn of that element."""
    for _ in range(by % LANES):
        for k in range(MAX_OPERANDS):
            first = lanes[k, 0]
            for lane in range(LANES - 1):
                lanes[k, lane] = lanes[k, lane + 1]
            lanes[k, LANES - 1] = first


maximum = device(elements.maximum)


@jit
def _begin(leaf: Any, lanes: Any) -> None:
    """Set the lanes to what a sum, or a maximum, is of no elements."""
    lanes[:] = 0
    for k in range(leaf.operands):
        if (leaf.maxima >> k) & 1:
            lanes[k] = -np.inf


@jit
def _finish(leaf: Any, operands: Any, lanes: Any, partials: Any, segment: int) -> None:
    """Put the sums of a segment, of which -1 is none, in their places."""
    if segment < 0:
        return
    for k in range(leaf.operands):
        if (leaf.summed >> k) & 1:
            half = LANES // 2
            while half:
                for lane in range(half):
                    a, b = lanes[k, lane], lanes[k, lane + half]
                    lanes[k, lane] = maximum(a, b) if (leaf.maxima >> k) & 1 else a + b
                half //= 2
            partials[np.int64(operands[leaf.operand + k].data) + segment] = lanes[k, 0]
    _begin(leaf, lanes)


@jit
def _segments(elements: int) -> int:
    return (elements + SEGMENT - 1) // SEGMENT


@jit
def _run_summing(
    leaf: Any,
    operands: Any,
    steps: Any,
    low: int,
    high: int,
    place: Any,
    workspace: Any,
    partials: Any,
    segment: int,
) -> int:
    """A span, where the sums of `segment` have begun; that of the span's end comes back.

    Of a row that has its own sums, the span is the whole row.
    """
    lanes = workspace[1]
    origin = first = 0
    if leaf.by_row:
        origin, first = low, place[1] * _segments(leaf.length)
    at = low
    while at < high:
        inside = at - origin
        if first + inside // SEGMENT != segment:
            _finish(leaf, operands, lanes, partials, segment)
            segment = first + inside // SEGMENT
        stop = min(high, origin + (inside // SEGMENT + 1) * SEGMENT)
        _turn(lanes, inside)
        _run_span(leaf, operands, steps, at, stop, place, workspace)
        _turn(lanes, LANES - inside % LANES)
        at = stop
    return segment


@jit
def _run_leaf(
    leaf: Any,
    operands: Any,
    steps: Any,
    rows: Any,
    low: int,
    high: int,
    workspace: Any,
    partials: Any,
) -> None:
    length, segment = leaf.length, -1
    _begin(leaf, workspace[1])
    if not length:
        if leaf.summed:
            segment = _run_summing(
                leaf, operands, steps, low, high, (0, 0), workspace, partials, segment
            )
        else:
            _run_span(leaf, operands, steps, low, high, (0, 0), workspace)
    else:
        for k in range(low // length, high // length):
            row, source = rows[leaf.row + k]
            first, place = row * length, ((source - row) * length, k)
            if leaf.summed:
                segment = _run_summing(
                    leaf,
                    operands,
                    steps,
                    first,
                    first + length,
                    place,
                    workspace,
                    partials,
                    segment,
                )
            else:
                _run_span(leaf, operands, steps, first, first + length, place, workspace)
    _finish(leaf, operands, workspace[1], partials, segment)


@jit
def _cut(leaf: Any, rows: Any, position: Any) -> Any:
    """Cut a leaf at tiles, so that no tile is shared between two threads; or at rows,
    or on segments that are summed."""
    inside = min(max(position - leaf.start, 0), leaf.elements)
    if inside == leaf.elements:
        return inside
    length = leaf.length
    if not length:
        unit = SEGMENT if leaf.summed else TILE
        return inside // unit * unit
    k = inside // length
    while leaf.summed and not leaf.by_row and 0 < k < leaf.elements // length:
        before, after = rows[leaf.row + k - 1, 0], rows[leaf.row + k, 0]
        if after * length // SEGMENT != ((before + 1) * length - 1) // SEGMENT:
            break
        k += 1
    return k * length


def _run_part(
    leaves: Any, operands: Any, steps: Any, rows: Any, partials: Any, part: int, parts: int
) -> None:
    """Run one of `parts` equal parts of all elements of the leaves."""
    control = _exchange_control(CONTROL)
    workspace = (
        np.empty(MAX_OPERANDS * TILE, np.float64),
        np.empty((MAX_OPERANDS, LANES), np.float64),
        np.empty(MAX_OPERANDS, np.uint64),
        np.empty(MAX_OPERANDS, np.uint64),
    )
    last = leaves[leaves.size - 1]
    each, rest = divmod(last.start + last.elements, parts)
    start = part * each + min(part, rest)
    stop = start + each + (1 if part < rest else 0)
    for k in range(leaves.size):
        leaf = leaves[k]
        low, high = _cut(leaf, rows, start), _cut(leaf, rows, stop)
        if low < high:
            _run_leaf(leaf, operands, steps, rows, low, high, workspace, partials)
    _exchange_control(control)


@functools.cache
def run_part() -> Any:
    """run_part(leaves, operands, steps, rows, partials, part, parts), compiled."""
    tables = (types.Array(from_dtype(kind), 1, "C") for kind in (LEAF, OPERAND, STEP))
    more = types.Array(types.int64, 2, "C"), types.Array(types.float64, 1, "C")
    return kept([types.void(*tables, *more, types.intp, types.intp)], _run_part)
