// How stored elements become elements of the compute type, a tile at a time.
#pragma once
#include "table.h"

namespace {

template <class Stored, class T>
void decode(const void* stored, void* out, std::size_t n) {
  const Stored* __restrict from = static_cast<const Stored*>(stored);
  T* __restrict to = static_cast<T*>(out);
  for (std::size_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

}  // namespace
