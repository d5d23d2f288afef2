// A rule over arrays as they are stored: a chunk of each goes from memory through registers and
// back, so that conversions fill the time in which the divider works. (The driver's tiles go
// through the first-level cache once for each array and direction, and the divider waits.) What can
// be stored a tile at a time only, because of a scale or of random bits, is left to its codec, in
// tiles. Included by kernels.cpp alone.
#pragma once
#include "codecs.hpp"

namespace {

// Elements of each array at once: with 16 registers more of them take longer, with 32 fewer.
#if defined(FUSEDOPT_AVX512)
constexpr std::size_t AT_ONCE = CHUNK;
#else
constexpr std::size_t AT_ONCE = CHUNK / 2;
#endif

struct None;  // in place of a format: there is no such array
template <class B>
struct Blocks;  // a format whose elements share scales

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Formats of a parameter, its gradient, a first state, a second one (which is never negative), and
// a copy of the parameter.
template <class P, class G, class S, class V = S, class C = None>
struct Formats {
  using Parameter = P;
  using Gradient = G;
  using First = S;
  using Second = V;
  using Copy = C;
};

// Whether the instructions for a format would not store a chunk as the loops over elements do. A
// state is stored without denormals, which the instructions that tell them apart leave to those
// loops too.
template <class E, bool state, std::size_t N>
inline unsigned odd_chunk(const float (&from)[N]) {
  unsigned odd = 0;
  (void)from;
  if constexpr (constexpr std::size_t width = Vectors<E>::encoded; width > 0)
    for (std::size_t i = 0; i < N; i += width) odd |= Vectors<E>::template odd<state>(from + i);
  return odd;
}

// How a chunk of an array is loaded and stored. fast: there are instructions for it; without, the
// driver's tiles are faster.
template <class E>
struct Chunks {
  static constexpr bool fast = Vectors<E>::encoded > 0;
  static constexpr Conversion conversion = {decode_each<E, float>, encode_each<E, float>};

  template <std::size_t N>
  static void load(const Place& place, std::size_t at, float (&to)[N]) {
    const auto* const from = static_cast<const typename E::Stored*>(place.data) + at;
    if constexpr (constexpr std::size_t width = Vectors<E>::decoded; width > 0)
      for (std::size_t i = 0; i < N; i += width) Vectors<E>::decode(from + i, to + i);
    else
      for (std::size_t i = 0; i < N; ++i) to[i] = E::template decode<float>(from[i]);
  }
  template <bool state, std::size_t N>
  static unsigned odd(const float (&from)[N]) {
    return odd_chunk<E, state>(from);
  }
  template <bool state, std::size_t N>
  static void store(const float (&from)[N], unsigned odd, const Place& place, std::size_t at) {
    auto* const to = static_cast<typename E::Stored*>(place.data) + at;
    if constexpr (constexpr std::size_t width = Vectors<E>::encoded; width > 0)
      if (!odd) {
        for (std::size_t i = 0; i < N; i += width) Vectors<E>::store(from + i, to + i);
        return;
      }
    for (std::size_t i = 0; i < N; ++i)
      to[i] = E::nearest(state ? normal_or_zero(from[i]) : from[i]);
  }
};

template <class E>
struct PairChunks {
  static constexpr bool fast = Vectors<E>::encoded > 0;
  static constexpr Conversion conversion = {decode_pairs<E, float>, encode_pairs<E, float>};
  template <std::size_t N>
  static void load(const Place& place, std::size_t at, float (&to)[N]) {
    const std::uint16_t *const high = half(place.data, at), *const low = half(place.aux, at);
    for (std::size_t i = 0; i < N; ++i) to[i] = E::decode(high[i], low[i]);
  }
  template <bool state, std::size_t N>
  static unsigned odd(const float (&from)[N]) {
    return odd_chunk<E, state>(from);
  }
  template <bool state, std::size_t N>
  static void store(const float (&from)[N], unsigned odd, const Place& place, std::size_t at) {
    static_assert(!state, "parameters alone have the format");
    std::uint16_t *const high = half(place.data, at), *const low = half(place.aux, at);
    if constexpr (constexpr std::size_t width = Vectors<E>::encoded; width > 0)
      if (!odd) {
        for (std::size_t i = 0; i < N; i += width) Vectors<E>::store(from + i, high + i, low + i);
        return;
      }
    for (std::size_t i = 0; i < N; ++i) E::encode(from[i], high[i], low[i]);
  }

 private:
  static std::uint16_t* half(void* data, std::size_t at) {
    return static_cast<std::uint16_t*>(data) + at;
  }
};
template <>
struct Chunks<Split16> : PairChunks<Split16> {};
template <>
struct Chunks<Kahan> : PairChunks<Kahan> {};

// What is stored as it is computed.
struct Computed {
  static constexpr bool fast = true;
  template <bool, std::size_t N>
  static unsigned odd(const float (&)[N]) {
    return 0;
  }
  template <bool state, std::size_t N>
  static void put(const float (&from)[N], void* data, std::size_t at) {
    float* const to = static_cast<float*>(data) + at;
#if defined(FUSEDOPT_AVX512)
    // One operation less than GCC's own.
    for (std::size_t i = 0; i < N; i += 16) {
      const __m512 x = _mm512_loadu_ps(from + i);
      const __mmask16 kept = _mm512_test_epi32_mask(bits_of(x), all_of(INFINITE));
      _mm512_storeu_ps(to + i, state ? _mm512_maskz_mov_ps(kept, x) : x);
    }
#else
    for (std::size_t i = 0; i < N; ++i) to[i] = state ? normal_or_zero(from[i]) : from[i];
#endif
  }
};

template <>
struct Chunks<Plain<float>> : Computed {
  static constexpr Conversion conversion = {};
  template <std::size_t N>
  static void load(const Place& place, std::size_t at, float (&to)[N]) {
    const float* const from = static_cast<const float*>(place.data) + at;
    for (std::size_t i = 0; i < N; ++i) to[i] = from[i];
  }
  template <bool state, std::size_t N>
  static void store(const float (&from)[N], unsigned, const Place& place, std::size_t at) {
    put<state>(from, place.data, at);
  }
};

template <>
struct Chunks<None> : Computed {
  template <bool, std::size_t N>
  static void store(const float (&)[N], unsigned, const Place&, std::size_t) {}
};

struct Tiled : Computed {
  template <bool state, std::size_t N>
  static void store(const float (&from)[N], unsigned, const Place& place, std::size_t at) {
    put<state>(from, place.tiles, at);
  }
};

template <class E>
struct Chunks<Stochastic<E>> : Tiled {
  static constexpr bool fast = Vectors<Stochastic<E>>::encoded > 0;
  static constexpr Conversion conversion = {decode_each<E, float>, nullptr, true};
  template <std::size_t N>
  static void load(const Place& place, std::size_t at, float (&to)[N]) {
    Chunks<E>::load(place, at, to);
  }
};

template <class B>
struct Chunks<Blocks<B>> : Tiled {
  static constexpr bool fast = LOOK_UPS;
  static constexpr Conversion conversion = {decode_blocks<B, float>, nullptr, true};
  template <std::size_t N>
  static void load(const Place& place, std::size_t at, float (&to)[N]) {
    static_assert(B::block % N == 0, "a chunk has one scale");
    const float scale = static_cast<const float*>(place.aux)[at / B::block];
    decode_block<B>(static_cast<const std::uint8_t*>(place.data) + bytes_of<B>(at), scale, to, N);
  }
};

template <class F, std::size_t K>
struct StateChunks : Chunks<typename F::Second> {};
template <class F>
struct StateChunks<F, 0> : Chunks<typename F::First> {};

template <class C>
constexpr Encode copying() {
  if constexpr (same<C, None>)
    return nullptr;
  else
    return copy_each<C, float>;
}

template <class F>
constexpr Combination combination() {
  return {Chunks<typename F::Parameter>::conversion,
          {Chunks<typename F::First>::conversion, Chunks<typename F::Second>::conversion},
          Chunks<typename F::Gradient>::conversion.decode,
          copying<typename F::Copy>()};
}

template <class... F>
struct FormatsList {
  static_assert(sizeof...(F) == COMBINATIONS, "as many as the table has place for");
  static constexpr Combination all[] = {combination<F>()...};
};

// Low precision throughout; float32 masters of a model in bfloat16; a bfloat16 that carries the
// rest of its float, whole or rounded; states in eight bits and in four.
using Directly = FormatsList<
    Formats<BFloat16, BFloat16, BFloat16>, Formats<Float16, Float16, Float16>,
    Formats<Stochastic<BFloat16>, BFloat16, Stochastic<BFloat16>>,
    Formats<Plain<float>, BFloat16, Plain<float>, Plain<float>, BFloat16>,
    Formats<Split16, BFloat16, Plain<float>>, Formats<Kahan, BFloat16, Plain<float>>,
    Formats<Plain<float>, Plain<float>, Blocks<E4M3>, Blocks<E5M3>>,
    Formats<Plain<float>, Plain<float>, Blocks<SignedDynamic<8, 256>>, Blocks<UnsignedDynamic8>>,
    Formats<Plain<float>, Plain<float>, Blocks<SignedDynamic<4, 128>>, Blocks<UnsignedDynamic4>>>;

// Whether a rule has a loop for such formats: without states some are float32 alone.
template <class Rule, class F>
constexpr bool worthwhile =
    Chunks<typename F::Parameter>::fast && Chunks<typename F::First>::fast &&
    Chunks<typename F::Copy>::fast &&
    (Rule::states > 0 || !same<typename F::Parameter, typename F::Gradient> ||
     !same<typename F::Parameter, Plain<float>>);

}  // namespace
