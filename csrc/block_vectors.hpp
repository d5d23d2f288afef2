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
  static __m512i codes(__m512i numbers, const __m512 (&)[4]) { return numbers; }
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

// Byte `which` of each of 64 numbers.
#if defined(__AVX512VBMI__)
struct EveryFourth {
  alignas(64) std::uint8_t index[64] = {};
  constexpr explicit EveryFourth(int first) {
    for (int i = 0; i < 64; ++i) index[i] = static_cast<std::uint8_t>(first + 4 * (i % 32));
  }
};
template <int which>
inline __m512i bytes_of(const __m512i (&x)[4]) {
  static constexpr EveryFourth each(which);
  const __m512i index = _mm512_load_si512(each.index);
  const __m512i upper = _mm512_permutex2var_epi8(x[2], index, x[3]);
  return _mm512_inserti64x4(_mm512_permutex2var_epi8(x[0], index, x[1]),
                            _mm512_castsi512_si256(upper), 1);
}
#else
template <int which>
inline __m512i bytes_of(const __m512i (&x)[4]) {
  const auto byte = [&](int k) {
    return _mm512_and_si512(_mm512_srli_epi32(x[k], 8 * which), all_of(0xffu));
  };
  const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(byte(0), byte(1)),
                                             _mm512_packus_epi32(byte(2), byte(3)));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_epi32(order, packed);
}
#endif

// Bytes whose highest bits are the signs of 64 numbers.
inline __m512i signs_of(const __m512 (&x)[4]) {
  const __m512i bits[] = {bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
  return bytes_of<3>(bits);
}

// Rounds y, a magnitude, to four significant bits, ties to even, the first of which stands for
// `power`: the sum has room for no more. In the lowest byte of the result these bits and eight
// times the power's biased exponent are added up, and 4 + 8 * 20.
inline __m512i four_places(__m512i power, __m512 y) {
  // Added to a power of two, these bits multiply it by 1.5 * 2^20.
  const __m512 room = float_of(_mm512_add_epi32(power, all_of((20u << 23) + (1u << 22))));
  const __m512i sum = bits_of(_mm512_add_ps(room, y));
  return _mm512_add_epi32(sum, _mm512_srli_epi32(sum, 20));
}
// What is too much there where numbers begin with the bits alone at that biased exponent.
constexpr std::uint32_t too_much(std::uint32_t exponent) { return 8 * (exponent + 20) + 4; }
inline __m512i exponent_of(__m512 x) { return _mm512_and_si512(bits_of(x), all_of(INFINITE)); }

template <>
struct Sixteen<E4M3> {
  static constexpr std::uint32_t EXCESS = too_much(121);
  static __m512i number(__m512 y) {
    return _mm512_and_si512(_mm512_sub_epi32(rounded(y), all_of(EXCESS)), all_of(0xffu));
  }
  // As a float16 a number is 2^8 times too small.
  static __m512 value(__m512i number) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_slli_epi32(number, 7));
    return _mm512_mul_ps(_mm512_cvtph_ps(halves), all_of(256.0f));
  }
  static __m512i nearest(__m512, __m512 scaled) { return rounded(scaled); }
  static __m512i codes(__m512i numbers, const __m512 (&scaled)[4]) {
    const __m512i exact = _mm512_sub_epi8(numbers, _mm512_set1_epi8(static_cast<char>(EXCESS)));
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    return _mm512_or_si512(exact, _mm512_and_si512(signs_of(scaled), sign));
  }
  static __m512i code(__m512i number, __m512i negative) {
    return _mm512_or_si512(number, _mm512_and_si512(negative, all_of(0x80u)));
  }

 private:
  static __m512i rounded(__m512 x) {
    // Denormals have the distance of the smallest normal numbers.
    const __m512i power = _mm512_max_epu32(exponent_of(x), bits_of(all_of(0.015625f)));
    return four_places(power, magnitude(x));
  }
};

template <>
struct Sixteen<E5M3> : UnsignedSixteen {
  static __m512i number(__m512 y) {
    const __m512 least = magnitude_from(y, E5M3::SMALLEST);
    const __m512i places = four_places(exponent_of(least), least);
    return _mm512_and_si512(_mm512_sub_epi32(places, all_of(EXCESS)), all_of(0xffu));
  }
  static __m512 value(__m512i number) {
    const __mmask16 some = _mm512_test_epi32_mask(number, number);
    const __m512i rebased = _mm512_add_epi32(number, all_of(E5M3::OFFSET));
    return float_of(_mm512_maskz_slli_epi32(some, rebased, 20));
  }
  static __m512i nearest(__m512 x, __m512 scaled) {
    const __m512 y = magnitude_from(scaled, E5M3::SMALLEST);
    return _mm512_maskz_sub_epi32(not_zero(x), four_places(exponent_of(y), y), all_of(EXCESS));
  }

 private:
  static constexpr std::uint32_t EXCESS = too_much(112);
};

// Each cell [2^2k, 2^(2k+2)) of 2^-31 to 2 holds at most one of the thresholds at which a decade
// begins; counted among these are what is not rounded to zero, and what is rounded to 1. From
// `first[cell]` less the bits of a number the places are left, of the upper six bits, by which a
// float's mantissa is to be shifted: 23 - I in decade I. By these places (modulo 16) the slope, in
// units of the decade's number of values; by exponent the power of ten.
template <int FIRST, int TOP>
struct DecadeTables {
  using Map = Dynamic<FIRST, TOP>;
  alignas(64) std::uint32_t first[16] = {};
  alignas(64) float slope[16] = {}, ten[16] = {};

  template <int... I>
  constexpr DecadeTables(float least, std::integer_sequence<int, I...>) {
    std::uint32_t cell = 0, places = 24 - FIRST;
    const auto begin = [](std::uint32_t k) { return (48 + k) << 24; };
    const auto go_on = [&](std::uint32_t until) {
      for (; cell < 16 && begin(cell) < until; ++cell) {
        const std::uint32_t end = begin(cell + 1);
        first[cell] = (places << 26) - 1 + (until < end ? until : end);
        places -= until < end;
      }
    };
    go_on(bits_of(least));
    ((I > FIRST ? go_on(bits_of(Map::template threshold<I>)) : void()), ...);
    go_on(bits_of(Map::ALL));
    go_on(bits_of(2.0f));
    ((slope[(23 - I) % 16] = I < FIRST ? 0.0f : Map::template slope<I> / (1 << I)), ...);
    slope[(23 - TOP - 1) % 16] = 0.1125f / Map::ALL;  // a little more than 1
    ((ten[(I + 127) % 16] = I < FIRST ? 0.0f : Map::template ten<I>), ...);
    ten[(TOP + 1 + 127) % 16] = 10.0f;  // more than 1
  }
};

template <int FIRST, int TOP>
struct SixteenPlaces {
  // Of magnitudes from 2^-31 on.
  static __m512i number(const DecadeTables<FIRST, TOP>& tables, __m512 y) {
    const __m512i cell = _mm512_srli_epi32(bits_of(y), 24);
    const __m512i first = _mm512_permutexvar_epi32(cell, _mm512_load_si512(tables.first));
    const __m512i places = _mm512_srli_epi32(_mm512_sub_epi32(first, bits_of(y)), 26);
    const __m512 slope = _mm512_permutexvar_ps(places, _mm512_load_ps(tables.slope));
    const __m512 ninth = all_of(static_cast<float>(1.0 / 9.0));
    const __m512 inside = _mm512_sub_ps(_mm512_mul_ps(y, slope), ninth);
    // From 1 to 2 within the decade; between its end and the next one's threshold it is more.
    const __m512i line = bits_of(_mm512_add_ps(inside, all_of(1.0f)));
    const __m512i last = _mm512_min_epu32(line, all_of(bits_of(2.0f) - 1));
    return _mm512_srlv_epi32(_mm512_and_si512(last, all_of(0xffffffu)), places);
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

// Where a format has few numbers, each has a cell of its own for the least magnitude that it is the
// nearest to: the first four bits of the magnitude plus 1/16. `first[cell]` plus the bits of a
// magnitude in the cell has its number for the upper six bits.
template <class B>
struct NumberTables {
  static constexpr float SHIFT = 0.0625f;
  alignas(64) std::uint32_t first[32] = {};
  static constexpr std::uint32_t cell(std::uint32_t bits) {
    return bits_of(float_of(bits) + SHIFT) >> 21;
  }
  static constexpr std::uint32_t least(std::uint32_t number) {
    std::uint32_t low = 0, high = bits_of(1.0f);
    while (low < high) {
      const std::uint32_t middle = low + (high - low) / 2;
      if (B::number(float_of(middle)) < number)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
  constexpr NumberTables() {
    for (std::uint32_t number = 1; number <= B::most; ++number)
      for (std::uint32_t at = cell(least(number)); at < bits_of(2.0f) >> 21; ++at)
        first[at % 32] = (number << 26) - least(number);
  }
  constexpr bool distinct() const {
    for (std::uint32_t number = 1; number < B::most; ++number)
      if (cell(least(number)) == cell(least(number + 1))) return false;
    return cell(0) == cell(least(1));
  }
};

template <int BITS, int BLOCK>
struct Sixteen<SignedDynamic<BITS, BLOCK>> {
  using B = SignedDynamic<BITS, BLOCK>;
  using Places = SixteenPlaces<0, BITS - 2>;
  static constexpr DecadeTables<0, BITS - 2> tables{static_cast<float>(B::SMALLEST / 2),
                                                    std::make_integer_sequence<int, BITS - 1>()};
  static __m512i number(__m512 y) {
    if constexpr (BITS == 4) {
      static constexpr NumberTables<B> numbers;
      static_assert(numbers.distinct(), "one cell, one threshold");
      const __m512 from = magnitude_from(y, B::SMALLEST / 4);
      const __m512 shifted = _mm512_add_ps(from, all_of(numbers.SHIFT));
      const __m512i first = _mm512_permutex2var_epi32(_mm512_load_si512(numbers.first),
                                                      _mm512_srli_epi32(bits_of(shifted), 21),
                                                      _mm512_load_si512(numbers.first + 16));
      return _mm512_srli_epi32(_mm512_add_epi32(first, bits_of(from)), 26);
    } else {
      return Places::number(tables, magnitude_from(y, 1.0 / (1u << 31)));
    }
  }
  static __m512 value(__m512i number) { return Places::value(tables, number); }
  static __m512i nearest(__m512, __m512 scaled) { return number(scaled); }
  static __m512i codes(__m512i numbers, const __m512 (&scaled)[4]) {
    const __m512i middle = _mm512_set1_epi8(static_cast<char>(B::MIDDLE));
    const __mmask64 negative = _mm512_movepi8_mask(signs_of(scaled));
    const __m512i above = _mm512_add_epi8(middle, numbers);
    return _mm512_mask_subs_epu8(above, negative, middle, numbers);
  }
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
  static constexpr DecadeTables<1, 7> tables{static_cast<float>(UnsignedDynamic8::SMALLEST),
                                             std::make_integer_sequence<int, 8>()};
  // What is less than the least value, but not zero, becomes the least value.
  static __m512i number(__m512 y) { return _mm512_sub_epi32(place(y), all_of(1u)); }
  static __m512 value(__m512i number) {
    return Places::value(tables, _mm512_add_epi32(number, all_of(1u)));
  }
  static __m512i nearest(__m512 x, __m512 scaled) {
    return _mm512_maskz_sub_epi32(not_zero(x), place(scaled), all_of(1u));
  }

 private:
  static __m512i place(__m512 y) {
    return Places::number(tables, magnitude_from(y, UnsignedDynamic8::SMALLEST));
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

// Encodes the elements of whole vectors, and returns their number. `random` is null where
// the nearest code is wanted.
template <class B>
inline std::size_t encode_vectors(const float* from, float scale_factor,
                                  const std::uint16_t* random, std::uint8_t* to, std::size_t n) {
  using S = Sixteen<B>;
  std::size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512 scaled[4];
    __m512i numbers[4], codes;
    for (std::size_t k = 0; k < 4; ++k) {
      const __m512 x = _mm512_loadu_ps(from + i + 16 * k);
      scaled[k] = _mm512_mul_ps(x, all_of(scale_factor));
      if (!random) {
        numbers[k] = S::nearest(x, scaled[k]);
      } else {
        const __m512i number = stochastic_number<B>(x, magnitude(scaled[k]), random + i + 16 * k);
        numbers[k] = S::code(number, _mm512_srai_epi32(bits_of(scaled[k]), 31));
      }
    }
    codes = random ? bytes_of<0>(numbers) : S::codes(bytes_of<0>(numbers), scaled);
    if constexpr (B::bits == 8) {
      _mm512_storeu_si512(to + i, codes);
    } else {
      // The first of two has the higher four bits.
      const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));
      void* const target = to + i / 2;
      _mm256_storeu_si256(static_cast<__m256i*>(target), _mm512_cvtepi16_epi8(pairs));
    }
  }
  return i;
}

#endif

}  // namespace
