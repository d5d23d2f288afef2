"""Codecs of elements that stand alone: csrc/codecs.hpp in Python, for a just-in-time compiler.

Numba makes uint64 of two uint32, and float64 of an int and a uint64. So every constant is a uint32
here, and what must wrap, or is shifted to the right, is cast to uint32 first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32 as f32
from numpy import float64 as f64
from numpy import uint32 as u32

Float = Any
"""A float32, or a float64 that is to be rounded to one."""

Bits = Any
"""A uint32, or a uint64 with room for what is not cut off yet."""

SIGN, INFINITE, NOT_A_NUMBER = u32(0x80000000), u32(0x7F800000), u32(0x7FC00000)
MAGNITUDE = u32(0x7FFFFFFF)
N0, N1, N8, N12, N13, N15, N16, N19 = (u32(n) for n in (0, 1, 8, 12, 13, 15, 16, 19))
LOW, TIES, HALFWAY = u32(0xFFFF), u32(0x7FFF), u32(0x8000)
HALF = f32(0.5)


def bits_of(x: Float) -> Bits:
    return np.float32(x).view(np.uint32)


def float_of(bits: Bits) -> Any:
    return np.uint32(bits).view(np.float32)


def whole(x: Bits) -> Any:
    return f32(np.int32(x))


def truncated(x: Float) -> Bits:
    return u32(np.int32(x))


def mixed(x: Any) -> Any:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def subkey(key: Any, index: Any) -> Any:
    """The key of one of many, from the key of all."""
    return mixed(np.uint64(key) + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


FIRST_FACTOR, SECOND_FACTOR, PLACE = u32(0x7FEB352D), u32(0x846CA68B), u32(0x9E3779B9)


def random_bits(key: Any, i: Any) -> Bits:
    """Of the i-th element of a tile with this 64-bit key."""
    x = u32(u32(u32(i) * PLACE) + u32(key))
    x = u32((x ^ (x >> N16)) * FIRST_FACTOR)
    x = u32(x + u32(np.uint64(key) >> np.uint64(32)))
    x = u32((x ^ (x >> N15)) * SECOND_FACTOR)
    return u32(x ^ (x >> N16))


# ---------------------------------------------------------------- decode(code), encode(x, random)


def decode_float32(x: Float) -> Any:
    return f32(x)


def encode_float32(x: Float, random: Bits) -> Any:
    return f32(x)


def decode_float64(x: Float) -> Any:
    return f64(x)


def encode_float64(x: Float, random: Bits) -> Any:
    return f64(x)


def decode_bfloat16(code: Bits) -> Any:
    return float_of(u32(code) << N16)


def encode_bfloat16(x: Float, random: Bits) -> Bits:
    narrow = f32(x)
    bits = bits_of(narrow)
    rounded = u32(bits + TIES + ((bits >> N16) & N1))
    return (NOT_A_NUMBER if narrow != narrow else rounded) >> N16


def stochastic_bfloat16(x: Float, random: Bits) -> Bits:
    bits = bits_of(x)
    rounded = u32(bits + (random >> N16))
    stays = ((bits & INFINITE) == INFINITE) | ((rounded & INFINITE) == INFINITE)
    nan = u32((bits & SIGN) | NOT_A_NUMBER)
    return (nan if (bits & MAGNITUDE) > INFINITE else (bits if stays else rounded)) >> N16


LEAST_NORMAL16, OVERFLOW16, REBIAS16 = u32(0x38800000), u32(0x47800000), u32(112 << 23)
INFINITE16, NAN16, MAGNITUDE16 = u32(0x7C00), u32(0x7E00), u32(0x7FFF)
SMALLEST16, TIES16, LARGEST16 = u32(0x400), u32(0xFFF), u32(0x7BFF)
SPACING16, HALF_BITS = f32(2.0**-24), HALF.view(u32)
FINE16, N20 = f32(2.0**44), u32(20)
ZERO = f32(0)


def decode_float16(code: Bits) -> Any:
    magnitude = u32(u32(code) & MAGNITUDE16)
    shifted = u32(magnitude << N13)
    denormal = bits_of(whole(magnitude) * SPACING16)
    finite = denormal if magnitude < SMALLEST16 else u32(shifted + REBIAS16)
    bits = u32(shifted | INFINITE) if magnitude >= INFINITE16 else finite
    return float_of(bits | u32((u32(code) & HALFWAY) << N16))


def assembled16(bits: Bits, normal: Bits, denormal: Bits) -> Bits:
    magnitude = u32(bits & MAGNITUDE)
    special = NAN16 if magnitude > INFINITE else INFINITE16
    finite = denormal if magnitude < LEAST_NORMAL16 else normal
    code = special if magnitude >= OVERFLOW16 else finite
    return u32(code | ((bits >> N16) & HALFWAY))


def encode_float16(x: Float, random: Bits) -> Bits:
    bits = bits_of(x)
    magnitude = u32(bits & MAGNITUDE)
    normal = u32(magnitude - REBIAS16 + TIES16 + ((magnitude >> N13) & N1)) >> N13
    denormal = u32(bits_of(float_of(magnitude) + HALF) - HALF_BITS)
    return assembled16(bits, u32(normal), denormal)


def stochastic_float16(x: Float, random: Bits) -> Bits:
    bits = bits_of(x)
    magnitude = u32(bits & MAGNITUDE)
    normal = u32(u32(magnitude - REBIAS16 + (random >> N19)) >> N13)
    normal = min(normal, LARGEST16)
    units = (float_of(magnitude) if magnitude < LEAST_NORMAL16 else ZERO) * FINE16
    denormal = u32(truncated(units) + (random >> N12)) >> N20
    return assembled16(bits, normal, u32(denormal))


# ---------------------------------------------------------------- pairs: (high, low)


def decode_split16(high: Bits, low: Bits) -> Any:
    return float_of(u32(u32(u32(high) << N16) + u32(np.int32(np.int16(low)))))


def encode_split16(x: Float) -> tuple[Bits, Bits]:
    bits = bits_of(x)
    value = u32((bits & SIGN) | NOT_A_NUMBER) if (bits & MAGNITUDE) > INFINITE else bits
    return u32(value + HALFWAY) >> N16, value & LOW


def decode_kahan(high: Bits, low: Bits) -> Any:
    return decode_bfloat16(high) + decode_bfloat16(low)


def encode_kahan(x: Float) -> tuple[Bits, Bits]:
    narrow = f32(x)
    high = encode_bfloat16(narrow, N0)
    stored = decode_bfloat16(high)
    finite = (bits_of(stored) & INFINITE) != INFINITE
    return high, encode_bfloat16(narrow - stored if finite else ZERO, N0)
