// Leaves -> parts -> tiles -> programs. Knows nothing of Python.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "table.h"

namespace fusedopt {

// benchmarks/README.md says how to measure these two.
#ifndef FUSEDOPT_SERIAL
#define FUSEDOPT_SERIAL (1 << 16)
#endif
#ifndef FUSEDOPT_SMALLEST_PART
#define FUSEDOPT_SMALLEST_PART (1 << 14)
#endif
// Below this many elements one thread does it all.
constexpr std::size_t SERIAL = FUSEDOPT_SERIAL;
// A part is at least this long, so that handing parts out costs nothing.
constexpr std::size_t SMALLEST_PART = FUSEDOPT_SMALLEST_PART;

enum class Role : std::uint8_t {
  ARRAY,    // of the leaf, in place
  INPUT,    // one that comes with the step
  SCRATCH,  // a tile that lives as long as the tile's program
  SUMS      // lanes of a sum or maximum; data gets one double for each segment
};

// One array of a leaf.
struct Operand {
  Role role = Role::ARRAY;
  std::uint8_t random = 0;      // bytes of a decoded element where its codec takes random bits
  std::int16_t source = -1;     // the operand before this one whose tile it stores; -1: its own
  std::uint32_t bits = 0;       // of an element
  std::uint32_t aux_bytes = 0;  // of a tile
  char* data = nullptr;
  char* aux = nullptr;      // what the codec stores beside the elements
  Decode decode = nullptr;  // null: has the compute type already, is used where it lies
  Encode encode = nullptr;  // null: the same
  std::uint64_t key = 0;    // of this step's random bits
};

// Writes what differs alone. What describes a leaf is the same in nearly every step, and a cache
// line that is not written stays with all the threads that read it.
template <class T>
void put(T& place, const T& value) {
  if (place != value) place = value;
}

// One operation of a leaf's program; `operands` are indices into the leaf's operands.
struct Step {
  TileFunction run = nullptr;
  const void* scalars = nullptr;
  const std::uint8_t* operands = nullptr;
  int operand_count = 0;
  const DirectFunction* direct = nullptr;  // of each combination of formats; null: of none
  const Combination* combinations = nullptr;
  std::size_t each = 0;  // bytes from one row's scalars to the next one's; 0: all have the same
  TileFunction segment = nullptr;  // of a sum: see `Operation`
};

// Rows of a leaf that alone are touched, in ascending order: rows[k] has row from[k] of the inputs.
struct Rows {
  const std::int64_t *rows = nullptr, *from = nullptr;
  std::size_t length = 0, elements = 0;  // of a row, of the leaf
};

struct Leaf {
  std::size_t elements = 0;  // that are touched
  const Operand* operands = nullptr;
  const Step* steps = nullptr;
  int operand_count = 0, step_count = 0;
  std::uint32_t used = 0, written = 0, summed = 0;  // operands, as bits
  const Rows* rows = nullptr;                       // null: all
  std::size_t start = 0;     // in the concatenation of all leaves; `run` finds it
  std::uint32_t maxima = 0;  // those of `summed` that are no sums but maxima
  bool by_row = false;       // each of `rows` has its own sums, and may have its own scalars;
                             // columns are rows where the last axis is the slowest in memory
};

// What a sum, or a maximum, is of no elements.
inline double of_nothing(bool maximum) {
  return maximum ? -std::numeric_limits<double>::infinity() : 0.0;
}

// What it is of two parts. A NaN stays.
inline double of_both(bool maximum, double a, double b) {
  if (maximum) return b > a || b != b ? b : a;
  return a + b;
}

// The number of segments that elements have.
inline std::size_t segments(std::size_t elements) { return (elements + SEGMENT - 1) / SEGMENT; }

// The number of doubles that a sum over a leaf takes.
inline std::size_t sums_of(const Leaf& leaf) {
  if (!leaf.by_row) return segments(leaf.rows ? leaf.rows->elements : leaf.elements);
  const std::size_t length = leaf.rows->length;
  return leaf.elements ? leaf.elements / length * segments(length) : 0;
}

// Spreads the bits of x over all of the result (the finaliser of splitmix64).
inline std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}
constexpr std::uint64_t GOLDEN = 0x9e3779b97f4a7c15u;

// The key of one of many, from the key of all.
inline std::uint64_t subkey(std::uint64_t key, std::uint64_t index) {
  return mixed(key + (index + 1) * GOLDEN);
}

struct Mapped;       // windows.hpp
class ThreadChoice;  // thread_choice.hpp

// Runs every leaf's program over all of its elements, in one parallel region. The result does not
// depend on `threads` or on how the leaves are cut. mapped: operands that lie in this block are in
// memory a window at a time. choice: of a step that comes again and again, whether one thread is
// enough.
void run(std::vector<Leaf>& leaves, int threads, const Mapped* mapped = nullptr,
         ThreadChoice* choice = nullptr);

// Bytes that belong to the elements of a leaf, in their order.
struct Extent {
  std::size_t start, elements;  // as in `Leaf`
  char* data;
  std::size_t bytes;
};

// Writes a zero into each page of the extents, on the thread whose share of a step over all of the
// elements has the page.
void touch(const std::vector<Extent>& extents, std::size_t elements, int threads);

}  // namespace fusedopt
