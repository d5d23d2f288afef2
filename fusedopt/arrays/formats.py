"""Storage formats in NumPy: what the codecs of the compiled core do, bit for bit.

The core's own forms are in csrc/codecs.hpp, where the reasons stand too. These here serve the
reference backend and verification, and show a user what his quantised states hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
"""The dtypes of parameters and gradients."""

TILE = 256
SEGMENT = 1 << 14
"""Elements of an array whose sum is a number of its own: see csrc/table.h."""
INFINITE = np.uint32(0x7F800000)
Values = Any
"""An ndarray; NumPy's annotations do not follow its arithmetic."""


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The type in which a parameter of this dtype is updated."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def least_state(computed: np.dtype, stored: np.dtype) -> float:
    """States below this are stored as zero: what is a denormal in either type."""
    types = (computed, compute_dtype(stored))
    return max(float(np.finfo(dtype).smallest_normal) for dtype in types)


class Format(ABC):
    """A storage format of elements: `data`, and for some formats `aux` beside it; both flat.

    codec: the name in the core. name: what a user calls it. dtype: of the data. block: the
    number of elements that share one entry of `aux`. aux_dtype: None where there is no `aux`.
    random: whether rounding takes a key.
    """

    codec: str
    name: str
    dtype: np.dtype = np.dtype(np.uint8)
    bits: int = 8
    block: int = 1
    aux_dtype: np.dtype | None = None
    random: bool = False

    @abstractmethod
    def decode(self, data: np.ndarray, aux: Any) -> Values:
        """The elements, in float32, or in float64 where they are stored so."""

    @abstractmethod
    def encode(self, x: Values, key: int = 0) -> tuple[np.ndarray, Any]:
        """`data` and `aux` of flat elements. key: of the random bits, of one array in one step."""

    def span(self, low: Values, high: Values, data: np.ndarray, aux: Any, key: int) -> Any:
        """Return what elements in [low, high] may read as once they are stored."""
        return tuple(self.decode(*self.encode(x, key)) for x in (low, high))

    @property
    def quantized(self) -> bool:
        """Whether blocks of elements share a scale."""
        return self.block > 1

    @property
    def zero(self) -> int:
        """The byte of which a new array's data is made."""
        return 0

    def data_size(self, n: int) -> int:
        """Entries of the data of n elements."""
        return n

    def aux_size(self, n: int) -> int:
        """Entries of what stands beside n elements."""
        return -(-n // self.block) if self.aux_dtype is not None else 0

    def nbytes(self, n: int) -> int:
        """Bytes of n elements, those beside them included."""
        beside = self.aux_size(n) * self.aux_dtype.itemsize if self.aux_dtype is not None else 0
        return self.data_size(n) * self.dtype.itemsize + beside


class Plain(Format):
    """NumPy's own arrays, rounded to the nearest, ties to even."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype, self.codec, self.name = dtype, dtype.name, dtype.name
        self.bits = 8 * dtype.itemsize

    def decode(self, data: np.ndarray, aux: Any) -> Values:
        return data.astype(compute_dtype(self.dtype))

    def encode(self, x: Values, key: int = 0) -> tuple[np.ndarray, Any]:
        with np.errstate(all="ignore"):
            if self.dtype.itemsize == 2:  # the core's codecs take the way through float32 too
                x = x.astype(np.float32)
            return x.astype(self.dtype), None


def mixed(x: Values) -> Values:
    """The bits of 64-bit integers spread over all of each: the finaliser of splitmix64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


GOLDEN = 0x9E3779B97F4A7C15


def subkey(key: Any, index: Any) -> Values:
    """The keys of some of many (index: integers), from the key of all."""
    indices = np.atleast_1d(np.asarray(index, np.uint64)) + np.uint64(1)
    return mixed(np.uint64(key) + indices * np.uint64(GOLDEN))


class RandomKey(NamedTuple):
    """The key of an array's random bits.

    first_tile: where the array begins in the one that it is a part of, whose bits it takes.
    """

    key: int = 0
    first_tile: int = 0

    def after(self, steps: int) -> int:
        """The key of the step that follows these many of the leaf."""
        return (int(subkey(self.key, steps)[0]) + self.first_tile * GOLDEN) % 2**64


def random_bits(key: int, n: int) -> Values:
    """Sixteen random bits for each of n elements of an array, from the array's key in this step.

    Each tile has a key of its own, and each 64-bit number of a tile the bits of four elements.
    """
    tiles = subkey(key, np.arange(-(-n // TILE)))
    drawn = subkey(tiles[:, None], np.arange(TILE // 4))[..., None]
    sixteens = drawn >> np.array([0, 16, 32, 48], np.uint64) & np.uint64(0xFFFF)
    return sixteens.reshape(-1)[:n].astype(np.uint32)


class Stochastic(Plain):
    """bfloat16 or float16, rounded up or down at random so that the mean is right.

    By 16 random bits: exactly so, but for float16's denormals, which are cut off at 2^-40 before.
    """

    random = True

    def __init__(self, dtype: np.dtype) -> None:
        super().__init__(dtype)
        self.codec = f"{dtype.name}_stochastic"

    def encode(self, x: Values, key: int = 0) -> tuple[np.ndarray, Any]:
        with np.errstate(all="ignore"):
            x = x.astype(np.float32)
            random = random_bits(key, x.shape[-1])
            nearest, _ = super().encode(x)
            # The neighbour towards zero, and the share of the way to the next one.
            if self.dtype == BFLOAT16:
                bits = x.view(np.uint32)
                rounded = (bits + random) >> np.uint32(16)
                rounded = np.where(rounded & 0x7F80 == 0x7F80, bits >> np.uint32(16), rounded)
                codes = rounded.astype(np.uint16)
            else:
                codes = self._half(x, random)
            return np.where(np.isfinite(x), codes.view(self.dtype), nearest), None

    @staticmethod
    def _half(x: Values, random: Values) -> Values:
        magnitude = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
        normal = (magnitude - np.uint32(112 << 23) + (random >> np.uint32(3))) >> np.uint32(13)
        small = np.where(magnitude < 0x38800000, np.abs(x), 0).astype(np.float32)
        fixed = (small * np.float32(2**40)).astype(np.uint32)
        denormal = (fixed + random) >> np.uint32(16)
        # 2^16 and above is infinite; below that nothing finite becomes so.
        finite = np.where(magnitude < 0x38800000, denormal, np.minimum(normal, 0x7BFF))
        code = np.where(magnitude >= 0x47800000, 0x7C00, finite)
        return (code | (x.view(np.uint32) >> np.uint32(16) & np.uint32(0x8000))).astype(np.uint16)


class Split16(Format):
    """A bfloat16 and 16 bits more, together exactly a float32."""

    codec, name, dtype, bits, aux_dtype = "split16", "split16", BFLOAT16, 16, np.dtype(np.uint16)

    def decode(self, data: np.ndarray, aux: Any) -> Values:
        high = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return (high + aux.view(np.int16).astype(np.uint32)).view(np.float32)

    def encode(self, x: Values, key: int = 0) -> tuple[np.ndarray, Any]:
        with np.errstate(all="ignore"):
            bits = x.astype(np.float32).view(np.uint32)
        bits = np.where(np.isnan(x), bits & np.uint32(1 << 31) | np.uint32(0x7FC00000), bits)
        high = (bits + np.uint32(0x8000)) >> np.uint32(16)
        return high.astype(np.uint16).view(BFLOAT16), bits.astype(np.uint16)


class Kahan(Format):
    """A bfloat16, and in another what it fell short by."""

    codec, name, dtype, bits, aux_dtype = "kahan", "kahan", BFLOAT16, 16, BFLOAT16

    def decode(self, data: np.ndarray, aux: Any) -> Values:
        with np.errstate(all="ignore"):
            return data.astype(np.float32) + aux.astype(np.float32)

    def encode(self, x: Values, key: int = 0) -> tuple[np.ndarray, Any]:
        with np.errstate(all="ignore"):
            x = x.astype(np.float32)
            high = x.astype(BFLOAT16)
            stored = high.astype(np.float32)
            low = np.where(np.isfinite(stored), x - stored, np.float32(0))
            return high, low.astype(BFLOAT16)


class Blocks(Format):
    """Codes, and for each block of them a float32 scale; NaN for one that held no finite number.

    A format numbers its values from zero up. largest, smallest: of the values, in units of the
    scale. opposite: the largest magnitude with a negative sign; where it is less than `largest`, a
    scale has the sign of the element of its block's largest magnitude. least, most: the numbers of
    what is not zero, but nearly, and of the largest value.
    """

    aux_dtype = FLOAT32
    block = 256
    largest, opposite, smallest = 1.0, 1.0, 1.0
    least, most = 0, 255

    def __init__(self, random: bool = False) -> None:
        self.random = random
        if random:
            self.codec += "_stochastic"

    @abstractmethod
    def numbers(self, y: Values) -> Values:
        """The numbers of the values nearest to magnitudes in units of the scale."""

    @abstractmethod
    def values(self, numbers: Values) -> Values:
        """The values of numbers, in units of the scale."""

    def coded(self, numbers: Values, negative: Values) -> Values:
        """The codes of numbers and signs."""
        return numbers

    def numbered(self, codes: Values) -> tuple[Values, Values]:
        """The numbers and signs of codes."""
        return codes, np.zeros(codes.shape, bool)

    @property
    def zero_code(self) -> int:
        return 0

    @property
    def zero(self) -> int:
        return self.zero_code * (0x11 if self.bits == 4 else 1)

    def data_size(self, n: int) -> int:
        return (n * self.bits + 7) // 8

    @cached_property
    def map(self) -> Values:
        """The value of each code, in units of the scale."""
        numbers, negative = self.numbered(np.arange(1 << self.bits))
        values = self.values(numbers).astype(np.float32)
        return np.where(negative, -values, values)

    def decode(self, data: np.ndarray, aux: Any) -> Values:
        scales = np.repeat(aux, self.block)
        if self.bits == 4:
            data = np.stack((data >> 4, data & 15), axis=-1).reshape(-1)[: scales.size]
        with np.errstate(all="ignore"):
            return self.map[data] * scales[: data.size]

    def encode(self, x: Values, key: int = 0, scales: Any = None) -> tuple[np.ndarray, Any]:
        with np.errstate(all="ignore"):
            x = x.astype(np.float32)
            if scales is None:
                scales = self._scales(self._largest(x), self._largest(-x))
            good = (scales != 0) & np.isfinite(scales)
            spread = np.repeat(np.where(good, scales, np.float32(1)), self.block)[: x.size]
            finite = np.where(np.isfinite(x), x, np.float32(0))
            scaled = finite * (np.float32(1) / spread)
            y = np.abs(scaled)
            numbers = self.numbers(y)
            if self.least:
                numbers = np.where(finite == 0, 0, np.maximum(numbers, self.least))
            if self.random:
                numbers = self._moved(numbers, y, key)
            codes = self.coded(numbers, np.signbit(scaled))
            codes = np.where(np.repeat(good, self.block)[: x.size], codes, self.zero_code)
        return self._packed(codes.astype(np.uint8)), scales

    def _moved(self, numbers: Values, y: Values, key: int) -> Values:
        """Return one of the two numbers around each element at random, from the nearest ones.

        Their mean is the element, to half a step of the 16 random bits; but what is below the value
        of the number `least` becomes that value.
        """
        lower = numbers - ((self.values(numbers) > y) & (numbers > self.least))
        upper = lower + (lower < self.most)
        least = self.values(lower).astype(np.float32)
        share = (y - least) / (self.values(upper).astype(np.float32) - least)
        drawn = (random_bits(key, y.size) + np.float32(0.5)).astype(np.float32) * np.float32(2**-16)
        return np.where(drawn < share, upper, lower)

    def span(self, low: Values, high: Values, data: np.ndarray, aux: Any, key: int) -> Any:
        n = low.size
        with np.errstate(all="ignore"):
            if self.zero_code == 0 and self.map.min() >= 0:
                low = np.where(low < 0, 0, low)
            # The largest positive and negative magnitudes that there are at least, and at most. The
            # magnitude of a scale grows with either.
            narrow_low, narrow_high = low.astype(np.float32), high.astype(np.float32)
            positive = self._largest(narrow_low), self._largest(narrow_high)
            negative = self._largest(-narrow_high), self._largest(-narrow_low)
            bounds = [abs(self._scales(*both)) for both in zip(positive, negative, strict=True)]
            fits = (bounds[0] <= abs(aux)) & (abs(aux) <= bounds[1])
            if self.opposite < self.largest:
                turned = negative[1] > positive[0]
                fits &= np.where(aux < 0, turned, positive[1] >= negative[0])
            else:
                fits &= aux >= 0
            fits |= np.isnan(bounds[0]) & np.isnan(aux)
            fits |= np.isinf(bounds[1]) | np.isnan(bounds[1]) & ~np.isnan(bounds[0])
            # What was not touched keeps its scale, which other elements may have led to.
            held = self.decode(data, aux)[:n]
            differs = ((low != held) | (high != held)).astype(np.float32)
            fits |= self._largest(differs) == 0
            ends = [
                np.where(
                    np.isinf(x) & (low != high),
                    x,
                    self.decode(self.encode(x, key, aux)[0], aux)[:n],
                )
                for x in (low, high)
            ]
            fits = np.repeat(fits, self.block)[:n]
        return np.where(fits, ends[0], np.inf), np.where(fits, ends[1], -np.inf)

    def _largest(self, x: Values) -> Values:
        """Return the largest element of each block, zero where all are negative."""
        starts = np.arange(0, x.size, self.block)
        return np.maximum(np.maximum.reduceat(x, starts), 0) if x.size else x

    def _scales(self, positive: Values, negative: Values) -> Values:
        """Return the scales of blocks, from the largest magnitudes of either sign.

        Zero where a code would be a denormal.
        """
        limits = np.finfo(np.float32)
        lowest = np.float32(float(limits.smallest_normal) / self.smallest * self.largest)
        largest, other = np.maximum(positive, negative), np.minimum(positive, negative)
        scales = np.maximum(largest / np.float32(self.largest), other / np.float32(self.opposite))
        scales = np.minimum(scales, limits.max)
        if self.opposite < self.largest:
            scales = np.where(negative > positive, -scales, scales)
        scales = np.where(np.isfinite(largest), scales, np.float32(np.nan))
        return np.where(largest < lowest, np.float32(0), scales)

    def _packed(self, codes: Values) -> Values:
        if self.bits == 8:
            return codes
        even = np.concatenate((codes, [self.zero_code])) if codes.size % 2 else codes
        return (even[::2] << 4 | even[1::2]).astype(np.uint8)


class E4M3(Blocks):
    """The OCP standard's 8-bit float with three bits of mantissa (e4m3fn)."""

    codec, name = "e4m3", "float8"
    largest, opposite, smallest, most = 448.0, 448.0, 1 / 512, 126

    def numbers(self, y: Values) -> Values:
        return y.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).astype(np.int32)

    def values(self, numbers: Values) -> Values:
        # The core has no NaN among the codes: it never stores number 127.
        magnitudes = numbers.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return np.where(numbers == 127, np.float32(480), magnitudes)

    def coded(self, numbers: Values, negative: Values) -> Values:
        return numbers | np.where(negative, 0x80, 0)

    def numbered(self, codes: Values) -> tuple[Values, Values]:
        return codes & 0x7F, codes >= 0x80


class E5M3(Blocks):
    """8 bits without sign and denormals, five of them exponent; only zero becomes zero."""

    codec, name = "e5m3", "float8"
    largest, opposite, smallest, least = 61440.0, 61440.0, 1.125 / 65536, 1
    _OFFSET = (142 << 3) - 248

    def numbers(self, y: Values) -> Values:
        bits = y.astype(np.float32).view(np.uint32)
        near = bits + np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1))
        return np.maximum((near >> np.uint32(20)).astype(np.int32) - self._OFFSET, 0)

    def values(self, numbers: Values) -> Values:
        bits = (numbers + self._OFFSET).astype(np.uint32) << np.uint32(20)
        return np.where(numbers == 0, np.float32(0), bits.view(np.float32))


class Dynamic(Blocks):
    """The dynamic maps of bitsandbytes and torchao: decades of evenly spaced values."""

    first, top = 0, 6

    @cached_property
    def _thresholds(self) -> Values:
        """Return the thresholds at which each decade after the first begins."""
        decades = np.arange(self.first + 1, self.top + 1)
        return (10.0 ** (decades - self.top) * (0.1 + 0.18 / 2.0**decades)).astype(np.float32)

    def _places(self, y: Values) -> Values:
        """The numbers in the map, whose decade I begins with 2^I."""
        decade = np.searchsorted(self._thresholds, y, side="right") + self.first
        start = (2.0**decade).astype(np.float32)
        slope = (2.0**decade * 10.0 ** (self.top - decade) / 0.9).astype(np.float32)
        place = y * slope - start * np.float32(1.0 / 9.0)
        found = (start + np.minimum(place, start - np.float32(0.5))).astype(np.int32)
        return np.where(y >= np.float32(1 - 0.225 / (1 << self.top)), 2 << self.top, found)

    def _at(self, places: Values) -> Values:
        """The values there."""
        mantissa, exponent = np.frexp(places.astype(np.float32) + np.float32(0.5))
        ten = (10.0 ** (exponent - 1.0 - self.top)).astype(np.float32)
        inside = ten * (mantissa * np.float32(2) * np.float32(0.9) - np.float32(0.8))
        return np.where(places >= 2 << self.top, np.float32(1), inside)


class SignedDynamic(Dynamic):
    """Zero in the middle; there is 1, but no -1."""

    def __init__(self, bits: int, block: int, random: bool = False) -> None:
        self.name = self.codec = f"dynamic{bits}"
        self.bits, self.block, self.top = bits, block, bits - 2
        self.smallest, self.most = 0.55 * 10.0**-self.top, 1 << (bits - 1)
        self.opposite = 1 - 0.45 / (1 << self.top)
        super().__init__(random)

    @property
    def zero_code(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def numbers(self, y: Values) -> Values:
        return np.where(y < np.float32(self.smallest / 2), 0, self._places(y))

    def values(self, numbers: Values) -> Values:
        return np.where(numbers == 0, np.float32(0), self._at(np.maximum(numbers, 1)))

    def coded(self, numbers: Values, negative: Values) -> Values:
        middle = self.zero_code
        return np.where(negative, middle - np.minimum(numbers, middle), middle + numbers)

    def numbered(self, codes: Values) -> tuple[Values, Values]:
        place = codes - self.zero_code
        return np.abs(place), place < 0


class UnsignedDynamic8(Dynamic):
    """The dynamic map of numbers from zero up; only zero becomes zero."""

    codec, name, first, top = "dynamic8_unsigned", "dynamic8", 1, 7
    smallest, least = 3.25e-7, 1

    def numbers(self, y: Values) -> Values:
        return self._places(y) - 1

    def values(self, numbers: Values) -> Values:
        return np.where(numbers == 0, np.float32(0), self._at(numbers + 1))


class UnsignedDynamic4(Blocks):
    """1/16 to 16/16; a block of zeros has the scale zero."""

    codec, name, bits, block = "dynamic4_unsigned", "dynamic4", 4, 128
    smallest, most = 1 / 16, 15

    def numbers(self, y: Values) -> Values:
        sixteenths = (y * np.float32(16) + np.float32(0.5)).astype(np.int32)
        return np.clip(sixteenths, 1, 16) - 1

    def values(self, numbers: Values) -> Values:
        return (numbers + 1).astype(np.float32) * np.float32(0.0625)


PLAIN = {dtype.name: Plain(dtype) for dtype in DTYPES}
PLAIN_OF = {format.dtype: format for format in PLAIN.values()}
"""`PLAIN` by dtype, whose name takes NumPy 5 us to find."""
STOCHASTIC = {dtype.name: Stochastic(dtype) for dtype in (BFLOAT16, FLOAT16)}
SPLIT16, KAHAN = Split16(), Kahan()


def _block_formats(random: bool) -> dict[str, tuple[Blocks, Blocks]]:
    return {
        "float8": (E4M3(random), E5M3(random)),
        "dynamic8": (SignedDynamic(8, 256, random), UnsignedDynamic8(random)),
        "dynamic4": (SignedDynamic(4, 128, random), UnsignedDynamic4(random)),
    }


QUANTIZED, QUANTIZED_STOCHASTIC = _block_formats(False), _block_formats(True)
"""By name, the formats of a state that has a sign, and of one that is never negative."""

FORMATS: tuple[Format, ...] = (
    *PLAIN.values(),
    *STOCHASTIC.values(),
    SPLIT16,
    KAHAN,
    *(f for pair in QUANTIZED.values() for f in pair),
    *(f for pair in QUANTIZED_STOCHASTIC.values() for f in pair),
)
"""In the order of the core's table."""
