// Conversions by the instructions that some levels have for them, a vector at a time: the bits are
// those of the loops over one element in codecs.hpp (tests/build/exhaustive.cpp compares all there
// are). The intrinsics' headers hold nothing but functions that are always inlined, so they are the
// ones that kernels.cpp may include beside the plain C headers.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FUSEDOPT_AVX512
#endif
#if defined(__F16C__) || (defined(_MSC_VER) && defined(__AVX2__))
#define FUSEDOPT_F16C
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined values that its own header passes on.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__GNUC__)
#define FUSEDOPT_NEON
#include <arm_neon.h>
#endif

namespace {

struct BFloat16;
struct Float16;
struct Split16;
struct Kahan;
template <class Element>
struct Stochastic;

// The number of elements that one call decodes, or encodes; 0 where the compiler's own
// loop is as good. `nearest` answers false, and has stored nothing, where a vector holds what the
// instruction treats in a way of its own: then the loop over single elements takes the vector.
template <class Element>
struct Vectors {
  static constexpr std::size_t decoded = 0, encoded = 0;
};

// `nearest` in two halves. `odd` answers whether a vector holds such an element; of a state, which
// is stored without denormals and with no sign of what became zero, also whether it holds one that
// `store` would not store so.
template <class Own>
struct Halved {
  template <class... Stored>
  static bool nearest(const float* from, Stored*... to) {
    if (Own::template odd<false>(from)) return false;
    Own::store(from, to...);
    return true;
  }
};

#if defined(FUSEDOPT_AVX512)

// The classes that `_mm512_fpclass_ps_mask` tells apart.
enum : int { NANS = 0x81, NEGATIVE_ZERO = 0x04, INFINITIES = 0x18, DENORMALS = 0x20 };

// Whether any of 32 elements is in these classes, or in two more that no state may be in.
template <bool state, int classes>
inline unsigned in_classes(const float* from) {
  constexpr int all = classes | (state ? NEGATIVE_ZERO | DENORMALS : 0);
  return _mm512_fpclass_ps_mask(_mm512_loadu_ps(from), all) |
         _mm512_fpclass_ps_mask(_mm512_loadu_ps(from + 16), all);
}

// NaN has one code here, with its sign.
template <>
struct Vectors<Float16> : Halved<Vectors<Float16>> {
  static constexpr std::size_t decoded = 32, encoded = 32;
  static void decode(const std::uint16_t* from, float* to) {
    _mm512_storeu_ps(to, _mm512_cvtph_ps(sixteen(from)));
    _mm512_storeu_ps(to + 16, _mm512_cvtph_ps(sixteen(from + 16)));
  }
  template <bool state>
  static unsigned odd(const float* from) {
    if constexpr (state) return in_classes<state, NANS>(from);
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), _CMP_UNORD_Q);
  }
  static void store(const float* from, std::uint16_t* to) {
    constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    void* const target = to;
    for (int k = 0; k < 2; ++k)
      _mm256_storeu_si256(static_cast<__m256i*>(target) + k,
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + 16 * k), rounding));
  }

 private:
  static __m256i sixteen(const std::uint16_t* from) {
    const void* const source = from;
    return _mm256_loadu_si256(static_cast<const __m256i*>(source));
  }
};

#elif defined(FUSEDOPT_F16C)

template <>
struct Vectors<Float16> : Halved<Vectors<Float16>> {
  static constexpr std::size_t decoded = 8, encoded = 8;
  static void decode(const std::uint16_t* from, float* to) {
    const void* const source = from;
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(source))));
  }
  template <bool state>
  static unsigned odd(const float* from) {
    const __m256 x = _mm256_loadu_ps(from);
    __m256 found = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    if constexpr (state) {
      const __m256i bits = _mm256_castps_si256(x), none = _mm256_setzero_si256();
      const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f800000));
      const __m256i small = _mm256_cmpeq_epi32(exponent, none);
      const __m256i other = _mm256_andnot_si256(_mm256_cmpeq_epi32(bits, none), small);
      found = _mm256_or_ps(found, _mm256_castsi256_ps(other));
    }
    return static_cast<unsigned>(_mm256_movemask_ps(found));
  }
  static void store(const float* from, std::uint16_t* to) {
    void* const target = to;
    _mm_storeu_si128(static_cast<__m128i*>(target),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  }
};

#elif defined(FUSEDOPT_NEON)

template <>
struct Vectors<Float16> : Halved<Vectors<Float16>> {
  static constexpr std::size_t decoded = 4, encoded = 4;
  static void decode(const std::uint16_t* from, float* to) {
    vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
  }
  template <bool state>
  static unsigned odd(const float* from) {
    const float32x4_t x = vld1q_f32(from);
    uint32x4_t found = vmvnq_u32(vceqq_f32(x, x));
    if constexpr (state) {
      const uint32x4_t bits = vreinterpretq_u32_f32(x);
      const uint32x4_t normal = vtstq_u32(bits, vdupq_n_u32(0x7f800000));
      found = vorrq_u32(found, vbicq_u32(vtstq_u32(bits, bits), normal));
    }
    return vmaxvq_u32(found);
  }
  static void store(const float* from, std::uint16_t* to) {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))));
  }
};

#endif

#if defined(FUSEDOPT_AVX512)

// The lower halves of 32 floats, or the upper ones.
inline __m512i halves(__m512i first, __m512i second, bool upper) {
  const __m512i lower_ones =
      _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                       24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i which = upper ? _mm512_add_epi16(lower_ones, _mm512_set1_epi16(1)) : lower_ones;
  return _mm512_permutex2var_epi16(first, which, second);
}

template <>
struct Vectors<Split16> : Halved<Vectors<Split16>> {
  static constexpr std::size_t decoded = 0, encoded = 32;
  template <bool state>
  static unsigned odd(const float* from) {
    if constexpr (state) return in_classes<state, NANS>(from);
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), _CMP_UNORD_Q);
  }
  static void store(const float* from, std::uint16_t* high, std::uint16_t* low) {
    const __m512i x = _mm512_loadu_si512(from), y = _mm512_loadu_si512(from + 16);
    const __m512i half = _mm512_set1_epi32(0x8000);
    _mm512_storeu_si512(high, halves(_mm512_add_epi32(x, half), _mm512_add_epi32(y, half), true));
    _mm512_storeu_si512(low, halves(x, y, false));
  }
};

// The upper half is one more where the random bits carry out of the lower one.
template <>
struct Vectors<Stochastic<BFloat16>> {
  static constexpr std::size_t encoded = 64;
  static bool nearest(const float* from, std::uint16_t* to, const std::uint16_t* random) {
    const __m512i all = _mm512_set1_epi16(-1);
    __m512i upper[2], rounded[2];
    for (int k = 0; k < 2; ++k, from += 32) {
      const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 16);
      const __m512i spare = _mm512_xor_si512(_mm512_loadu_si512(random + 32 * k), all);
      const __mmask32 carries = _mm512_cmpgt_epu16_mask(halves(a, b, false), spare);
      upper[k] = halves(a, b, true);
      rounded[k] = _mm512_mask_sub_epi16(upper[k], carries, upper[k], all);
      upper[k] = _mm512_add_epi16(upper[k], upper[k]);
    }
    // The least doubled magnitude, without a sign, that is or might become infinite or NaN.
    const __m512i last = _mm512_set1_epi16(static_cast<short>(2 * 0x7f7f));
    if (_mm512_cmpge_epu16_mask(_mm512_max_epu16(upper[0], upper[1]), last)) return false;
    for (int k = 0; k < 2; ++k) _mm512_storeu_si512(to + 32 * k, rounded[k]);
    return true;
  }
};

#endif

#if defined(FUSEDOPT_AVX512) && defined(__AVX512BF16__)

// The instruction takes denormals for zeros, and keeps some bits of a NaN.
template <>
struct Vectors<BFloat16> : Halved<Vectors<BFloat16>> {
  static constexpr std::size_t decoded = 32, encoded = 32;
  static void decode(const std::uint16_t* from, float* to) {
    const void* const source = from;
    for (int k = 0; k < 2; ++k) {
      const __m256i codes = _mm256_loadu_si256(static_cast<const __m256i*>(source) + k);
      _mm512_storeu_si512(to + 16 * k, _mm512_slli_epi32(_mm512_cvtepu16_epi32(codes), 16));
    }
  }
  template <bool state>
  static unsigned odd(const float* from) {
    return in_classes<state, NANS | DENORMALS>(from);
  }
  static void store(const float* from, std::uint16_t* to) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    std::memcpy(to, &rounded, sizeof rounded);
  }
};

// Where the bfloat16 is infinite, so is the rest.
template <>
struct Vectors<Kahan> : Halved<Vectors<Kahan>> {
  static constexpr std::size_t decoded = 0, encoded = 32;
  template <bool state>
  static unsigned odd(const float* from) {
    static_assert(!state, "parameters alone have the format");
    const Rest rest(from);
    constexpr int odd_rests = NANS | INFINITIES | DENORMALS;
    return in_classes<false, DENORMALS>(from) | _mm512_fpclass_ps_mask(rest.first, odd_rests) |
           _mm512_fpclass_ps_mask(rest.second, odd_rests);
  }
  static void store(const float* from, std::uint16_t* high, std::uint16_t* low) {
    const Rest rest(from);
    const __m512bh beside = _mm512_cvtne2ps_pbh(rest.second, rest.first);
    std::memcpy(high, &rest.near, sizeof rest.near);
    std::memcpy(low, &beside, sizeof beside);
  }

 private:
  // What 32 floats are off from the nearest bfloat16.
  struct Rest {
    __m512bh near;
    __m512 first, second;
    explicit Rest(const float* from) {
      const __m512 x = _mm512_loadu_ps(from), y = _mm512_loadu_ps(from + 16);
      near = _mm512_cvtne2ps_pbh(y, x);
      __m512i codes;
      std::memcpy(&codes, &near, sizeof codes);
      first = _mm512_sub_ps(x, upper(codes, 0));
      second = _mm512_sub_ps(y, upper(codes, 16));
    }
    static __m512 upper(__m512i codes, int at) {
      const __m512i places = _mm512_slli_epi32(
          _mm512_add_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                           _mm512_set1_epi32(at)),
          16);
      return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, codes));
    }
  };
};

#endif

}  // namespace
