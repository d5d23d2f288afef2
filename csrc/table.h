// What crosses the border between the instruction sets: plain structs, nothing inline.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fusedopt {

// Codecs work on tiles of this many elements: a decoded tile of doubles is 2 KiB of stack, so a
// program's operands stay in the first-level cache between its operations.
constexpr std::size_t TILE = 256;
constexpr int MAX_OPERANDS = 8;

// The formats in which elements are stored; the first COMPUTE_TYPES are also computed in.
enum Format : std::uint8_t { F32, F64, FORMATS };
constexpr int COMPUTE_TYPES = 2;

// What the loop around a rule does with weight decay and with the delta that the rule returns.
enum Mode : std::uint8_t {
  PLAIN,      // p -= delta
  L2,         // g += c * p before the rule, then p -= delta
  DECOUPLED,  // p -= c * p + delta
  FIRST,      // p *= c before the rule, then p -= delta: PyTorch's order
  PEEK,       // out = delta; neither p nor a state is written
  PEEK_L2,    // the same with g += c * p before the rule
  MODES
};

// One operation on one tile, every operand already in the compute type. Operand order: the
// parameter, the gradient, the states, and in the PEEK modes the output; for an operation that is
// no rule, what its struct says. Scalars: the struct's fields, behind (factor on the gradient,
// decay coefficient c) for a rule.
using TileFunction = void (*)(void* const* operands, const void* scalars, std::size_t n);

struct Functions {
  TileFunction mode[MODES];
};

struct Operation {
  const char* name;
  int operands;  // in every mode but PEEK and PEEK_L2, which have one more
  int written;   // 0: a rule (writes what its mode says); else the first so many operands
  int scalars;
  Functions compute[COMPUTE_TYPES];
};

// Decodes n stored elements into the compute type.
using Decode = void (*)(const void* stored, void* out, std::size_t n);

struct Table {
  const Operation* operations;
  int count;
  Decode decode[FORMATS][COMPUTE_TYPES];  // null on the diagonal: such operands are not copied
};

}  // namespace fusedopt
