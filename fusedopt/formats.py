"""Storage formats in NumPy: what the codecs of the compiled core do, bit for bit.

The core's own forms are in csrc/codecs.hpp, where the reasons stand too. These here serve the
reference backend and verification, and show a user what his quantised states hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
DTYPES = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
"""Of parameters and gradients."""

TILE = 256
INFINITE = np.uint32(0x7F800000)
Values = Any
"""An ndarray; NumPy's annotations do not follow its arithmetic."""


def compute_dtype(dtype: np.dtype) -> np.dtype:
    """The type in which a parameter of this dtype is updated."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


class Format(ABC):
    """How elements are stored: `data`, and for some formats `aux` beside it; both flat.

    codec: the name in the core. name: what a user calls it. dtype: of the data. block: so many
    elements share one entry of `aux`. aux_dtype: None where there is no `aux`. random: whether
    rounding takes a key.
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
        """What elements in [low, high] may read as once stored, where `data` and `aux` were."""
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


def subkey(key: int, index: Any) -> Values:
    """The keys of some of many (index: integers), from the key of all."""
    indices = np.atleast_1d(np.asarray(index, np.uint64)) + np.uint64(1)
    return mixed(np.uint64(key) + indices * np.uint64(0x9E3779B97F4A7C15))


def random_bits(key: int, n: int) -> Values:
    """32 random bits for each of n elements of an array, from the array's key in this step."""
    tiles = np.repeat(subkey(key, np.arange(-(-n // TILE))), TILE)[:n]
    place = (np.arange(n) % TILE).astype(np.uint32)
    x = place * np.uint32(0x9E3779B9) + tiles.astype(np.uint32)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = x + (tiles >> np.uint64(32)).astype(np.uint32)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


class Stochastic(Plain):
    """bfloat16 or float16, rounded up or down at random so that the mean is right."""

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
                rounded = (bits + (random >> np.uint32(16))) >> np.uint32(16)
                rounded = np.where(rounded & 0x7F80 == 0x7F80, bits >> np.uint32(16), rounded)
                codes = rounded.astype(np.uint16)
            else:
                codes = self._half(x, random)
            return np.where(np.isfinite(x), codes.view(self.dtype), nearest), None

    @staticmethod
    def _half(x: Values, random: Values) -> Values:
        magnitude = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
        normal = (magnitude - np.uint32(112 << 23) + (random >> np.uint32(19))) >> np.uint32(13)
        small = np.where(magnitude < 0x38800000, np.abs(x), 0).astype(np.float32)
        fixed = (small * np.float32(2**44)).astype(np.uint32)
        denormal = (fixed + (random >> np.uint32(12))) >> np.uint32(20)
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
    """Codes, and for each block of them a float32 scale; NaN for one that held no finite number."""

    aux_dtype = FLOAT32
    block = 256

    def data_size(self, n: int) -> int:
        return (n * self.bits + 7) // 8

    def scales(self, largest: Values) -> Values:
        """Of blocks, from their largest magnitudes, which are finite and not zero."""
        return largest

    @abstractmethod
    def codes(self, x: Values, factors: Values) -> Values:
        """The codes of elements, from the inverse of their blocks' scales."""

    @cached_property
    def map(self) -> Values:
        """Of each code its value, in units of the scale."""
        return self.values(np.arange(1 << self.bits))

    @abstractmethod
    def values(self, codes: Values) -> Values:
        """The values of codes, in units of the scale."""

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
                scales = self._scales_of(self._largest(np.abs(x)))
            good = (scales > 0) & np.isfinite(scales)
            spread = np.repeat(np.where(good, scales, np.float32(1)), self.block)[: x.size]
            codes = self.codes(np.where(np.isfinite(x), x, 0), np.float32(1) / spread)
            codes = np.where(np.repeat(good, self.block)[: x.size], codes, self.zero_code)
        return self._packed(codes.astype(np.uint8)), scales

    def span(self, low: Values, high: Values, data: np.ndarray, aux: Any, key: int) -> Any:
        n = low.size
        with np.errstate(all="ignore"):
            least = np.where(np.sign(low) * np.sign(high) > 0, np.fmin(abs(low), abs(high)), 0)
            least[np.isnan(low)] = np.nan
            bounds = [
                self._scales_of(self._largest(a.astype(np.float32)))
                for a in (least, np.maximum(abs(low), abs(high)))
            ]
            fits = (bounds[0] <= aux) & (aux <= bounds[1]) | np.isnan(bounds[0]) & np.isnan(aux)
            fits |= np.isinf(bounds[1])
            ends = [self.decode(self.encode(x, scales=aux)[0], aux)[:n] for x in (low, high)]
            fits = np.repeat(fits | np.isnan(bounds[1]) & ~np.isnan(bounds[0]), self.block)[:n]
        return np.where(fits, ends[0], np.inf), np.where(fits, ends[1], -np.inf)

    @property
    def zero_code(self) -> int:
        return 0

    @property
    def zero(self) -> int:
        return self.zero_code * (0x11 if self.bits == 4 else 1)

    def _largest(self, magnitudes: Values) -> Values:
        starts = np.arange(0, magnitudes.size, self.block)
        return np.maximum.reduceat(magnitudes, starts) if magnitudes.size else magnitudes

    def _scales_of(self, largest: Values) -> Values:
        poisoned = np.where(largest == 0, np.float32(0), np.float32(np.nan))
        good = (largest > 0) & np.isfinite(largest)
        return np.where(good, self.scales(np.where(good, largest, 1)), poisoned).astype(np.float32)

    def _packed(self, codes: Values) -> Values:
        if self.bits == 8:
            return codes
        even = np.concatenate((codes, [self.zero_code])) if codes.size % 2 else codes
        return (even[::2] << 4 | even[1::2]).astype(np.uint8)


class E4M3(Blocks):
    """The OCP standard's 8-bit float with three bits of mantissa; power-of-two scales."""

    codec, name = "e4m3", "float8"

    def scales(self, largest: Values) -> Values:
        mantissa, exponent = np.frexp(largest)  # mantissa in [0.5, 1)
        return np.ldexp(np.float32(1), np.maximum(exponent - 9 + (mantissa > 0.875), -126))

    def codes(self, x: Values, factors: Values) -> Values:
        return (x * factors).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    def values(self, codes: Values) -> Values:
        return codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)

    @cached_property
    def map(self) -> Values:
        # The core has no NaN among the codes: it never stores these two.
        return np.nan_to_num(super().map, nan=480.0)


class E5M3(Blocks):
    """8 bits without sign and denormals, five of them exponent; only zero becomes zero."""

    codec, name = "e5m3", "float8"
    _OFFSET = (142 << 3) - 248

    @staticmethod
    def _rounded(x: Values) -> Values:
        bits = x.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)
        return (bits + np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1))) >> np.uint32(20)

    def scales(self, largest: Values) -> Values:
        exponent = (self._rounded(largest) >> np.uint32(3)).astype(np.int32) - 142
        return np.ldexp(np.float32(1), np.maximum(exponent, -126))

    def codes(self, x: Values, factors: Values) -> Values:
        near = self._rounded(x * factors).astype(np.int64) - self._OFFSET
        return np.where(x == 0, 0, np.clip(near, 1, 255))

    def values(self, codes: Values) -> Values:
        bits = (codes + self._OFFSET).astype(np.uint32) << np.uint32(20)
        return np.where(codes == 0, np.float32(0), bits.view(np.float32))


class Dynamic(Blocks):
    """The dynamic maps of bitsandbytes and torchao: decades of evenly spaced values."""

    first, top = 0, 6

    @cached_property
    def _thresholds(self) -> Values:
        """Where each decade after the first begins."""
        decades = np.arange(self.first + 1, self.top + 1)
        return (10.0 ** (decades - self.top) * (0.1 + 0.18 / 2.0**decades)).astype(np.float32)

    def _numbers(self, y: Values) -> Values:
        decade = np.searchsorted(self._thresholds, y, side="right") + self.first
        start = (2.0**decade).astype(np.float32)
        slope = (2.0**decade * 10.0 ** (self.top - decade) / 0.9).astype(np.float32)
        place = y * slope - start * np.float32(1.0 / 9.0)
        found = start.astype(np.int32) + np.minimum(
            place.astype(np.int32), start.astype(np.int32) - 1
        )
        return np.where(y >= np.float32(1 - 0.225 / (1 << self.top)), 2 << self.top, found)

    def _numbered(self, numbers: Values) -> Values:
        mantissa, exponent = np.frexp(numbers.astype(np.float32) + np.float32(0.5))
        ten = (10.0 ** (exponent - 1.0 - self.top)).astype(np.float32)
        inside = ten * (mantissa * np.float32(2) * np.float32(0.9) - np.float32(0.8))
        return np.where(numbers >= 2 << self.top, np.float32(1), inside)


class SignedDynamic(Dynamic):
    """Zero in the middle; no -1."""

    def __init__(self, bits: int, block: int) -> None:
        self.name = self.codec = f"dynamic{bits}"
        self.bits, self.block, self.top = bits, block, bits - 2

    @property
    def zero_code(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def codes(self, x: Values, factors: Values) -> Values:
        y = x * factors
        least = np.float32(0.275 * 10.0**-self.top)
        number = np.where(np.abs(y) < least, 0, self._numbers(np.abs(y)))
        middle = self.zero_code
        return np.where(y < 0, np.maximum(middle - number, 0), middle + number)

    def values(self, codes: Values) -> Values:
        place = codes - self.zero_code
        value = np.where(place == 0, np.float32(0), self._numbered(np.abs(place)))
        return np.where(place < 0, -value, value)


class UnsignedDynamic8(Dynamic):
    """From zero up; only zero becomes zero."""

    codec, name, first, top = "dynamic8_unsigned", "dynamic8", 1, 7

    def codes(self, x: Values, factors: Values) -> Values:
        return np.where(x == 0, 0, self._numbers(np.abs(x * factors)) - 1)

    def values(self, codes: Values) -> Values:
        return np.where(codes == 0, np.float32(0), self._numbered(codes + 1))


class UnsignedDynamic4(Blocks):
    """1/16 to 16/16; a block of zeros has the scale zero."""

    codec, name, bits, block = "dynamic4_unsigned", "dynamic4", 4, 128

    def codes(self, x: Values, factors: Values) -> Values:
        sixteenths = np.abs(x * factors) * np.float32(16) + np.float32(0.5)
        return np.clip(sixteenths, np.float32(1), np.float32(16)).astype(np.int32) - 1

    def values(self, codes: Values) -> Values:
        return (codes + 1).astype(np.float32) * np.float32(0.0625)


PLAIN = {dtype.name: Plain(dtype) for dtype in DTYPES}
STOCHASTIC = {dtype.name: Stochastic(dtype) for dtype in (BFLOAT16, FLOAT16)}
SPLIT16, KAHAN = Split16(), Kahan()

QUANTIZED: dict[str, tuple[Format, Format]] = {
    "float8": (E4M3(), E5M3()),
    "dynamic8": (SignedDynamic(8, 256), UnsignedDynamic8()),
    "dynamic4": (SignedDynamic(4, 128), UnsignedDynamic4()),
}
"""Of each name the formats of a state that has a sign, and of one that is never negative."""

FORMATS: tuple[Format, ...] = (
    *PLAIN.values(),
    *STOCHASTIC.values(),
    SPLIT16,
    KAHAN,
    *(f for pair in QUANTIZED.values() for f in pair),
)
