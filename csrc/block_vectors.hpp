// Block formats, sixteen elements at a time with AVX-512: the same results as those of the
// structs in codecs.hpp on one element, where a table in a register replaces a row of selections.
// Included by codecs.hpp alone, behind these structs.
#pragma once
#include "vectors.hpp"

namespace {

// Whether the bytes of all values that a format has are looked up at once.
#if defined(__AVX512VBMI__)
constexpr bool LOOK_UPS = true;
#else
constexpr bool LOOK_UPS = false;
#endif

#if defined(FUSEDOPT_AVX512)

template <class B>
struct Sixteen;

inline __m512i all_of(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline __m512 all_of(float x) { return _mm512_set1_ps(x); }
inline __m512i bits_of(__m512 x) { return _mm512_castps_si512(x); }
inline __m512 float_of(__m512i bits) { return _mm512_castsi512_ps(bits); }
inline __m512 magnitude(__m512 x) { return float_of(_mm512_and_si512(bits_of(x), all_of(~SIGN))); }

struct UnsignedSixteen {
  static __m512i code(__m512i number, __m512i) { return number; }
  static __m512i number_of(__m512i code, __m512i& negative) {
    negative = _mm512_setzero_si512();
    return code;
  }
};

// The magnitude of x, but at least that much.
inline __m512 magnitude_from(__m512 x, double least) {
  constexpr int larger = 3, positive = 8;
  return _mm512_range_ps(x, all_of(static_cast<float>(least)), larger | positive);
}

inline __mmask16 not_zero(__m512 x) { return _mm512_test_epi32_mask(bits_of(x), all_of(~SIGN)); }

// A float's first 12 bits, rounded to the nearest, ties to even.
inline __m512i first_bits(__m512 y) {
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits_of(y), 20), all_of(1u));
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits_of(y), all_of(0x7ffffu)), odd);
  return _mm512_srli_epi32(near, 20);
}

template <>
struct Sixteen<E4M3> {
  static __m512i number(__m512 y) {
    const __m512i normal = _mm512_sub_epi32(first_bits(y), all_of(120u << 3));
    const __m512 shifted = _mm512_add_ps(y, all_of(16384.0f));
    const __m512i denormal = _mm512_sub_epi32(bits_of(shifted), bits_of(all_of(16384.0f)));
    const __mmask16 small = _mm512_cmp_ps_mask(y, all_of(0.015625f), _CMP_LT_OQ);
    return _mm512_mask_mov_epi32(normal, small, denormal);
  }
  // As a float16 a number is 2^8 times too small.
  static __m512 value(__m512i number) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_slli_epi32(number, 7));
    return _mm512_mul_ps(_mm512_cvtph_ps(halves), all_of(256.0f));
  }
  // The sum's last place is the distance of numbers near y, so y is rounded to whole ones.
  static __m512i nearest(__m512, __m512 scaled) {
    const __m512 y = magnitude(scaled);
    const __m512 power =
        _mm512_max_ps(_mm512_and_ps(y, float_of(all_of(INFINITE))), all_of(0.015625f));
    const __m512i sum = bits_of(_mm512_add_ps(_mm512_mul_ps(power, all_of(1572864.0f)), y));
    const __m512i ones = _mm512_sub_epi32(sum, bits_of(power));
    const __m512i before = _mm512_srli_epi32(bits_of(power), 20);
    constexpr std::uint32_t none = (20u << 23) + (1u << 22) + (121u << 3);
    const __m512i number = _mm512_sub_epi32(_mm512_add_epi32(ones, before), all_of(none));
    return code(number, _mm512_srli_epi32(bits_of(scaled), 24));
  }
  static __m512i code(__m512i number, __m512i negative) {
    return _mm512_or_si512(number, _mm512_and_si512(negative, all_of(0x80u)));
  }
};

template <>
struct Sixteen<E5M3> : UnsignedSixteen {
  static __m512i number(__m512 y) {
    const __m512i offset = all_of(E5M3::OFFSET);
    return _mm512_sub_epi32(_mm512_max_epu32(first_bits(y), offset), offset);
  }
  static __m512 value(__m512i number) {
    const __mmask16 some = _mm512_test_epi32_mask(number, number);
    const __m512i rebased = _mm512_add_epi32(number, all_of(E5M3::OFFSET));
    return float_of(_mm512_maskz_slli_epi32(some, rebased, 20));
  }
  static __m512i nearest(__m512 x, __m512 scaled) {
    const __m512 y = magnitude_from(scaled, E5M3::SMALLEST);
    return _mm512_maskz_sub_epi32(not_zero(x), first_bits(y), all_of(E5M3::OFFSET));
  }
};

// Each cell [2^2k, 2^(2k+2)) of 2^-31 to 2 holds at most one of the thresholds at which a decade
// begins; counted among these are what is not rounded to zero, and what is rounded to 1. By cell
// the threshold, and the lines at and above it (0 to 15) and below it (16 to 31); by exponent the
// power of ten.
template <int FIRST, int TOP>
struct DecadeTables {
  using Map = Dynamic<FIRST, TOP>;
  alignas(64) float threshold[16] = {}, slope[32] = {}, first[32] = {}, ten[16] = {};

  template <int... I>
  constexpr DecadeTables(float least, std::integer_sequence<int, I...>) {
    for (int cell = 0; cell < 16; ++cell) threshold[cell] = static_cast<float>(FINITE);
    float steep = 0.0f, number = 0.0f, cell_begin = 1.0f / (1u << 31);
    int cell = 0;
    const auto go_on = [&](float until, float next_steep, float next_number) {
      for (; cell < 16 && cell_begin < until; ++cell, cell_begin *= 4) {
        slope[cell + 16] = steep, first[cell + 16] = number;
        const bool changes = until < 4 * cell_begin;
        if (changes) threshold[cell] = until, steep = next_steep, number = next_number;
        slope[cell] = steep, first[cell] = number;
      }
    };
    go_on(least, Map::template slope<FIRST>, 1 << FIRST);
    ((I > FIRST ? go_on(Map::template threshold<I>, Map::template slope<I>, 1 << I) : void()), ...);
    // Up to 1 the place is about one half.
    go_on(Map::ALL, (2 << TOP) * static_cast<float>(1.0 / 9.0) + 0.5f, 2 << TOP);
    ((ten[(I + 127) % 16] = I < FIRST ? 0.0f : Map::template ten<I>), ...);
    ten[(TOP + 1 + 127) % 16] = 10.0f;  // more than 1
  }
};

template <int FIRST, int TOP>
struct SixteenPlaces {
  // The number as a float that is to be truncated, of magnitudes from 2^-31 on.
  static __m512 place(const DecadeTables<FIRST, TOP>& tables, __m512 y) {
    const __m512i cell = _mm512_srli_epi32(bits_of(y), 24);  // its fifth bit is set
    const __m512 threshold = _mm512_permutexvar_ps(cell, _mm512_load_ps(tables.threshold));
    const __mmask16 below = _mm512_cmp_ps_mask(y, threshold, _CMP_LT_OQ);
    const __m512i line =
        _mm512_mask_or_epi32(_mm512_and_si512(cell, all_of(15u)), below, cell, all_of(16u));
    const __m512 slope = looked_up(tables.slope, line), first = looked_up(tables.first, line);
    const __m512 ninth = _mm512_mul_ps(first, all_of(static_cast<float>(1.0 / 9.0)));
    const __m512 inside = _mm512_sub_ps(_mm512_mul_ps(y, slope), ninth);
    const __m512 last = _mm512_sub_ps(first, all_of(0.5f));
    return _mm512_add_ps(first, _mm512_min_ps(inside, last));
  }
  static __m512 looked_up(const float* table, __m512i which) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), which, _mm512_load_ps(table + 16));
  }
  // Where the exponent has no power of ten, zero.
  static __m512 value(const DecadeTables<FIRST, TOP>& tables, __m512i number) {
    const __m512i half = bits_of(_mm512_add_ps(_mm512_cvtepi32_ps(number), all_of(0.5f)));
    const __m512 ten =
        _mm512_permutexvar_ps(_mm512_srli_epi32(half, 23), _mm512_load_ps(tables.ten));
    const __m512i fraction = _mm512_and_si512(half, all_of(0x7fffffu));
    const __m512 mantissa = float_of(_mm512_or_si512(fraction, bits_of(all_of(1.0f))));
    const __m512 line = _mm512_sub_ps(_mm512_mul_ps(mantissa, all_of(0.9f)), all_of(0.8f));
    return _mm512_min_ps(_mm512_mul_ps(ten, line), all_of(1.0f));
  }
};

template <int BITS, int BLOCK>
struct Sixteen<SignedDynamic<BITS, BLOCK>> {
  using B = SignedDynamic<BITS, BLOCK>;
  using Places = SixteenPlaces<0, BITS - 2>;
  static constexpr DecadeTables<0, BITS - 2> tables{static_cast<float>(B::SMALLEST / 2),
                                                    std::make_integer_sequence<int, BITS - 1>()};
  static __m512 place(__m512 y) { return Places::place(tables, magnitude_from(y, LEAST)); }
  static __m512i number(__m512 y) { return _mm512_cvttps_epi32(place(y)); }
  static __m512 value(__m512i number) { return Places::value(tables, number); }
  static __m512i code(__m512i number, __m512i negative) {
    const __m512i last = _mm512_add_epi32(all_of(B::most), negative);
    const __m512i turned = _mm512_xor_si512(_mm512_min_epu32(number, last), negative);
    return _mm512_add_epi32(turned, _mm512_sub_epi32(all_of(B::MIDDLE), negative));
  }
  static __m512i number_of(__m512i code, __m512i& negative) {
    negative = _mm512_sub_epi32(code, all_of(B::MIDDLE));
    return _mm512_abs_epi32(negative);
  }
  static __m512i nearest(__m512, __m512 scaled) {
    const __m512 sign = _mm512_and_ps(scaled, float_of(all_of(SIGN)));
    const __m512i number = _mm512_cvttps_epi32(_mm512_or_ps(place(scaled), sign));
    return _mm512_add_epi32(number, all_of(B::MIDDLE));
  }

 private:
  static constexpr double LEAST = 1.0 / (1u << 31);
};

template <>
struct Sixteen<UnsignedDynamic8> : UnsignedSixteen {
  using Places = SixteenPlaces<1, 7>;
  static constexpr DecadeTables<1, 7> tables{static_cast<float>(UnsignedDynamic8::SMALLEST),
                                             std::make_integer_sequence<int, 8>()};
  // What is less than the least value, but not zero, becomes the least value.
  static __m512 place(__m512 y) {
    return Places::place(tables, magnitude_from(y, UnsignedDynamic8::SMALLEST));
  }
  static __m512i number(__m512 y) {
    return _mm512_sub_epi32(_mm512_cvttps_epi32(place(y)), all_of(1u));
  }
  static __m512 value(__m512i number) {
    return Places::value(tables, _mm512_add_epi32(number, all_of(1u)));
  }
  static __m512i nearest(__m512 x, __m512 scaled) {
    return _mm512_maskz_sub_epi32(not_zero(x), _mm512_cvttps_epi32(place(scaled)), all_of(1u));
  }
};

template <>
struct Sixteen<UnsignedDynamic4> : UnsignedSixteen {
  static __m512i number(__m512 y) {
    const __m512 least = magnitude_from(y, UnsignedDynamic4::SMALLEST);
    const __m512 near = _mm512_add_ps(_mm512_mul_ps(least, all_of(16.0f)), all_of(0.5f));
    return _mm512_sub_epi32(_mm512_cvttps_epi32(near), all_of(1u));
  }
  static __m512 value(__m512i number) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(number, all_of(1u))), all_of(0.0625f));
  }
  static __m512i nearest(__m512, __m512 scaled) { return number(scaled); }
};

template <class B>
inline __m512i nearest_number(__m512 x, __m512 y) {
  const __m512i number = Sixteen<B>::number(y);
  if constexpr (B::least == 0) return number;
  return _mm512_maskz_max_epu32(not_zero(x), number, all_of(B::least));
}

template <class B>
inline __m512i stochastic_number(__m512 x, __m512 y, const std::uint16_t* random) {
  using S = Sixteen<B>;
  const __m512i one = all_of(1u);
  __m512i lower = nearest_number<B>(x, y);
  const __mmask16 above = _mm512_cmp_ps_mask(S::value(lower), y, _CMP_GT_OQ) &
                          _mm512_cmpgt_epu32_mask(lower, all_of(B::least));
  lower = _mm512_mask_sub_epi32(lower, above, lower, one);
  const __mmask16 more = _mm512_cmplt_epu32_mask(lower, all_of(B::most));
  const __m512i upper = _mm512_mask_add_epi32(lower, more, lower, one);
  const __m512 least = S::value(lower);
  const __m512 share =
      _mm512_div_ps(_mm512_sub_ps(y, least), _mm512_sub_ps(S::value(upper), least));
  const void* const source = random;
  const __m512i bits =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
  const __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(bits), all_of(0.5f));
  const __m512 drawn = _mm512_mul_ps(middle, all_of(1.52587890625e-5f));
  return _mm512_mask_mov_epi32(lower, _mm512_cmp_ps_mask(drawn, share, _CMP_LT_OQ), upper);
}

// The values of sixteen codes, in units of the scale.
template <class B>
inline __m512 values_of(__m128i codes) {
  __m512i negative;
  const __m512i number = Sixteen<B>::number_of(_mm512_cvtepu8_epi32(codes), negative);
  const __m512 value = Sixteen<B>::value(number);
  return float_of(_mm512_or_si512(bits_of(value), _mm512_and_si512(negative, all_of(SIGN))));
}
template <>
inline __m512 values_of<E4M3>(__m128i codes) {
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  const __m256i halves = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xbfff)));
  return _mm512_mul_ps(_mm512_cvtph_ps(halves), all_of(256.0f));
}

#if defined(__AVX512VBMI__)

// The bytes of the values of all codes of eight bits, the lowest ones first.
template <class B>
struct ValueBytes {
  alignas(64) std::uint8_t bytes[4][256] = {};
  constexpr ValueBytes() {
    for (std::uint32_t code = 0; code < 256; ++code) {
      std::uint32_t negative = 0;
      const float value = B::value(B::number_of(code, negative));
      const std::uint32_t bits = bits_of(value) | (negative & SIGN);
      for (int k = 0; k < 4; ++k) bytes[k][code] = static_cast<std::uint8_t>(bits >> 8 * k);
    }
  }
  // Whether a byte is the same for all of the codes [from, 256) as for those `from` before them.
  constexpr bool repeats(int k, int from) const {
    for (int code = from; code < 256; ++code)
      if (bytes[k][code] != bytes[k][code - from]) return false;
    return true;
  }
};
template <class B>
constexpr ValueBytes<B> VALUE_BYTES;

// Byte k of the values of 64 codes. upper: the codes from 128 on.
template <class B, int k>
inline __m512i value_bytes(__m512i codes, __mmask64 upper) {
  constexpr const std::uint8_t (&bytes)[256] = VALUE_BYTES<B>.bytes[k];
  const auto half = [&](int from) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(bytes + from), codes,
                                    _mm512_load_si512(bytes + from + 64));
  };
  if constexpr (VALUE_BYTES<B>.repeats(k, 1)) return _mm512_set1_epi8(static_cast<char>(bytes[0]));
  if constexpr (VALUE_BYTES<B>.repeats(k, 128)) return half(0);
  return _mm512_mask_mov_epi8(half(0), upper, half(128));
}

// Decodes 64 codes.
template <class B>
inline void decode_64(const std::uint8_t* from, float scale, float* to) {
  // The order in which the values' bytes come together again.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i codes = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(from));
  const __mmask64 upper = _mm512_movepi8_mask(codes);
  const __m512i a = value_bytes<B, 0>(codes, upper), b = value_bytes<B, 1>(codes, upper);
  const __m512i c = value_bytes<B, 2>(codes, upper), d = value_bytes<B, 3>(codes, upper);
  const __m512i low[] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
  const __m512i high[] = {_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)};
  for (int k = 0; k < 2; ++k) {
    const __m512 first = float_of(_mm512_unpacklo_epi16(low[k], high[k]));
    const __m512 second = float_of(_mm512_unpackhi_epi16(low[k], high[k]));
    _mm512_storeu_ps(to + 32 * k, _mm512_mul_ps(first, all_of(scale)));
    _mm512_storeu_ps(to + 32 * k + 16, _mm512_mul_ps(second, all_of(scale)));
  }
}

#endif

// Decodes the elements of whole vectors, and returns their number. Of four bits, of which the
// first element of a byte has the higher ones, all values there are fit a register.
template <class B>
inline std::size_t decode_vectors(const std::uint8_t* from, float scale, float* to, std::size_t n) {
  std::size_t i = 0;
  if constexpr (B::bits == 8) {
#if defined(__AVX512VBMI__)
    for (; i + 64 <= n; i += 64) decode_64<B>(from + i, scale, to + i);
#endif
    for (; i + 16 <= n; i += 16) {
      const void* const source = from + i;
      const __m128i codes = _mm_loadu_si128(static_cast<const __m128i*>(source));
      const __m512 value = values_of<B>(codes);
      _mm512_storeu_ps(to + i, _mm512_mul_ps(value, all_of(scale)));
    }
  } else {
    const __m128i each = _mm_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 map = _mm512_mul_ps(values_of<B>(each), all_of(scale));
    for (; i + 16 <= n; i += 16) {
      const void* const source = from + i / 2;
      const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(source));
      const __m512i pairs = _mm512_cvtepu8_epi64(bytes);
      // The shuffle takes the lowest four bits of each.
      const __m512i codes =
          _mm512_or_si512(_mm512_srli_epi64(pairs, 4), _mm512_slli_epi64(pairs, 32));
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(codes, map));
    }
  }
  return i;
}

// Four times sixteen codes as bytes; what is less than zero becomes zero.
inline __m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_epi32(order, packed);
}

// Encodes the elements of whole vectors, and returns their number. `random` is null where
// the nearest code is wanted.
template <class B>
inline std::size_t encode_vectors(const float* from, float scale_factor,
                                  const std::uint16_t* random, std::uint8_t* to, std::size_t n) {
  const __m512 factor = all_of(scale_factor);
  const auto codes = [&](std::size_t i) {
    const __m512 x = _mm512_loadu_ps(from + i), scaled = _mm512_mul_ps(x, factor);
    if (!random) return Sixteen<B>::nearest(x, scaled);
    const __m512i number = stochastic_number<B>(x, magnitude(scaled), random + i);
    return Sixteen<B>::code(number, _mm512_srai_epi32(bits_of(scaled), 31));
  };
  std::size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const __m512i bytes = bytes_of(codes(i), codes(i + 16), codes(i + 32), codes(i + 48));
    if constexpr (B::bits == 8) {
      _mm512_storeu_si512(to + i, bytes);
    } else {
      // The first of two has the higher four bits.
      const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x0110));
      void* const target = to + i / 2;
      _mm256_storeu_si256(static_cast<__m256i*>(target), _mm512_cvtepi16_epi8(pairs));
    }
  }
  return i;
}

#endif

}  // namespace
