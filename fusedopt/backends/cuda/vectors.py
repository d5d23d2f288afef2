"""Loads and stores of vectors at addresses, for kernels; on the simulator by ctypes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from llvmlite import ir

from .toolkit import SIMULATED

VECTOR_BYTES = 16
"""What one vector load or store moves."""

_WORDS = {32: np.float32, 64: np.float64, 16: np.uint32}
"""What an element of so many bits is in a kernel."""


def loader(bits: int, count: int) -> Any:
    """load(address) -> a tuple of so many elements; those of 16 bits are uint32 codes. Where there
    are several, up to 16 bytes are loaded at a time, and the address is a multiple of that."""
    return _simulated_loader(bits, count) if SIMULATED else _loader(bits, count)


def storer(bits: int, count: int) -> Any:
    """store(address, a tuple of so many elements), as `loader` has them."""
    return _simulated_storer(bits, count) if SIMULATED else _storer(bits, count)


def _simulated_loader(bits: int, count: int) -> Any:
    stored, kind = np.dtype(np.uint16 if bits == 16 else _WORDS[bits]), _WORDS[bits]

    def load(address: int) -> Any:
        raw = ctypes.string_at(int(address), stored.itemsize * count)
        return tuple(kind(x) for x in np.frombuffer(raw, stored))

    return load


def _simulated_storer(bits: int, count: int) -> Any:
    stored = np.dtype(np.uint16 if bits == 16 else _WORDS[bits])

    def store(address: int, elements: Any) -> None:
        ctypes.memmove(int(address), np.array(elements, stored).tobytes(), stored.itemsize * count)

    return store


def _vector(bits: int, count: int) -> tuple[ir.Type, int, int]:
    """What is loaded at a time, how many elements that holds, and in how many words."""
    element = {16: ir.IntType(16), 32: ir.FloatType(), 64: ir.DoubleType()}[bits]
    if count == 1:
        return element, 1, 1
    size = 8 * min(VECTOR_BYTES, bits * count // 8)
    words = size // max(bits, 32)
    element = ir.IntType(32) if bits == 16 else element
    return ir.VectorType(element, words), size // bits, words


def _pointer(builder: Any, address: Any, kind: Any, offset: int) -> Any:
    moved = builder.add(address, ir.Constant(ir.IntType(64), offset))
    return builder.inttoptr(moved, ir.PointerType(kind, 1))  # 1: global memory


@functools.cache
def _loader(bits: int, count: int) -> Any:
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    kind, each, words = _vector(bits, count)
    result = types.UniTuple({16: types.uint32, 32: types.float32, 64: types.float64}[bits], count)
    wide, half = ir.IntType(32), ir.Constant(ir.IntType(32), 16)

    def taken(builder: Any, value: Any) -> Any:
        if count == 1:
            yield builder.zext(value, wide) if bits == 16 else value
            return
        for k in range(words):
            word = builder.extract_element(value, ir.Constant(wide, k))
            if bits == 16:
                yield builder.and_(word, ir.Constant(wide, 0xFFFF))
                yield builder.lshr(word, half)
            else:
                yield word

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
    given = types.UniTuple({16: types.uint32, 32: types.float32, 64: types.float64}[bits], count)
    wide, half = ir.IntType(32), ir.Constant(ir.IntType(32), 16)

    def packed(builder: Any, elements: Any) -> Any:
        if count == 1:
            return builder.trunc(elements[0], kind) if bits == 16 else elements[0]
        if bits == 16:
            pairs = zip(elements[::2], elements[1::2], strict=True)
            elements = [builder.or_(low, builder.shl(high, half)) for low, high in pairs]
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
