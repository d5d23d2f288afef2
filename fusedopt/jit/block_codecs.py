"""Codecs of blocks that share a scale: csrc/codecs.hpp in Python, as `bits` has the others.

Numbers are uint32; a negative sign is the mask of all bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy import float32 as f32
from numpy import uint32 as u32

from .scalar_codecs import (
    HALF,
    INFINITE,
    MAGNITUDE,
    N0,
    N1,
    N8,
    NOT_A_NUMBER,
    SIGN,
    Bits,
    Float,
    bits_of,
    float_of,
    random_bits,
    truncated,
    whole,
)

ALL = u32(0xFFFFFFFF)
ZERO, ONE, DRAW = f32(0), f32(1), f32(2.0**-16)


class Block(NamedTuple):
    """The way in which a block format numbers its values, and stores numbers and signs.

    bits, block: as in the formats. zero: the byte of zeros. least, most: numbers, and largest,
    opposite, smallest: values, as in `formats.Blocks`.
    """

    bits: int
    block: int
    zero: int
    least: int
    most: int
    largest: float
    opposite: float
    smallest: float
    number: Callable[..., Any]
    value: Callable[..., Any]
    code: Callable[..., Any]
    number_of: Callable[..., Any]


def plain_code(number: Bits, negative: Bits) -> Bits:
    return number


def plain_number_of(code: Bits) -> tuple[Bits, Bits]:
    return u32(code), N0


# ---------------------------------------------------------------- floats of eight bits

ROUND20, N20, N7 = u32(0x7FFFF), u32(20), u32(7)
OFFSET43, REBIAS43, LEAST43 = u32(120 << 3), u32(120 << 23), f32(2.0**-6).view(u32)
SHIFTER43, SPACING43 = f32(16384), f32(2.0**-9)
SHIFTER43_BITS, SIGN8, MAGNITUDE8 = SHIFTER43.view(u32), u32(0x80), u32(0x7F)
OFFSET53 = u32((142 << 3) - 248)


def rounded20(bits: Bits) -> Bits:
    """A float's bits rounded to three of mantissa."""
    return u32(u32(bits + ROUND20 + ((bits >> N20) & N1)) >> N20)


def e4m3_number(y: Float) -> Bits:
    magnitude = bits_of(y)
    normal = u32(rounded20(magnitude) - OFFSET43)
    denormal = u32(bits_of(y + SHIFTER43) - SHIFTER43_BITS)
    return denormal if magnitude < LEAST43 else normal


def e4m3_value(number: Bits) -> Any:
    normal = float_of(u32(number << N20) + REBIAS43)
    return whole(number) * SPACING43 if number < N8 else normal


def e4m3_code(number: Bits, negative: Bits) -> Bits:
    return u32(number | (negative & SIGN8))


def e4m3_number_of(code: Bits) -> tuple[Bits, Bits]:
    wide = u32(code)
    return u32(wide & MAGNITUDE8), u32(N0 - (wide >> N7))


def e5m3_number(y: Float) -> Bits:
    near = rounded20(bits_of(y))
    return u32(near - OFFSET53) if near > OFFSET53 else N0


def e5m3_value(number: Bits) -> Any:
    return f32(0) if number == N0 else float_of(u32(number + OFFSET53) << N20)


# ---------------------------------------------------------------- dynamic maps

MANTISSA, ONE_BITS = u32(0x7FFFFF), ONE.view(u32)
NINTH, NINE_TENTHS, EIGHT_TENTHS = f32(1.0 / 9.0), f32(0.9), f32(0.8)
SIXTEEN, SIXTEENTH, N16 = f32(16), f32(0.0625), u32(16)


def dynamic(first: int, top: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The places in the map of decades `first` to `top` of magnitudes up to 1, and the way back."""
    above = range(first + 1, top + 1)
    thresholds = tuple(f32(10.0 ** (i - top) * (0.1 + 0.18 / 2.0**i)) for i in above)
    slopes = tuple(f32(2.0**i * 10.0 ** (top - i) / 0.9) for i in range(first, top + 1))
    tens = tuple(f32(10.0 ** (i - top)) for i in range(first, top + 1))
    starts = tuple(u32(1 << i) for i in above)
    begins = tuple(f32(1 << i) for i in range(first, top + 1))
    almost_all, last_place = f32(1 - 0.225 / (1 << top)), u32(2 << top)
    count = top - first

    def place(y: Float) -> Bits:
        steep, begin = slopes[0], begins[0]
        for k in range(count):
            higher = y >= thresholds[k]
            steep = slopes[k + 1] if higher else steep
            begin = begins[k + 1] if higher else begin
        inside, last = y * steep - begin * NINTH, begin - HALF
        found = truncated(begin + (inside if inside < last else last))
        return last_place if y >= almost_all else found

    def value(place: Bits) -> Any:
        ten = tens[0]
        for k in range(count):
            ten = tens[k + 1] if place >= starts[k] else ten
        mantissa = float_of((bits_of(whole(place) + HALF) & MANTISSA) | ONE_BITS)
        return ONE if place >= last_place else ten * (mantissa * NINE_TENTHS - EIGHT_TENTHS)

    return place, value


def signed_dynamic(bits: int, block: int) -> Block:
    """The zero in the middle; there is 1, but no -1."""
    place, inside = dynamic(0, bits - 2)
    smallest = 0.55 * 10.0 ** (2 - bits)
    nearly_zero, middle = f32(smallest / 2), u32((1 << bits - 1) - 1)
    most = u32(middle + N1)
    sign_shift = u32(31)

    def number(y: Float) -> Bits:
        return N0 if y < nearly_zero else place(y)

    def value(number: Bits) -> Any:
        return f32(0) if number == N0 else inside(number)

    def code(number: Bits, negative: Bits) -> Bits:
        last = u32(most + negative)
        return u32((min(number, last) ^ negative) + u32(middle - negative))

    def number_of(code: Bits) -> tuple[Bits, Bits]:
        off = u32(u32(code) - middle)
        negative = u32(N0 - (off >> sign_shift))
        return u32((off ^ negative) - negative), negative

    zero = int(middle) * (0x11 if bits == 4 else 1)
    last = 1 - 0.45 / (1 << bits - 2)
    return Block(
        bits, block, zero, 0, int(most), 1.0, last, smallest, number, value, code, number_of
    )


def unsigned_dynamic8() -> Block:
    place, inside = dynamic(1, 7)

    def number(y: Float) -> Bits:
        return u32(place(y) - N1)

    def value(number: Bits) -> Any:
        return f32(0) if number == N0 else inside(u32(number + N1))

    return Block(8, 256, 0, 1, 255, 1.0, 1.0, 3.25e-7, number, value, plain_code, plain_number_of)


def dynamic4_number(y: Float) -> Bits:
    sixteenths = truncated(y * SIXTEEN + HALF)
    return u32(min(max(sixteenths, N1), N16) - N1)


def dynamic4_value(number: Bits) -> Any:
    return whole(u32(number + N1)) * SIXTEENTH


BLOCKS = {
    "e4m3": Block(
        8, 256, 0, 0, 126, 448.0, 448.0, 1 / 512, e4m3_number, e4m3_value, e4m3_code,
        e4m3_number_of,
    ),
    "e5m3": Block(
        8, 256, 0, 1, 255, 61440.0, 61440.0, 1.125 / 65536, e5m3_number, e5m3_value, plain_code,
        plain_number_of,
    ),
    "dynamic8": signed_dynamic(8, 256),
    "dynamic8_unsigned": unsigned_dynamic8(),
    "dynamic4": signed_dynamic(4, 128),
    "dynamic4_unsigned": Block(
        4, 128, 0, 0, 15, 1.0, 1.0, 1 / 16, dynamic4_number, dynamic4_value, plain_code,
        plain_number_of,
    ),
}  # fmt: skip
"""By the codec's name, without `_stochastic`."""


# ---------------------------------------------------------------- the scale of a block

NORMAL, FINITE = np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max


def positive_bits(x: Float) -> Bits:
    """The bits of a positive number, 0 for others."""
    bits = bits_of(x)
    return bits if bits < SIGN else N0


def negative_bits(x: Float) -> Bits:
    """The bits of a negative number's magnitude, 0 for others."""
    bits = u32(bits_of(x) ^ SIGN)
    return bits if bits < SIGN else N0


def scaling(b: Block) -> Callable[..., Any]:
    """(positive, negative) -> (live, scale, 1 / scale), from the largest bits of either sign.

    live: whether the scale is neither zero nor NaN.
    """
    largest, opposite, turns = f32(b.largest), f32(b.opposite), b.opposite < b.largest
    lowest = f32(float(NORMAL) / b.smallest * b.largest).view(u32)

    def scaled(positive: Bits, negative: Bits) -> tuple[bool, Any, Any]:
        more, less = max(positive, negative), min(positive, negative)
        live = (more >= lowest) & (more < INFINITE)
        wanted = max(float_of(more) / largest, float_of(less) / opposite)
        scale = min(wanted, FINITE)
        scale = -scale if turns & (negative > positive) else scale
        bad = float_of(NOT_A_NUMBER if more >= INFINITE else N0)
        return live, scale if live else bad, ONE / scale if live else ZERO

    return scaled


# ---------------------------------------------------------------- one element of a block


def element_functions(
    b: Block,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """decode(code, scale), and nearest and stochastic (x, factor, key, i) -> code."""
    least, most = u32(b.least), u32(b.most)
    number_of, value_of, nearest_to, code_of = b.number_of, b.value, b.number, b.code

    def decode(code: Bits, scale: Float) -> Any:
        number, negative = number_of(code)
        return float_of(bits_of(value_of(number)) | (negative & SIGN)) * scale

    def nearest_number(x: Float, y: Float) -> Bits:
        number = nearest_to(y)
        if least == N0:
            return number
        return max(number, least) if (bits_of(x) & MAGNITUDE) != N0 else N0

    def coded(number: Bits, scaled: Float) -> Bits:
        return code_of(number, u32(N0 - (bits_of(scaled) >> u32(31))))

    def nearest(x: Float, factor: Float, key: Any, i: int) -> Bits:
        y = float_of(bits_of(x * factor) & MAGNITUDE)
        return coded(nearest_number(x, y), x * factor)

    def stochastic(x: Float, factor: Float, key: Any, i: int) -> Bits:
        y = float_of(bits_of(x * factor) & MAGNITUDE)
        number = nearest_number(x, y)
        lower = u32(number - N1) if (value_of(number) > y) & (number > least) else number
        upper = u32(lower + N1) if lower < most else lower
        below = value_of(lower)
        share = (y - below) / (value_of(upper) - below)
        drawn = (whole(random_bits(key, i)) + HALF) * DRAW
        return coded(upper if drawn < share else lower, x * factor)

    return decode, nearest, stochastic
