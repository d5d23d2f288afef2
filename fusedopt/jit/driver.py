"""Parts -> leaves -> tiles -> programs: csrc/driver.cpp, compiled by Numba."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

from ..formats import TILE
from . import bits
from .compiler import device, jit, kept
from .kernels import LANES, SEGMENT

MAX_OPERANDS = 16
ARRAY, SCRATCH, SUMS = 0, 1, 2

OPERAND = np.dtype(
    [
        ("role", np.int64),  # SCRATCH: a tile that lives as long as a tile's program; SUMS: lanes
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
    ]
)
"""One operation on a tile."""

LEAF = np.dtype(
    [
        ("start", np.int64),  # in the concatenation of all leaves
        ("elements", np.int64),
        ("operand", np.int64),  # its first
        ("operands", np.int64),  # so many
        ("step", np.int64),
        ("steps", np.int64),
        ("used", np.int64),  # operands, as bits
        ("written", np.int64),
        ("summed", np.int64),
    ]
)


@intrinsic
def _call(typing: Any, address: Any, arguments: Any) -> Any:
    """Calls the C function at an address with integers and addresses."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * len(arguments))
        function = builder.inttoptr(values[0], kind.as_pointer())
        builder.call(function, [builder.extract_value(values[1], k) for k in range(len(arguments))])
        return context.get_dummy_value()

    return types.void(address, arguments), generate


_subkey = device(bits.subkey)


@jit
def _at(operand: Any, element: int) -> Any:
    return operand.data + np.uint64(element * operand.bits // 8)


@jit
def _run_step(step: Any, tile: Any, pointers: Any, n: int) -> None:
    for k in range(step.count):
        pointers[k] = tile[step.operands[k]]
    _call(step.run, (np.uint64(pointers.ctypes.data), step.scalars, np.uint64(n)))


@jit
def _run_tiles(leaf: Any, operands: Any, steps: Any, low: int, high: int, space: Any) -> None:
    """Elements [low, high) of a leaf: decode, the program, encode. low: the start of a tile."""
    scratch, lanes, tile, pointers = space
    zero = np.uint64(0)
    for at in range(low, high, TILE):
        n, index = min(TILE, high - at), at // TILE
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
                beside = operand.aux + np.uint64(index * operand.aux_bytes)
                _call(operand.decode, (_at(operand, at), beside, tile[k], size))
            else:
                tile[k] = _at(operand, at)
        for k in range(leaf.steps):
            _run_step(steps[leaf.step + k], tile, pointers, n)
        for k in range(leaf.operands):
            operand = operands[leaf.operand + k]
            if (leaf.written >> k) & 1 and operand.encode != zero:
                beside = operand.aux + np.uint64(index * operand.aux_bytes)
                key = _subkey(operand.key, np.uint64(index))
                _call(operand.encode, (tile[k], _at(operand, at), beside, size, key))


@jit
def _run_span(leaf: Any, operands: Any, steps: Any, low: int, high: int, space: Any) -> None:
    _, lanes, tile, pointers = space
    in_place = leaf.steps == 1
    for k in range(leaf.operands):
        operand = operands[leaf.operand + k]
        if not (leaf.used >> k) & 1:
            continue
        tile[k] = _at(operand, low)
        if operand.role == SUMS:
            tile[k] = np.uint64(lanes.ctypes.data) + np.uint64(k * LANES * 8)
        if (operand.decode | operand.encode) != np.uint64(0):
            in_place = False
    if in_place:
        _run_step(steps[leaf.step], tile, pointers, high - low)
    else:
        _run_tiles(leaf, operands, steps, low, high, space)


@jit
def _run_leaf(
    leaf: Any, operands: Any, steps: Any, low: int, high: int, space: Any, partials: Any
) -> None:
    if not leaf.summed:
        _run_span(leaf, operands, steps, low, high, space)
        return
    lanes = space[1]
    for start in range(low, high, SEGMENT):
        lanes[:] = 0
        _run_span(leaf, operands, steps, start, min(start + SEGMENT, high), space)
        for k in range(leaf.operands):
            if (leaf.summed >> k) & 1:
                half = LANES // 2
                while half:
                    for lane in range(half):
                        lanes[k, lane] += lanes[k, lane + half]
                    half //= 2
                place = np.int64(operands[leaf.operand + k].data)
                partials[place + start // SEGMENT] = lanes[k, 0]


@jit
def _cut(leaf: Any, position: Any) -> Any:
    """Cuts fall on tiles of their leaf, so that no tile is shared between two threads; or on
    segments of sums."""
    inside = min(max(position - leaf.start, 0), leaf.elements)
    unit = SEGMENT if leaf.summed else TILE
    return inside if inside == leaf.elements else inside // unit * unit


def _run_part(leaves: Any, operands: Any, steps: Any, partials: Any, part: int, parts: int) -> None:
    """One of `parts` equal parts of all elements of the leaves."""
    space = (
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
        low, high = _cut(leaf, start), _cut(leaf, stop)
        if low < high:
            _run_leaf(leaf, operands, steps, low, high, space, partials)


@functools.cache
def run_part() -> Any:
    """run_part(leaves, operands, steps, partials, part, parts), compiled."""
    tables = (types.Array(from_dtype(kind), 1, "C") for kind in (LEAF, OPERAND, STEP))
    partials = types.Array(types.float64, 1, "C")
    return kept([types.void(*tables, partials, types.intp, types.intp)], _run_part)
