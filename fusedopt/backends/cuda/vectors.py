"""Loads and stores of vectors at addresses, for kernels, and the largest number of several threads.

On the simulator by ctypes, and by barriers.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

import numpy as np
from llvmlite import ir

from .toolkit import SIMULATED

VECTOR_BYTES = 16
"""Bytes that one vector load or store moves."""

_FLOATS = {32: np.float32, 64: np.float64}

_SHIFTS = {16: (0, 16), 8: (0, 8, 16, 24), 4: (4, 0, 12, 8, 20, 16, 28, 24)}
"""Positions of codes in a 32-bit word by their bits; of two in a byte the first is high."""


def loader(bits: int, count: int) -> Any:
    """Return a kernel's function load(address) -> a tuple of `count` elements.

    Elements of 32 and 64 bits are floats, those of 16, 8 and 4 bits uint32 codes. Several elements
    are loaded up to 16 bytes at a time, and the address is a multiple of that; codes of 8 and 4
    bits come in whole 32-bit words.
    """
    return _simulated_loader(bits, count) if SIMULATED else _loader(bits, count)


def storer(bits: int, count: int) -> Any:
    """Return a kernel's function store(address, tuple of `count` elements): see `loader`."""
    return _simulated_storer(bits, count) if SIMULATED else _storer(bits, count)


def _simulated_loader(bits: int, count: int) -> Any:
    def load(address: int) -> Any:
        raw = ctypes.string_at(int(address), bits * count // 8)
        if bits in _FLOATS:
            return tuple(np.frombuffer(raw, _FLOATS[bits]))
        if bits == 4:
            return tuple(np.uint32(x) for byte in raw for x in (byte >> 4, byte & 15))
        return tuple(np.uint32(x) for x in np.frombuffer(raw, f"u{bits // 8}"))

    return load


def _simulated_storer(bits: int, count: int) -> Any:
    def store(address: int, elements: Any) -> None:
        if bits in _FLOATS:
            stored = np.array(elements, _FLOATS[bits])
        elif bits == 4:
            high, low = np.array(elements, np.uint8).reshape(-1, 2).T
            stored = high << 4 | low
        else:
            stored = np.array(elements, f"u{bits // 8}")
        ctypes.memmove(int(address), stored.tobytes(), bits * count // 8)

    return store


def _vector(bits: int, count: int) -> tuple[ir.Type, int, int]:
    """The type that is loaded at a time, its number of elements, and of words."""
    element = ir.IntType(bits) if bits < 32 else {32: ir.FloatType(), 64: ir.DoubleType()}[bits]
    if count == 1:
        return element, 1, 1
    size = 8 * min(VECTOR_BYTES, bits * count // 8)
    words = size // max(bits, 32)
    element = ir.IntType(32) if bits < 32 else element
    return ir.VectorType(element, words), size // bits, words


def _element_types(bits: int, count: int) -> Any:
    from numba.cuda import types

    kinds = {32: types.float32, 64: types.float64}
    return types.UniTuple(kinds.get(bits, types.uint32), count)


def _pointer(builder: Any, address: Any, kind: Any, offset: int) -> Any:
    moved = builder.add(address, ir.Constant(ir.IntType(64), offset))
    return builder.inttoptr(moved, ir.PointerType(kind, 1))  # 1: global memory


@functools.cache
def _loader(bits: int, count: int) -> Any:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    kind, each, words = _vector(bits, count)
    result, wide = _element_types(bits, count), ir.IntType(32)
    mask = ir.Constant(wide, (1 << bits) - 1) if bits < 32 else None

    def taken(builder: Any, value: Any) -> Any:
        if count == 1:
            yield builder.zext(value, wide) if bits < 32 else value
            return
        for k in range(words):
            word = builder.extract_element(value, ir.Constant(wide, k))
            if bits >= 32:
                yield word
            for shift in _SHIFTS.get(bits, ()):
                yield builder.and_(builder.lshr(word, ir.Constant(wide, shift)), mask)

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            elements = []
            for k in range(count // each):
                pointer = _pointer(builder, values[0], kind, VECTOR_BYTES * k)
                value = builder.load(pointer, align=bits * each // 8)
                elements += taken(builder, value)
            return context.make_tuple(builder, result, elements)

        return result(types.int64), generate

    return load


@functools.cache
def _storer(bits: int, count: int) -> Any:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    kind, each, _ = _vector(bits, count)
    given, wide = _element_types(bits, count), ir.IntType(32)

    def word(builder: Any, codes: Any) -> Any:
        shifts = [ir.Constant(wide, shift) for shift in _SHIFTS[bits]]
        return functools.reduce(builder.or_, map(builder.shl, codes, shifts))

    def packed(builder: Any, elements: Any) -> Any:
        if count == 1:
            return builder.trunc(elements[0], kind) if bits < 32 else elements[0]
        if bits < 32:
            held = 32 // bits
            groups = (elements[k : k + held] for k in range(0, len(elements), held))
            elements = [word(builder, codes) for codes in groups]
        value = ir.Constant(kind, ir.Undefined)
        for k, element in enumerate(elements):
            value = builder.insert_element(value, element, ir.Constant(wide, k))
        return value

    @intrinsic
    def store(typing: Any, address: Any, elements: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            all_ = [builder.extract_value(values[1], k) for k in range(count)]
            for k in range(count // each):
                value = packed(builder, all_[k * each : (k + 1) * each])
                pointer = _pointer(builder, values[0], kind, VECTOR_BYTES * k)
                builder.store(value, pointer, align=bits * each // 8)
            return context.get_dummy_value()

        return types.void(types.int64, given), generate

    return store


@functools.cache
def word_loader() -> Any:
    """load(address) -> the int64 there."""
    if SIMULATED:
        return lambda address: ctypes.c_int64.from_address(int(address)).value
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.load(_pointer(builder, values[0], ir.IntType(64), 0), align=8)

        return types.int64(types.int64), generate

    return load


@functools.cache
def word_storer() -> Any:
    """store(address, an int64)."""
    if SIMULATED:
        return lambda address, x: ctypes.memmove(int(address), np.int64(x).tobytes(), 8)
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    @intrinsic
    def store(typing: Any, address: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            builder.store(values[1], _pointer(builder, values[0], ir.IntType(64), 0), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return store


@functools.cache
def group_largest(lanes: int) -> Any:
    """Return a function that gives the largest number among `lanes` neighbouring threads.

    All of them call it with a number below 2^31, uint32.
    """
    if SIMULATED:
        return _simulated_largest(lanes)
    from numba import cuda

    half, u32, i32, every = lanes // 2, np.uint32, np.int32, 0xFFFFFFFF

    def largest(x: Any) -> Any:
        found = i32(x)
        distance = half
        while distance:
            found = max(found, cuda.shfl_xor_sync(every, found, distance))
            distance //= 2
        return u32(found)

    return largest


def _simulated_largest(lanes: int) -> Any:
    given: dict[int, Any] = {}

    def largest(x: Any) -> Any:
        thread: Any = threading.current_thread()
        given[thread.thread_id] = x
        thread.syncthreads()
        first = thread.thread_id // lanes * lanes
        found = max(given[k] for k in range(first, first + lanes))
        thread.syncthreads()  # before anybody goes on to the next
        return found

    return largest
