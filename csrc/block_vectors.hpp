// Block formats, sixteen elements at a time with AVX-512: the same steps as the structs in
// codecs.hpp take on one element, where a table in a register replaces a row of selections.
// Included by codecs.hpp alone, behind these structs.
#pragma once
#include "vectors.hpp"

namespace {

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
  static __m512i code(__m512i number, __m512i negative) {
    return _mm512_or_si512(number, _mm512_and_si512(negative, all_of(0x80u)));
  }
  static __m512i number_of(__m512i code, __m512i& negative) {
    negative = _mm512_slli_epi32(code, 24);
    return _mm512_and_si512(code, all_of(0x7fu));
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
};

// Cells of [2^2k, 2^(2k+2)) from 2^-31 to 2 hold the beginning of one decade at most: by cell that
// threshold, and the decade below it; by decade the terms of its line; by exponent its power of
// ten.
template <int FIRST, int TOP>
struct DecadeTables {
  using Map = Dynamic<FIRST, TOP>;
  alignas(64) float threshold[16] = {}, slope[16] = {}, first[16] = {}, ninth[16] = {},
                    ten[16] = {};
  alignas(64) std::uint32_t below[16] = {};

  template <int... I>
  constexpr explicit DecadeTables(std::integer_sequence<int, I...>) {
    double start = 1.0 / (1u << 31);
    for (int cell = 0; cell < 16; ++cell, start *= 4) {
      threshold[cell] = 3e38f;
      below[cell] = FIRST;
      ((I > 0 && begin<I>() < start ? void(below[cell] = FIRST + I) : void()), ...);
      ((I > 0 && begin<I>() >= start && begin<I>() < 4 * start ? void(threshold[cell] = begin<I>())
                                                               : void()),
       ...);
    }
    ((slope[FIRST + I] = Map::template slope<FIRST + I>), ...);
    ((first[FIRST + I] = 1 << (FIRST + I)), ...);
    ((ninth[FIRST + I] = first[FIRST + I] * static_cast<float>(1.0 / 9.0)), ...);
    ((ten[(FIRST + I + 127) % 16] = Map::template ten<FIRST + I>), ...);
  }
  template <int I>
  static constexpr float begin() {
    return Map::template threshold<FIRST + I>;
  }
};
template <int FIRST, int TOP>
constexpr DecadeTables<FIRST, TOP> DECADES{std::make_integer_sequence<int, TOP - FIRST + 1>()};

template <int FIRST, int TOP>
struct SixteenPlaces {
  static constexpr const DecadeTables<FIRST, TOP>& tables = DECADES<FIRST, TOP>;

  static __m512i number(__m512 y) {
    const __m512 inside = _mm512_max_ps(y, all_of(1.0f / (1u << 31)));
    const __m512i cell = _mm512_srli_epi32(bits_of(inside), 24);
    const __m512 threshold = _mm512_permutexvar_ps(cell, _mm512_load_ps(tables.threshold));
    __m512i decade = _mm512_permutexvar_epi32(cell, _mm512_load_si512(tables.below));
    const __mmask16 next = _mm512_cmp_ps_mask(y, threshold, _CMP_GE_OQ);
    decade = _mm512_mask_add_epi32(decade, next, decade, all_of(1u));
    const __m512 slope = _mm512_permutexvar_ps(decade, _mm512_load_ps(tables.slope));
    const __m512 first = _mm512_permutexvar_ps(decade, _mm512_load_ps(tables.first));
    const __m512 ninth = _mm512_permutexvar_ps(decade, _mm512_load_ps(tables.ninth));
    const __m512 place = _mm512_sub_ps(_mm512_mul_ps(y, slope), ninth);
    const __m512 last = _mm512_sub_ps(first, all_of(0.5f));
    const __m512i found = _mm512_cvttps_epi32(_mm512_add_ps(first, _mm512_min_ps(place, last)));
    const __mmask16 all = _mm512_cmp_ps_mask(y, all_of(Dynamic<FIRST, TOP>::ALL), _CMP_GE_OQ);
    return _mm512_mask_mov_epi32(found, all, all_of(2u << TOP));
  }
  // Of number 0, whose exponent has no power of ten, zero.
  static __m512 value(__m512i number) {
    const __m512i half = bits_of(_mm512_add_ps(_mm512_cvtepi32_ps(number), all_of(0.5f)));
    const __m512 ten =
        _mm512_permutexvar_ps(_mm512_srli_epi32(half, 23), _mm512_load_ps(tables.ten));
    const __m512i fraction = _mm512_and_si512(half, all_of(0x7fffffu));
    const __m512 mantissa = float_of(_mm512_or_si512(fraction, bits_of(all_of(1.0f))));
    const __m512 line = _mm512_sub_ps(_mm512_mul_ps(mantissa, all_of(0.9f)), all_of(0.8f));
    const __mmask16 all = _mm512_cmpge_epu32_mask(number, all_of(2u << TOP));
    return _mm512_mask_mov_ps(_mm512_mul_ps(ten, line), all, all_of(1.0f));
  }
};

template <int BITS, int BLOCK>
struct Sixteen<SignedDynamic<BITS, BLOCK>> {
  using B = SignedDynamic<BITS, BLOCK>;
  using Places = SixteenPlaces<0, BITS - 2>;
  static __m512i number(__m512 y) {
    const __m512 least = all_of(static_cast<float>(B::SMALLEST / 2));
    return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(y, least, _CMP_GE_OQ), Places::number(y));
  }
  static __m512 value(__m512i number) { return Places::value(number); }
  static __m512i code(__m512i number, __m512i negative) {
    const __m512i last = _mm512_add_epi32(all_of(B::most), negative);
    const __m512i turned = _mm512_xor_si512(_mm512_min_epu32(number, last), negative);
    return _mm512_add_epi32(turned, _mm512_sub_epi32(all_of(B::MIDDLE), negative));
  }
  static __m512i number_of(__m512i code, __m512i& negative) {
    negative = _mm512_sub_epi32(code, all_of(B::MIDDLE));
    return _mm512_abs_epi32(negative);
  }
};

template <>
struct Sixteen<UnsignedDynamic8> : UnsignedSixteen {
  using Places = SixteenPlaces<1, 7>;
  static __m512i number(__m512 y) { return _mm512_sub_epi32(Places::number(y), all_of(1u)); }
  static __m512 value(__m512i number) {
    const __mmask16 some = _mm512_test_epi32_mask(number, number);
    return _mm512_maskz_mov_ps(some, Places::value(_mm512_add_epi32(number, all_of(1u))));
  }
};

template <>
struct Sixteen<UnsignedDynamic4> : UnsignedSixteen {
  static __m512i number(__m512 y) {
    const __m512 near = _mm512_add_ps(_mm512_mul_ps(y, all_of(16.0f)), all_of(0.5f));
    const __m512i least = _mm512_max_epu32(_mm512_cvttps_epi32(near), all_of(1u));
    return _mm512_sub_epi32(_mm512_min_epu32(least, all_of(16u)), all_of(1u));
  }
  static __m512 value(__m512i number) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(number, all_of(1u))), all_of(0.0625f));
  }
};

template <class B>
inline __m512i nearest_number(__m512 x, __m512 y) {
  const __m512i number = Sixteen<B>::number(y);
  if constexpr (B::least == 0) return number;
  const __mmask16 some = _mm512_test_epi32_mask(bits_of(x), all_of(~SIGN));
  return _mm512_maskz_max_epu32(some, number, all_of(B::least));
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
inline __m512 values_of(__m512i codes) {
  __m512i negative;
  const __m512 value = Sixteen<B>::value(Sixteen<B>::number_of(codes, negative));
  return float_of(_mm512_or_si512(bits_of(value), _mm512_and_si512(negative, all_of(SIGN))));
}

// Decodes the elements of whole vectors, and answers how many that were. Of four bits, of which the
// first element of a byte has the higher ones, all values there are fit a register.
template <class B>
inline std::size_t decode_vectors(const std::uint8_t* from, float scale, float* to, std::size_t n) {
  std::size_t i = 0;
  if constexpr (B::bits == 8) {
    for (; i + 16 <= n; i += 16) {
      const void* const source = from + i;
      const __m128i codes = _mm_loadu_si128(static_cast<const __m128i*>(source));
      const __m512 value = values_of<B>(_mm512_cvtepu8_epi32(codes));
      _mm512_storeu_ps(to + i, _mm512_mul_ps(value, all_of(scale)));
    }
  } else {
    const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
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

// Where the compiler's own loop takes longer.
template <class B, bool STOCHASTIC>
constexpr bool VECTORS_ENCODE = STOCHASTIC;
template <>
constexpr bool VECTORS_ENCODE<SignedDynamic<8, 256>, false> = true;
template <>
constexpr bool VECTORS_ENCODE<UnsignedDynamic8, false> = true;

template <class B, bool STOCHASTIC>
inline void encode_sixteen(const float* from, __m512 factor, const std::uint16_t* random,
                           std::uint8_t* to) {
  const __m512 x = _mm512_loadu_ps(from), scaled = _mm512_mul_ps(x, factor), y = magnitude(scaled);
  __m512i number;
  if constexpr (STOCHASTIC)
    number = stochastic_number<B>(x, y, random);
  else
    number = nearest_number<B>(x, y);
  const __m512i codes = Sixteen<B>::code(number, _mm512_srai_epi32(bits_of(scaled), 31));
  void* const target = to;
  if constexpr (B::bits == 8) {
    _mm_storeu_si128(static_cast<__m128i*>(target), _mm512_cvtepi32_epi8(codes));
  } else {
    const __m512i pairs =
        _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
    _mm_storel_epi64(static_cast<__m128i*>(target), _mm512_cvtepi64_epi8(pairs));
  }
}

#endif

}  // namespace
