"""Tile functions and codecs: what csrc/kernels.cpp and csrc/codecs.hpp compile, from Python."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..arrays.formats import FLOAT64, Format
from ..programs import elements
from ..programs.program import loop_lines
from . import scalar_codecs
from .block_codecs import BLOCKS, element_functions, negative_bits, positive_bits, scaling
from .compiler import DECODE, ENCODE, TILE_FUNCTION, entry

# ---------------------------------------------------------------- operations


@functools.cache
def rule_tile(
    element: Any, states: int, written: int, scalars: int, mode: str, dtype: np.dtype
) -> Any:
    """A rule's tile function: (parameter, gradient, states, output of the peek modes)."""
    peek = mode.startswith("peek")
    names = ["p", "g", *(f"s{k}" for k in range(states)), *["out"] * peek]
    results = ["delta", *(f"n{k}" for k in range(written))]
    arguments = [
        "w",
        "gradient",
        *(f"s{k}[i]" for k in range(states)),
        *(f"c{k}" for k in range(scalars)),
    ]
    gradient, before, after = loop_lines(mode, "out[i]" if peek else "p[i]")
    stores = [] if peek else [f"s{k}[i] = normal_or_zero(n{k})" for k in range(written)]
    body = [
        "w = p[i]",
        "gradient = factor * g[i]",
        gradient,
        before,
        f"{', '.join(results)} = element({', '.join(arguments)})",
        *stores,
        after,
    ]
    return _tile(names, ["factor", "decay", *(f"c{k}" for k in range(scalars))], body, element,
                 dtype)  # fmt: skip


@functools.cache
def other_tile(element: Any, operands: int, scalars: int, state: bool, dtype: np.dtype) -> Any:
    """The tile function of an operation that is no rule: it writes its first operand.

    state: as states are stored.
    """
    names = [f"x{k}" for k in range(operands)]
    constants = [f"c{k}" for k in range(scalars)]
    value = f"element({', '.join([*(f'{name}[i]' for name in names), *constants])})"
    body = [f"x0[i] = normal_or_zero({value})" if state else f"x0[i] = {value}"]
    return _tile(names, constants, body, element, dtype)


LANES = 16
"""Lanes of a sum: see csrc/table.h."""

_SUM = """
def entry(operands, scalars, n):
    lanes = carray(operands[0], LANES, f64)
    sums = np.empty(LANES, f64)
    for lane in range(LANES):
        sums[lane] = lanes[lane]
{unpacked}
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            sums[lane] += element({there})
    for lane in range(n - whole):
        sums[lane] += element({rest})
    for lane in range(LANES):
        lanes[lane] = sums[lane]
"""


@functools.cache
def sum_tile(element: Any, operands: int, scalars: int, dtype: np.dtype) -> Any:
    """The tile function of a sum: (its lanes, what it sums over)."""
    names, constants = [f"x{k}" for k in range(1, operands)], [f"c{k}" for k in range(scalars)]
    lines = _unpacked(names, constants, first=1)
    there, rest = (
        ", ".join([*(f"{name}[{at} + lane]" for name in names), *constants])
        for at in ("i", "whole")
    )
    source = _SUM.format(
        unpacked="\n".join(f"    {line}" for line in lines), there=there, rest=rest
    )
    namespace = {"element": element, "T": dtype.type, "f64": np.float64, "np": np, "LANES": LANES}
    return entry(TILE_FUNCTION, source, namespace)


_MEASURE = """
def entry(operands, scalars, n):
{unpacked}
    sums = np.empty((SUMS, LANES), f64)
    for k in range(SUMS):
        lanes = carray(operands[k], LANES, f64)
        for lane in range(LANES):
            sums[k, lane] = lanes[lane]
    for first in range(0, n, LANES):
        for lane in range(min(LANES, n - first)):
            i = first + lane
{body}
    for k in range(SUMS):
        lanes = carray(operands[k], LANES, f64)
        for lane in range(LANES):
            lanes[lane] = sums[k, lane]
"""


@functools.cache
def measure_tile(
    element: Any, sums: int, maxima: int, states: int, scalars: int, mode: str, dtype: np.dtype
) -> Any:
    """The tile function of what a rule measures: (lanes of each sum, parameter, gradient, states).

    maxima: how many of the sums, the last ones, are maxima. All that the element sees is float64;
    the gradient is made in the compute type, as for the rule.
    """
    names = ["p", "g", *(f"s{k}" for k in range(states))]
    constants = [f"c{k}" for k in range(scalars)]
    operands = ["w", "gradient", *(f"s{k}[i]" for k in range(states)), *constants]
    gradient, before, _ = loop_lines(mode, "")
    body = [
        "w = p[i]",
        "gradient = factor * g[i]",
        gradient,
        before,
        f"{', '.join(f'a{k}' for k in range(sums))}, = element("
        f"{', '.join(f'f64({name})' for name in operands)})",
        *(f"sums[{k}, lane] += a{k}" for k in range(sums - maxima)),
        *(f"sums[{k}, lane] = maximum(sums[{k}, lane], a{k})" for k in range(sums - maxima, sums)),
    ]
    unpacked = _unpacked(names, ["factor", "decay", *constants], first=sums)
    source = _MEASURE.format(
        unpacked="\n".join(f"    {line}" for line in unpacked),
        body="\n".join(f"            {line}" for line in body if line),
    )
    namespace = {"element": element, "T": dtype.type, "f64": np.float64, "np": np}
    namespace |= {"maximum": elements.maximum, "LANES": LANES, "SUMS": sums}
    return entry(TILE_FUNCTION, source, namespace)


def _unpacked(names: list[str], scalars: list[str], first: int = 0) -> list[str]:
    return [
        *(f"{name} = carray(operands[{k}], n, T)" for k, name in enumerate(names, first)),
        f"constants = carray(scalars, {len(scalars)}, T)",
        *(f"{name} = constants[{k}]" for k, name in enumerate(scalars)),
    ]


def _tile(names: list[str], scalars: list[str], body: list[str], element: Any, dtype: Any) -> Any:
    lines = [
        *_unpacked(names, scalars),
        "for i in range(n):",
        *(f"    {line}" for line in body if line),
    ]
    source = "def entry(operands, scalars, n):\n" + "".join(f"    {line}\n" for line in lines)
    namespace = {
        "element": element,
        "T": dtype.type,
        "normal_or_zero": normal_or_zero_of(dtype),
    }
    return entry(TILE_FUNCTION, source, namespace)


@functools.cache
def normal_or_zero_of(dtype: np.dtype, least: float | None = None) -> Any:
    """States below the smallest normal number become zero."""
    smallest = np.finfo(dtype).smallest_normal if least is None else dtype.type(least)
    zero = dtype.type(0)

    def normal_or_zero(x: Any) -> Any:
        return zero if abs(x) < smallest else x

    return normal_or_zero


# ---------------------------------------------------------------- codecs

_PLAIN: dict[str, tuple[Any, Any, Any]] = {
    "float32": (np.float32, scalar_codecs.decode_float32, scalar_codecs.encode_float32),
    "float64": (np.float64, scalar_codecs.decode_float64, scalar_codecs.encode_float64),
    "bfloat16": (np.uint16, scalar_codecs.decode_bfloat16, scalar_codecs.encode_bfloat16),
    "float16": (np.uint16, scalar_codecs.decode_float16, scalar_codecs.encode_float16),
    "bfloat16_stochastic": (
        np.uint16,
        scalar_codecs.decode_bfloat16,
        scalar_codecs.stochastic_bfloat16,
    ),
    "float16_stochastic": (
        np.uint16,
        scalar_codecs.decode_float16,
        scalar_codecs.stochastic_float16,
    ),
}
_PAIRS: dict[str, tuple[Any, Any]] = {
    "split16": (scalar_codecs.decode_split16, scalar_codecs.encode_split16),
    "kahan": (scalar_codecs.decode_kahan, scalar_codecs.encode_kahan),
}

_DECODE_EACH = """
def entry(data, aux, tile, n):
    codes, x = carray(data, n, S), carray(tile, n, T)
    for i in range(n):
        x[i] = decode(codes[i])
"""
_ENCODE_EACH = """
def entry(tile, data, aux, n, key):
    x, codes = carray(tile, n, T), carray(data, n, S)
    for i in range(n):
        codes[i] = encode(prepared(x[i]), {random})
"""
_DECODE_PAIRS = """
def entry(data, aux, tile, n):
    high, low, x = carray(data, n, S), carray(aux, n, S), carray(tile, n, T)
    for i in range(n):
        x[i] = decode(high[i], low[i])
"""
_ENCODE_PAIRS = """
def entry(tile, data, aux, n, key):
    x, high, low = carray(tile, n, T), carray(data, n, S), carray(aux, n, S)
    for i in range(n):
        high[i], low[i] = encode(x[i])
"""
_ZERO = """
def entry(tile, data, aux, n, key):
    codes = carray(data, n, S)
    for i in range(n):
        codes[i] = S(0)
"""
_DECODE_BLOCKS = """
def entry(data, aux, tile, n):
    codes, x = carray(data, (n * BITS + 7) // 8, S), carray(tile, n, T)
    scales = carray(aux, (n + BLOCK - 1) // BLOCK, f32)
    for k in range(scales.size):
        low, high, scale = k * BLOCK, min(k * BLOCK + BLOCK, n), scales[k]
        if BITS == 8:
            for i in range(low, high):
                x[i] = decode(codes[i], scale)
        else:
            for i in range(low // 2, high // 2):
                x[2 * i] = decode(codes[i] >> u8(4), scale)
                x[2 * i + 1] = decode(codes[i] & u8(15), scale)
            if high % 2:
                x[high - 1] = decode(codes[high // 2] >> u8(4), scale)
"""
_ENCODE_BLOCKS = """
def entry(tile, data, aux, n, key):
    x, codes = carray(tile, n, T), carray(data, (n * BITS + 7) // 8, S)
    scales = carray(aux, (n + BLOCK - 1) // BLOCK, f32)
    for k in range(scales.size):
        low, high = k * BLOCK, min(k * BLOCK + BLOCK, n)
        positive = negative = N0
        for i in range(low, high):
            positive = max(positive, positive_bits(x[i]))
            negative = max(negative, negative_bits(x[i]))
        live, scales[k], factor = scaled(positive, negative)
        if not live:
            for i in range(low * BITS // 8, (high * BITS + 7) // 8):
                codes[i] = ZERO
            continue
        if BITS == 8:
            for i in range(low, high):
                codes[i] = encode(f32(x[i]), factor, key, i)
        else:
            for i in range(low // 2, high // 2):
                first = encode(f32(x[2 * i]), factor, key, 2 * i)
                codes[i] = first << FOUR | encode(f32(x[2 * i + 1]), factor, key, 2 * i + 1)
            if high % 2:
                last = encode(f32(x[high - 1]), factor, key, high - 1)
                codes[high // 2] = last << FOUR | FILL
"""


def _unchanged(x: Any) -> Any:
    return x


@functools.cache
def decoder(format: Format, dtype: np.dtype) -> Any:
    """Read a tile of a format into one of the compute type."""
    codec = format.codec.removesuffix("_stochastic")
    if codec in _PAIRS:
        decode = _PAIRS[codec][0]
        return entry(DECODE, _DECODE_PAIRS, {"S": np.uint16, "T": dtype.type, "decode": decode})
    if codec in _PLAIN:
        S, decode, _ = _PLAIN[codec]
        return entry(DECODE, _DECODE_EACH, {"S": S, "T": dtype.type, "decode": decode})
    b = BLOCKS[codec]
    decode, _, _ = element_functions(b)
    constants = {"S": np.uint8, "T": dtype.type, "f32": np.float32, "u8": np.uint8}
    constants |= {"BITS": b.bits, "BLOCK": b.block}
    return entry(DECODE, _DECODE_BLOCKS, {**constants, "decode": decode})


@functools.cache
def encoder(format: Format, dtype: np.dtype, copy: bool = False) -> Any:
    """Store a tile of the compute type in a format; copy: as the copy of a parameter."""
    codec = format.codec
    if codec in _PAIRS:
        encode = _PAIRS[codec][1]
        return entry(ENCODE, _ENCODE_PAIRS, {"S": np.uint16, "T": dtype.type, "encode": encode})
    if codec in _PLAIN:
        S, _, encode = _PLAIN[codec]
        # Doubles that are denormal floats; what is denormal in the compute type is gone already.
        keep = copy or dtype != FLOAT64
        prepared = _unchanged if keep else normal_or_zero_of(dtype, _NORMAL)
        random = "random_bits(key, i)" if format.random else "u32(0)"
        namespace = {"S": S, "T": dtype.type, "encode": encode, "prepared": prepared}
        namespace |= {"random_bits": scalar_codecs.random_bits, "u32": np.uint32}
        return entry(ENCODE, _ENCODE_EACH.format(random=random), namespace)
    return entry(ENCODE, _ENCODE_BLOCKS, _block_namespace(codec, dtype))


_NORMAL = float(np.finfo(np.float32).smallest_normal)


def _block_namespace(codec: str, dtype: np.dtype) -> dict[str, Any]:
    b = BLOCKS[codec.removesuffix("_stochastic")]
    _, nearest, stochastic = element_functions(b)
    return {
        "S": np.uint8,
        "T": dtype.type,
        "f32": np.float32,
        "BITS": b.bits,
        "BLOCK": b.block,
        "N0": np.uint32(0),
        "FOUR": np.uint32(4),
        "ZERO": np.uint8(b.zero),
        "FILL": np.uint32(b.zero & 15),
        "positive_bits": positive_bits,
        "negative_bits": negative_bits,
        "scaled": scaling(b),
        "encode": stochastic if codec.endswith("_stochastic") else nearest,
    }


@functools.cache
def zeroer(dtype: np.dtype) -> Any:
    """Store zeros in a gradient of this dtype."""
    return entry(ENCODE, _ZERO, {"S": np.dtype(f"u{dtype.itemsize}").type})
