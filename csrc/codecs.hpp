// How stored elements become elements of the compute type and back, a tile at a time. A codec is a
// few lines on one element or one block; everything else is one loop for all of them. The NumPy
// form of each is in fusedopt/arrays/formats.py, bit for bit.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "table.h"
#include "vectors.hpp"

namespace {

using namespace fusedopt;

constexpr std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
constexpr float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
// Selections that stay such, all bits or none: GCC makes branches of `c ? a : b` where `a` takes
// some work, and then does not vectorise the loop, or does it badly.
constexpr std::uint32_t mask(bool condition) { return 0u - static_cast<std::uint32_t>(condition); }
constexpr float select(bool condition, float yes, float no) {
  return float_of((bits_of(yes) & mask(condition)) | (bits_of(no) & ~mask(condition)));
}
// Below 2^31, by way of signed integers: older instruction sets convert no others.
constexpr float whole(std::uint32_t x) { return static_cast<float>(static_cast<std::int32_t>(x)); }
constexpr std::uint32_t truncated(float x) {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(x));
}

constexpr double NORMAL = 1.17549435082228751e-38;  // the smallest normal float
constexpr double FINITE = 3.40282346638528860e+38;  // the largest
constexpr std::uint32_t SIGN = 0x80000000u, INFINITE = 0x7f800000u, NOT_A_NUMBER = 0x7fc00000u;

// States below the smallest normal number are stored as zero: a state that decays through the
// denormals would make every later step several times slower.
inline double normal_or_zero(double x) {
  const double magnitude = x < 0.0 ? -x : x;
  return magnitude < 2.22507385850720138e-308 ? 0.0 : x;
}
// With exponent bits it is normal: one test of bits, where a comparison would need the magnitude.
inline float normal_or_zero(float x) {
  const std::uint32_t bits = bits_of(x);
  return float_of(bits & INFINITE ? bits : 0);
}

// ---------------------------------------------------------------- elements that stand alone

template <class S>
struct Plain {
  using Stored = S;
  template <class T>
  static T decode(S x) {
    return static_cast<T>(x);
  }
  template <class T>
  static S nearest(T x) {
    return static_cast<S>(x);
  }
};

// The upper half of a float.
struct BFloat16 {
  using Stored = std::uint16_t;
  template <class T>
  static T decode(Stored x) {
    return static_cast<T>(float_of(static_cast<std::uint32_t>(x) << 16));
  }
  template <class T>
  static Stored nearest(T x) {
    const float narrow = static_cast<float>(x);
    const std::uint32_t bits = bits_of(narrow);
    const std::uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    // One NaN for all: a sign for it would cost as much as the rounding.
    return static_cast<Stored>((narrow != narrow ? NOT_A_NUMBER : rounded) >> 16);
  }
  // Away from zero with the probability that makes it unbiased, by 16 random bits; never from
  // finite to infinite.
  template <class T>
  static Stored stochastic(T x, std::uint32_t random) {
    const std::uint32_t bits = bits_of(static_cast<float>(x));
    const std::uint32_t rounded = bits + random;
    const bool stays = (bits & INFINITE) == INFINITE || (rounded & INFINITE) == INFINITE;
    const std::uint32_t nan = (bits & SIGN) | NOT_A_NUMBER;
    return static_cast<Stored>(((bits & ~SIGN) > INFINITE ? nan : stays ? bits : rounded) >> 16);
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  static constexpr std::uint32_t NORMAL = 0x38800000u;     // 2^-14, the smallest normal number
  static constexpr std::uint32_t TOO_LARGE = 0x47800000u;  // 2^16
  static constexpr std::uint32_t REBIAS = (127 - 15) << 23;

  template <class T>
  static T decode(Stored x) {
    const std::uint32_t magnitude = x & 0x7fffu, shifted = magnitude << 13;
    const float denormal = whole(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    const std::uint32_t finite = magnitude < 0x400u ? bits_of(denormal) : shifted + REBIAS;
    const std::uint32_t bits = magnitude >= 0x7c00u ? shifted | INFINITE : finite;
    return static_cast<T>(float_of(bits | static_cast<std::uint32_t>(x & 0x8000u) << 16));
  }
  // A half's bits from magnitude bits: of a normal result, of one below the smallest, of the rest.
  static Stored assemble(std::uint32_t bits, std::uint32_t normal, std::uint32_t denormal) {
    const std::uint32_t magnitude = bits & ~SIGN;
    const std::uint32_t special = magnitude > INFINITE ? 0x7e00u : 0x7c00u;
    const std::uint32_t small = mask(magnitude < NORMAL);
    const std::uint32_t finite = (denormal & small) | (normal & ~small);
    const std::uint32_t code = magnitude >= TOO_LARGE ? special : finite;
    return static_cast<Stored>(code | (bits >> 16 & 0x8000u));
  }
  template <class T>
  static Stored nearest(T x) {
    const std::uint32_t bits = bits_of(static_cast<float>(x)), magnitude = bits & ~SIGN;
    const std::uint32_t normal = (magnitude - REBIAS + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // One half has the spacing of the denormals: the addition rounds.
    const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return assemble(bits, normal, denormal);
  }
  template <class T>
  static Stored stochastic(T x, std::uint32_t random) {
    const std::uint32_t bits = bits_of(static_cast<float>(x)), magnitude = bits & ~SIGN;
    std::uint32_t normal = (magnitude - REBIAS + (random >> 3)) >> 13;
    normal = normal > 0x7bffu ? 0x7bffu : normal;
    // In units of 2^-16 of the denormals' spacing, 2^-24.
    const float units = select(magnitude < NORMAL, float_of(magnitude), 0.0f) * 1099511627776.0f;
    const std::uint32_t fixed = truncated(units);
    const std::uint32_t denormal = (fixed + random) >> 16;
    return assemble(bits, normal, denormal);
  }
};

template <class E, class T>
void decode_each(const void* data, const void*, void* out, std::size_t n) {
  const typename E::Stored* __restrict from = static_cast<const typename E::Stored*>(data);
  T* __restrict to = static_cast<T*>(out);
  std::size_t i = 0;
  if constexpr (sizeof(T) == sizeof(float) && Vectors<E>::decoded > 0)
    for (; i + Vectors<E>::decoded <= n; i += Vectors<E>::decoded)
      Vectors<E>::decode(from + i, to + i);
  for (; i < n; ++i) to[i] = E::template decode<T>(from[i]);
}

// Encodes what is whole vectors, and returns the number of elements; `one` takes each element
// of a vector that the instruction does not treat as it does.
template <class E, class One, class... Stored>
std::size_t encode_vectors(const float* from, std::size_t n, const One& one, Stored*... to) {
  constexpr std::size_t width = Vectors<E>::encoded;
  std::size_t i = 0;
  for (; i + width <= n; i += width)
    if (!Vectors<E>::nearest(from + i, to + i...))
      for (std::size_t k = i; k < i + width; ++k) one(k);
  return i;
}

template <class E, class T>
void copy_each(const void* tile, void* data, void*, std::size_t n, std::uint64_t) {
  const T* __restrict from = static_cast<const T*>(tile);
  typename E::Stored* __restrict to = static_cast<typename E::Stored*>(data);
  std::size_t i = 0;
  if constexpr (sizeof(T) == sizeof(float) && Vectors<E>::encoded > 0)
    i = encode_vectors<E>(from, n, [=](std::size_t k) { to[k] = E::nearest(from[k]); }, to);
  for (; i < n; ++i) to[i] = E::nearest(from[i]);
}

// The loop around a rule keeps denormals out of states in the compute type, the codecs out of
// narrower ones: a double can be a denormal float.
template <class T>
inline T normal_float(T x) {
  if constexpr (sizeof(T) == sizeof(float)) return x;
  return (x < T(0) ? -x : x) < T(NORMAL) ? T(0) : x;
}

template <class E, class T>
void encode_each(const void* tile, void* data, void* aux, std::size_t n, std::uint64_t key) {
  if constexpr (sizeof(T) == sizeof(float)) return copy_each<E, T>(tile, data, aux, n, key);
  const T* __restrict from = static_cast<const T*>(tile);
  typename E::Stored* __restrict to = static_cast<typename E::Stored*>(data);
  for (std::size_t i = 0; i < n; ++i) to[i] = E::nearest(normal_float(from[i]));
}

// The finaliser of splitmix64, and the key of one of many: as in driver.hpp, which must not be
// included here.
inline std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// Sixteen random bits for each element of a tile: a number of the sequence that the tile's key
// begins has those of four elements, the lowest ones first. (All processors that there are wheels
// for store numbers so.)
struct Random {
  alignas(64) std::uint16_t bits[TILE];
  Random(std::uint64_t key, std::size_t n) {
    for (std::size_t k = 0; k < n; k += 4) {
      const std::uint64_t drawn = mixed(key += 0x9e3779b97f4a7c15u);
      std::memcpy(bits + k, &drawn, sizeof drawn);
    }
  }
};

template <class E, class T>
void encode_stochastic(const void* tile, void* data, void*, std::size_t n, std::uint64_t key) {
  const T* __restrict from = static_cast<const T*>(tile);
  typename E::Stored* __restrict to = static_cast<typename E::Stored*>(data);
  const Random random(key, n);
  const std::uint16_t* const bits = random.bits;
  std::size_t i = 0;
  if constexpr (sizeof(T) == sizeof(float) && Vectors<Stochastic<E>>::encoded > 0)
    i = encode_vectors<Stochastic<E>>(
        from, n, [=](std::size_t k) { to[k] = E::stochastic(from[k], bits[k]); }, to, bits);
  for (; i < n; ++i) to[i] = E::stochastic(normal_float(from[i]), bits[i]);
}

// ---------------------------------------------------------------- a bfloat16 and 16 bits more

// Together exactly a float: `low` is what the nearest bfloat16 is off by, in float's last places.
struct Split16 {
  static float decode(std::uint16_t high, std::uint16_t low) {
    const std::int32_t off = static_cast<std::int16_t>(low);
    return float_of((static_cast<std::uint32_t>(high) << 16) + static_cast<std::uint32_t>(off));
  }
  static void encode(float x, std::uint16_t& high, std::uint16_t& low) {
    const std::uint32_t bits = bits_of(x);
    const bool nan = (bits & ~SIGN) > INFINITE;
    // Ties go away from zero: to even, `low` would need one value more than it has.
    const std::uint32_t value = nan ? (bits & SIGN) | NOT_A_NUMBER : bits;
    high = static_cast<std::uint16_t>((value + 0x8000u) >> 16);
    low = static_cast<std::uint16_t>(value & 0xffffu);
  }
};

// Kahan's compensation: what the stored bfloat16 fell short by, a bfloat16 itself.
struct Kahan {
  static float decode(std::uint16_t high, std::uint16_t low) {
    return BFloat16::decode<float>(high) + BFloat16::decode<float>(low);
  }
  static void encode(float x, std::uint16_t& high, std::uint16_t& low) {
    high = BFloat16::nearest(x);
    const float stored = BFloat16::decode<float>(high);
    const bool finite = (bits_of(stored) & INFINITE) != INFINITE;
    low = BFloat16::nearest(finite ? x - stored : 0.0f);
  }
};

template <class E, class T>
void decode_pairs(const void* data, const void* aux, void* out, std::size_t n) {
  const std::uint16_t* __restrict high = static_cast<const std::uint16_t*>(data);
  const std::uint16_t* __restrict low = static_cast<const std::uint16_t*>(aux);
  T* __restrict to = static_cast<T*>(out);
  for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<T>(E::decode(high[i], low[i]));
}

template <class E, class T>
void encode_pairs(const void* tile, void* data, void* aux, std::size_t n, std::uint64_t) {
  const T* __restrict from = static_cast<const T*>(tile);
  std::uint16_t* __restrict high = static_cast<std::uint16_t*>(data);
  std::uint16_t* __restrict low = static_cast<std::uint16_t*>(aux);
  std::size_t i = 0;
  if constexpr (sizeof(T) == sizeof(float) && Vectors<E>::encoded > 0)
    i = encode_vectors<E>(
        from, n, [=](std::size_t k) { E::encode(from[k], high[k], low[k]); }, high, low);
  for (; i < n; ++i) E::encode(static_cast<float>(from[i]), high[i], low[i]);
}

// ---------------------------------------------------------------- blocks that share a scale

// A block format numbers its values from zero up: `number` gives the nearest to a magnitude in
// units of the scale, `value` the way back, `code` and `number_of` say how a number and its sign
// are stored. `least` is the number of what is not zero but nearly; values run from SMALLEST to
// LARGEST, which the largest magnitude of the block becomes. (A scale that is a power of two would
// not do: an average that shrinks by less than half a code in each step would never shrink.)
// OPPOSITE is the largest magnitude with a negative sign. Where that is less than LARGEST, as in
// the dynamic maps, the scale has the sign of the element of the largest magnitude, and is large
// enough for those of the other sign: no element is cut off, or an average would shrink at every
// store.

struct Unsigned {
  static constexpr std::uint8_t zero = 0;
  static std::uint32_t code(std::uint32_t number, std::uint32_t) { return number; }
  static constexpr std::uint32_t number_of(std::uint32_t code, std::uint32_t&) { return code; }
};

// 1 + 4 + 3 bits, as in the OCP standard (e4m3fn), never its NaN.
struct E4M3 {
  static constexpr int bits = 8, block = 256;
  static constexpr std::uint8_t zero = 0;
  static constexpr std::uint32_t least = 0, most = 126;
  static constexpr double LARGEST = 448, OPPOSITE = LARGEST, SMALLEST = 1.0 / 512;
  static std::uint32_t number(float y) {
    const std::uint32_t magnitude = bits_of(y);
    const std::uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    // 2^14 has the spacing of the denormals: the addition rounds.
    const std::uint32_t denormal = bits_of(y + 16384.0f) - bits_of(16384.0f);
    return magnitude < bits_of(0.015625f) ? denormal : normal;
  }
  static constexpr float value(std::uint32_t number) {
    const std::uint32_t normal = (number << 20) + (120u << 23);
    return float_of(number < 8 ? bits_of(whole(number) * 0.001953125f) : normal);
  }
  static std::uint32_t code(std::uint32_t number, std::uint32_t negative) {
    return number | (negative & 0x80u);
  }
  static constexpr std::uint32_t number_of(std::uint32_t code, std::uint32_t& negative) {
    negative = 0u - (code >> 7);
    return code & 0x7fu;
  }
};

// No sign, 5 + 3 bits, no denormals: number 0 is zero, and in a block that is not zero altogether
// nothing else becomes zero.
struct E5M3 : Unsigned {
  static constexpr int bits = 8, block = 256;
  static constexpr std::uint32_t least = 1, most = 255;
  static constexpr std::uint32_t OFFSET = ((127 + 15) << 3) - 248;  // number 248: 2^15
  static constexpr double LARGEST = 61440, OPPOSITE = LARGEST, SMALLEST = 1.125 / 65536;
  static std::uint32_t number(float y) {
    const std::uint32_t magnitude = bits_of(y);
    const std::uint32_t near = (magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
    return near > OFFSET ? near - OFFSET : 0;
  }
  static constexpr float value(std::uint32_t number) {
    return select(number == 0, 0.0f, float_of((number + OFFSET) << 20));
  }
};

// The dynamic map of bitsandbytes (8 bits) and torchao (4 bits): decade I, counted from the lowest,
// has 2^I values, in the middles of as many equal parts of (10^(I-1), 10^I) 10^-TOP. Numbered
// through, decade I has the numbers 2^I to 2^(I+1) - 1, and 2^(TOP+1) is 1. So a number plus one
// half, as a float, has I for its exponent and the place in the decade for its mantissa, and
// neither way needs a search or a look-up.
template <int FIRST, int TOP>
struct Dynamic {
  static constexpr double power(int exponent) {  // of ten
    double result = 1.0;
    for (int k = 0; k < (exponent < 0 ? -exponent : exponent); ++k) result *= 10.0;
    return exponent < 0 ? 1.0 / result : result;
  }
  template <int I>
  static constexpr float ten = static_cast<float>(power(I - TOP));
  // Half way between the last value of the decade before and the first of this one.
  template <int I>
  static constexpr float threshold = static_cast<float>(power(I - TOP) * (0.1 + 0.18 / (1 << I)));
  template <int I>
  static constexpr float slope = static_cast<float>((1 << I) * power(TOP - I) / 0.9);
  static constexpr float ALL = static_cast<float>(1 - 0.225 / (1 << TOP));
  // GCC vectorises no loop within a loop: the decades above the first are taken by a fold.
  using Above = std::make_integer_sequence<int, TOP - FIRST>;

  template <int... I>
  static constexpr std::uint32_t number(float y, std::integer_sequence<int, I...>) {
    constexpr float lowest = slope<FIRST>;
    float steep = lowest, first = 1 << FIRST;
    ((steep = select(y >= threshold<FIRST + 1 + I>, slope<FIRST + 1 + I>, steep)), ...);
    ((first = select(y >= threshold<FIRST + 1 + I>, 2 << (FIRST + I), first)), ...);
    // Where the decade begins this is 0.2, at its end too much by 1. (Below the lowest decade it is
    // negative, and the number that of a nothing.)
    const float place = y * steep - first * static_cast<float>(1.0 / 9.0);
    const float last = first - 0.5f;
    const std::uint32_t found = truncated(first + (place < last ? place : last));
    const std::uint32_t all = mask(y >= ALL);
    return (found & ~all) | ((2u << TOP) & all);
  }
  // The number of the value nearest to y, for y in [0, 1].
  static constexpr std::uint32_t number(float y) { return number(y, Above()); }

  template <int... I>
  static constexpr float power_of(std::uint32_t number, std::integer_sequence<int, I...>) {
    constexpr float lowest = ten<FIRST>;
    float power = lowest;
    ((power = select(number >= 2u << (FIRST + I), ten<FIRST + 1 + I>, power)), ...);
    return power;
  }
  static constexpr float value(std::uint32_t number) {
    const float mantissa = float_of((bits_of(whole(number) + 0.5f) & 0x7fffffu) | bits_of(1.0f));
    const float inside = power_of(number, Above()) * (mantissa * 0.9f - 0.8f);
    return select(number >= 2u << TOP, 1.0f, inside);
  }
};

// The zero in the middle, positive values above it. There is 1, but no -1.
template <int BITS, int BLOCK>
struct SignedDynamic {
  static constexpr int bits = BITS, block = BLOCK;
  using Map = Dynamic<0, BITS - 2>;
  static constexpr std::uint32_t MIDDLE = (1u << (BITS - 1)) - 1, least = 0, most = MIDDLE + 1;
  static constexpr std::uint8_t zero = BITS == 8 ? MIDDLE : MIDDLE * 0x11;
  static constexpr double LARGEST = 1, SMALLEST = 0.55 * Map::power(2 - BITS);
  static constexpr double OPPOSITE = 1 - 0.45 / (1 << (BITS - 2));  // the last value below 1
  static constexpr std::uint32_t number(float y) {
    return Map::number(y) & ~mask(y < static_cast<float>(SMALLEST / 2));
  }
  static constexpr float value(std::uint32_t number) {
    return select(number == 0, 0.0f, Map::value(number));
  }
  static std::uint32_t code(std::uint32_t number, std::uint32_t negative) {
    const std::uint32_t last = most + negative;
    return ((number < last ? number : last) ^ negative) + (MIDDLE - negative);
  }
  static constexpr std::uint32_t number_of(std::uint32_t code, std::uint32_t& negative) {
    const std::uint32_t place = code - MIDDLE;
    negative = 0u - (place >> 31);
    return (place ^ negative) - negative;
  }
};

// The map of numbers from zero up; only a zero becomes zero.
struct UnsignedDynamic8 : Unsigned {
  static constexpr int bits = 8, block = 256;
  static constexpr std::uint32_t least = 1, most = 255;
  using Map = Dynamic<1, 7>;
  static constexpr double LARGEST = 1, OPPOSITE = LARGEST, SMALLEST = 3.25 * Map::power(-7);
  static std::uint32_t number(float y) { return Map::number(y) - 1; }
  static constexpr float value(std::uint32_t number) {
    return select(number == 0, 0.0f, Map::value(number + 1));
  }
};

// 1/16 to 16/16: no zero, which the scale of a block of zeros stands for.
struct UnsignedDynamic4 : Unsigned {
  static constexpr int bits = 4, block = 128;
  static constexpr std::uint32_t least = 0, most = 15;
  static constexpr double LARGEST = 1, OPPOSITE = LARGEST, SMALLEST = 1.0 / 16;
  static std::uint32_t number(float y) {
    const std::uint32_t sixteenths = truncated(y * 16.0f + 0.5f);
    return (sixteenths < 1 ? 1 : sixteenths > 16 ? 16 : sixteenths) - 1;
  }
  static constexpr float value(std::uint32_t number) { return whole(number + 1) * 0.0625f; }
};

}  // namespace

#include "block_vectors.hpp"

namespace {

// The number of an element of a block that holds finite numbers, at least one of them not zero.
template <class B>
inline std::uint32_t nearest_number(float x, float factor) {
  const std::uint32_t number = B::number(float_of(bits_of(x * factor) & ~SIGN));
  if constexpr (B::least == 0) return number;
  const std::uint32_t kept = number < B::least ? B::least : number;
  return kept & mask((bits_of(x) & ~SIGN) != 0);
}

// Takes the upper of two values around an element with the probability that makes the mean right,
// to half a step of the 16 random bits; what is below the value of number `least` becomes that. For
// the same random bits a larger element never becomes a smaller number.
template <class B>
inline std::uint32_t stochastic_number(float x, float factor, std::uint32_t random) {
  const std::uint32_t number = nearest_number<B>(x, factor);
  const float y = float_of(bits_of(x * factor) & ~SIGN);
  const std::uint32_t above = mask(B::value(number) > y) & mask(number > B::least) & 1u;
  const std::uint32_t lower = number - above, upper = lower + (mask(lower < B::most) & 1u);
  const float least = B::value(lower);
  const float share = (y - least) / (B::value(upper) - least);
  const float drawn = (whole(random) + 0.5f) * 1.52587890625e-5f;  // 2^-16
  const std::uint32_t up = mask(drawn < share);
  return (lower & ~up) | (upper & up);
}

template <class B>
constexpr std::size_t bytes_of(std::size_t n) {
  return (n * B::bits + 7) / 8;
}

template <class B>
inline float decoded(std::uint32_t code, float scale) {
  std::uint32_t negative = 0;
  const float value = B::value(B::number_of(code, negative));
  return float_of(bits_of(value) | (negative & SIGN)) * scale;
}

template <class B, class T>
inline void decode_block(const std::uint8_t* __restrict codes, float scale, T* __restrict to,
                         std::size_t count) {
  std::size_t first = 0;
#if defined(FUSEDOPT_AVX512)
  if constexpr (sizeof(T) == sizeof(float)) first = decode_vectors<B>(codes, scale, to, count);
#endif
  if constexpr (B::bits == 8) {
    for (std::size_t i = first; i < count; ++i) to[i] = static_cast<T>(decoded<B>(codes[i], scale));
  } else {
    for (std::size_t i = first / 2; i < count / 2; ++i) {  // the first in the high nibble
      to[2 * i] = static_cast<T>(decoded<B>(codes[i] >> 4, scale));
      to[2 * i + 1] = static_cast<T>(decoded<B>(codes[i] & 15u, scale));
    }
    if (count % 2) to[count - 1] = static_cast<T>(decoded<B>(codes[count / 2] >> 4, scale));
  }
}

template <class B, class T>
void decode_blocks(const void* data, const void* aux, void* out, std::size_t n) {
  const float* const scales = static_cast<const float*>(aux);
  for (std::size_t at = 0, k = 0; at < n; at += B::block, ++k) {
    const std::size_t count = n - at < B::block ? n - at : B::block;
    decode_block<B>(static_cast<const std::uint8_t*>(data) + bytes_of<B>(at), scales[k],
                    static_cast<T*>(out) + at, count);
  }
}

// The scale of a block, from the bits of the largest magnitudes of its positive and its negative
// elements.
template <class B>
inline float scale_of(std::uint32_t positive, std::uint32_t negative) {
  const bool turned = negative > positive;
  const float largest = float_of(turned ? negative : positive) / static_cast<float>(B::LARGEST);
  const float other = float_of(turned ? positive : negative) / static_cast<float>(B::OPPOSITE);
  const float wanted = other > largest ? other : largest;
  const float scale = wanted > static_cast<float>(FINITE) ? static_cast<float>(FINITE) : wanted;
  return B::OPPOSITE < B::LARGEST && turned ? -scale : scale;
}

// The scale of the elements of a block; zero where all of its codes are zero, NaN where they stand
// for NaN.
template <class B, class T>
inline float measured_scale(const T* __restrict from, std::size_t count) {
  // The largest magnitudes of either sign, as bits: infinities and NaN are above all others.
  // Where the sign makes no difference, all count as positive.
  std::int32_t positive = 0, negative = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = bits_of(static_cast<float>(from[i]));
    constexpr bool either = B::OPPOSITE == B::LARGEST;
    const std::int32_t same = static_cast<std::int32_t>(either ? bits & ~SIGN : bits);
    positive = same > positive ? same : positive;
    if constexpr (!either) {
      const std::int32_t turned = static_cast<std::int32_t>(bits ^ SIGN);
      negative = turned > negative ? turned : negative;
    }
  }
  const auto largest = static_cast<std::uint32_t>(positive > negative ? positive : negative);
  // An infinity or NaN stays visible: the whole block is NaN from here on. And where the smallest
  // code would stand for a denormal, all is zero: denormals would make every later step slow.
  constexpr float lowest = static_cast<float>(NORMAL / B::SMALLEST * B::LARGEST);
  if (largest >= INFINITE) return float_of(NOT_A_NUMBER);
  if (largest < bits_of(lowest)) return 0.0f;
  return scale_of<B>(static_cast<std::uint32_t>(positive), static_cast<std::uint32_t>(negative));
}

// The codes of a block's elements in units of 1 / factor. random: for each element, or null.
template <class B, bool STOCHASTIC, class T>
inline void encode_block(const T* __restrict from, float factor, const std::uint16_t* random,
                         std::uint8_t* __restrict codes, std::size_t count) {
  std::size_t first = 0;
#if defined(FUSEDOPT_AVX512)
  if constexpr (sizeof(T) == sizeof(float))
    first = encode_vectors<B>(from, factor, STOCHASTIC ? random : nullptr, codes, count);
#endif
  // In 32 bits first: with eight, GCC works on too many elements at once and runs out of
  // registers, and takes 1.5 times as long.
  alignas(64) std::uint32_t wide[B::block + 1];
  for (std::size_t i = first; i < count; ++i) {
    const float x = static_cast<float>(from[i]);
    std::uint32_t number;
    if constexpr (STOCHASTIC)
      number = stochastic_number<B>(x, factor, random[i]);
    else
      number = nearest_number<B>(x, factor);
    wide[i] = B::code(number, 0u - (bits_of(x * factor) >> 31));
  }
  if constexpr (B::bits == 8) {
    for (std::size_t i = first; i < count; ++i) codes[i] = static_cast<std::uint8_t>(wide[i]);
  } else {
    if (count % 2) wide[count] = B::zero & 15;
    for (std::size_t i = bytes_of<B>(first); i < bytes_of<B>(count); ++i)
      codes[i] = static_cast<std::uint8_t>(wide[2 * i] << 4 | wide[2 * i + 1]);
  }
}

template <class B, class T, bool STOCHASTIC>
void encode_blocks(const void* tile, void* data, void* aux, std::size_t n, std::uint64_t key) {
  const Random random(key, STOCHASTIC ? n : 0);
  const T* const from = static_cast<const T*>(tile);
  float* const scales = static_cast<float*>(aux);
  const auto count_at = [n](std::size_t at) { return n - at < B::block ? n - at : B::block; };
  // All scales first: one takes 60 cycles to come through the maximum and two divisions, in which
  // the processor goes on with the next block's.
  for (std::size_t at = 0, k = 0; at < n; at += B::block, ++k)
    scales[k] = measured_scale<B>(from + at, count_at(at));
  for (std::size_t at = 0, k = 0; at < n; at += B::block, ++k) {
    const float scale = scales[k];
    std::uint8_t* const codes = static_cast<std::uint8_t*>(data) + bytes_of<B>(at);
    if (scale == 0.0f || scale != scale)
      std::memset(codes, B::zero, bytes_of<B>(count_at(at)));
    else
      encode_block<B, STOCHASTIC>(from + at, 1.0f / scale, STOCHASTIC ? random.bits + at : nullptr,
                                  codes, count_at(at));
  }
}

// ---------------------------------------------------------------- the list

template <std::size_t SIZE>
void store_zero(const void*, void* data, void*, std::size_t n, std::uint64_t) {
  std::memset(data, 0, n * SIZE);
}

template <class E>
constexpr Codec each(const char* name) {
  constexpr std::size_t size = sizeof(typename E::Stored);
  return {name,
          size * 8,
          1,
          0,
          {decode_each<E, float>, decode_each<E, double>},
          {encode_each<E, float>, encode_each<E, double>},
          {copy_each<E, float>, copy_each<E, double>},
          store_zero<size>};
}

template <class E>
constexpr Codec stochastic(const char* name) {
  Codec codec = each<E>(name);
  codec.encode[0] = encode_stochastic<E, float>;
  codec.encode[1] = encode_stochastic<E, double>;
  codec.random = true;
  return codec;
}

template <class E>
constexpr Codec pairs(const char* name) {
  return {name,
          16,
          1,
          2,
          {decode_pairs<E, float>, decode_pairs<E, double>},
          {encode_pairs<E, float>, encode_pairs<E, double>},
          {},
          nullptr};
}

template <class B, bool STOCHASTIC = false>
constexpr Codec blocks(const char* name) {
  return {name,
          B::bits,
          B::block,
          sizeof(float),
          {decode_blocks<B, float>, decode_blocks<B, double>},
          {encode_blocks<B, float, STOCHASTIC>, encode_blocks<B, double, STOCHASTIC>},
          {},
          nullptr,
          STOCHASTIC};
}

// In the compute type already: not copied.
constexpr Codec uncopied(Codec codec, int compute) {
  codec.decode[compute] = nullptr;
  codec.encode[compute] = nullptr;
  return codec;
}

// The order of the first ones is that of `Format`.
constexpr Codec CODECS[] = {
    uncopied(each<Plain<float>>("float32"), F32),
    uncopied(each<Plain<double>>("float64"), F64),
    each<BFloat16>("bfloat16"),
    each<Float16>("float16"),
    stochastic<BFloat16>("bfloat16_stochastic"),
    stochastic<Float16>("float16_stochastic"),
    pairs<Split16>("split16"),
    pairs<Kahan>("kahan"),
    blocks<E4M3>("e4m3"),
    blocks<E5M3>("e5m3"),
    blocks<SignedDynamic<8, 256>>("dynamic8"),
    blocks<UnsignedDynamic8>("dynamic8_unsigned"),
    blocks<SignedDynamic<4, 128>>("dynamic4"),
    blocks<UnsignedDynamic4>("dynamic4_unsigned"),
    blocks<E4M3, true>("e4m3_stochastic"),
    blocks<E5M3, true>("e5m3_stochastic"),
    blocks<SignedDynamic<8, 256>, true>("dynamic8_stochastic"),
    blocks<UnsignedDynamic8, true>("dynamic8_unsigned_stochastic"),
    blocks<SignedDynamic<4, 128>, true>("dynamic4_stochastic"),
    blocks<UnsignedDynamic4, true>("dynamic4_unsigned_stochastic"),
};

}  // namespace
