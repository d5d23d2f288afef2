// A rule over arrays as they are stored, where all of them have formats of 16 bits or of the
// compute type: a chunk of each goes from memory through registers and back, so that conversions
// fill the time in which the divider works. (The driver's tiles go through the first-level cache
// once for each array and direction, and the divider waits.) Included by kernels.cpp alone.
#pragma once
#include "codecs.hpp"

namespace {

struct None;  // in place of a format: there is no such array

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class P, class G, class S, class C = None>
struct Formats {
  using Parameter = P;
  using Gradient = G;
  using State = S;
  using Copy = C;
};

template <class E>
constexpr Conversion conversion() {
  if constexpr (same<E, Split16>)
    return {decode_pairs<E, float>, encode_pairs<E, float>};
  else
    return {decode_each<E, float>, encode_each<E, float>};
}
template <>
constexpr Conversion conversion<Plain<float>>() {
  return {};
}

template <class C>
constexpr Encode copying() {
  if constexpr (same<C, None>)
    return nullptr;
  else
    return copy_each<C, float>;
}

template <class F>
constexpr Combination combination() {
  return {conversion<typename F::Parameter>(), conversion<typename F::State>(),
          conversion<typename F::Gradient>().decode, copying<typename F::Copy>()};
}

template <class... F>
struct FormatsList {
  static_assert(sizeof...(F) == COMBINATIONS, "as many as the table has place for");
  static constexpr Combination all[] = {combination<F>()...};
};

// Low precision throughout; float32 masters of a model in bfloat16; a bfloat16 that carries the
// rest of its float.
using Directly =
    FormatsList<Formats<BFloat16, BFloat16, BFloat16>, Formats<Float16, Float16, Float16>,
                Formats<Plain<float>, BFloat16, Plain<float>, BFloat16>,
                Formats<Split16, BFloat16, Plain<float>>>;

// Whether there are instructions that store the format: without, tiles are faster.
template <class E>
constexpr bool by_instructions = Vectors<E>::encoded > 0 || same<E, Plain<float>> || same<E, None>;

template <class E>
inline void load_chunk(const void* data, const void* aux, std::size_t at, float* to) {
  if constexpr (same<E, Split16>) {
    const std::uint16_t* const high = static_cast<const std::uint16_t*>(data) + at;
    const std::uint16_t* const low = static_cast<const std::uint16_t*>(aux) + at;
    for (std::size_t i = 0; i < CHUNK; ++i) to[i] = E::decode(high[i], low[i]);
  } else {
    const auto* const from = static_cast<const typename E::Stored*>(data) + at;
    if constexpr (constexpr std::size_t width = Vectors<E>::decoded; width > 0)
      for (std::size_t i = 0; i < CHUNK; i += width) Vectors<E>::decode(from + i, to + i);
    else
      for (std::size_t i = 0; i < CHUNK; ++i) to[i] = E::template decode<float>(from[i]);
  }
}

// Whether a chunk holds what the instructions would not store as the loops over elements do. A
// state is stored without denormals, which the instructions that tell them apart leave to those
// loops too.
template <class E, bool state>
inline unsigned odd_chunk(const float* from) {
  unsigned odd = 0;
  (void)from;
  if constexpr (constexpr std::size_t width = Vectors<E>::encoded; width > 0)
    for (std::size_t i = 0; i < CHUNK; i += width) odd |= Vectors<E>::template odd<state>(from + i);
  return odd;
}

template <class E, bool state>
inline void store_chunk(const float* from, unsigned odd, void* data, void* aux, std::size_t at) {
  (void)from, (void)odd, (void)data, (void)aux, (void)at;
  constexpr std::size_t width = Vectors<E>::encoded;
  const auto kept = [=](std::size_t i) { return state ? normal_or_zero(from[i]) : from[i]; };
  if constexpr (same<E, None>) {
  } else if constexpr (same<E, Split16>) {
    std::uint16_t* const high = static_cast<std::uint16_t*>(data) + at;
    std::uint16_t* const low = static_cast<std::uint16_t*>(aux) + at;
    if constexpr (width > 0)
      if (!odd) {
        for (std::size_t i = 0; i < CHUNK; i += width)
          Vectors<E>::store(from + i, high + i, low + i);
        return;
      }
    for (std::size_t i = 0; i < CHUNK; ++i) E::encode(kept(i), high[i], low[i]);
  } else {
    auto* const to = static_cast<typename E::Stored*>(data) + at;
    if constexpr (width > 0)
      if (!odd) {
        for (std::size_t i = 0; i < CHUNK; i += width) Vectors<E>::store(from + i, to + i);
        return;
      }
    for (std::size_t i = 0; i < CHUNK; ++i) to[i] = E::nearest(kept(i));
  }
}

}  // namespace
