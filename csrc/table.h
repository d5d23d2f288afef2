// The structs that cross the border between the instruction sets: plain, nothing inline.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fusedopt {

// Codecs work on whole tiles of this many elements each: a few of them, decoded, are some KiB, so a
// program's operands stay in the first-level cache between its operations.
constexpr std::size_t TILE = 256;
constexpr int MAX_OPERANDS = 20;

// Sums over a leaf are taken in float64, in LANES lanes: element i of a segment goes to lane
// i % LANES, lanes are added pairwise at the segment's end, and segments in order. So no bit of a
// sum depends on the width of vectors, on tiles or on threads.
constexpr std::size_t LANES = 16, SEGMENT = 1 << 14;
static_assert(TILE % LANES == 0 && SEGMENT % TILE == 0, "a lane goes on from tile to tile");

// The codecs of NumPy's own arrays come first, in this order; those of the first COMPUTE_TYPES are
// also computed in.
enum Format : std::uint8_t { F32, F64, BF16, F16, FORMATS };
constexpr int COMPUTE_TYPES = 2;

// Treatments of weight decay, and of the delta that the rule returns, by the loop around a rule.
enum Mode : std::uint8_t {
  PLAIN,      // p -= delta
  L2,         // g += c * p before the rule, then p -= delta
  DECOUPLED,  // p -= c * p + delta
  FIRST,      // p *= c before the rule, then p -= delta: PyTorch's order
  CAUTIOUS,   // p -= c * p + delta, or only delta where that has the other sign
  PEEK,       // out = delta; neither p nor a state is written
  PEEK_L2,    // the same with g += c * p before the rule
  MODES
};

// One operation on one tile, every operand already in the compute type. Operand order: the
// parameter, the gradient, the states, and in the PEEK modes the output; for a sum its lanes, in
// float64, and what it sums over; for a measurement the lanes of each of its sums, and then a
// rule's operands; for other operations what their structs say. Scalars: the struct's fields,
// behind (factor on the gradient, decay coefficient c) for a rule or a measurement and behind that
// factor for a filter.
using TileFunction = void (*)(void* const* operands, const void* scalars, std::size_t n);

struct Functions {
  TileFunction mode[MODES];
};

// Where an array lies: its elements as they are stored, what is stored beside them, and tiles to
// which a loop writes the new ones, in float32, where it leaves storing them to their codec.
struct Place {
  void *data, *aux, *tiles;
};

// A rule's loop over arrays as they are stored, in one combination of formats. Operands: the
// parameter, the gradient, the states, a copy of the parameter. n: a multiple of CHUNK.
using DirectFunction = void (*)(const Place* operands, const void* scalars, std::size_t n);
constexpr int COMBINATIONS = 9;
constexpr std::size_t CHUNK = 64;
static_assert(TILE % CHUNK == 0, "only the last tile of a leaf ends within a chunk");

struct DirectFunctions {
  DirectFunction mode[MODES][COMBINATIONS];  // null where there is none
};

enum Kind : std::uint8_t {
  RULE,     // the loop writes the parameter as its mode says, and the first `written` states
  FILTER,   // of the gradient, which it takes over from the rule: writes its first operand
  SUM,      // adds to its first operand
  MEASURE,  // of a rule, before it runs: adds to its first `written` operands and writes nothing
  OTHER     // writes its first operand
};

struct Operation {
  const char* name;
  int operands;  // in every mode but PEEK and PEEK_L2, which have one more
  Kind kind;
  int written;  // of a rule: how many of its states, the first ones, are written; of a measurement:
                // how many sums it adds to
  int scalars;
  Functions compute[COMPUTE_TYPES];
  DirectFunctions direct;  // computed in float32
  // Of a sum, over a whole segment: what its lanes come to in the end goes to the first operand.
  TileFunction segment[COMPUTE_TYPES];
};

// One tile of n elements, from stored to compute type and back. aux: what is stored beside the
// elements (scales, low halves, compensation). key: for random bits.
using Decode = void (*)(const void* data, const void* aux, void* tile, std::size_t n);
using Encode = void (*)(const void* tile, void* data, void* aux, std::size_t n, std::uint64_t key);

// The conversions of an array's format; null for the compute type. tiled: a loop over arrays as
// they are stored leaves tiles for `encode`, whichever that is.
struct Conversion {
  Decode decode;
  Encode encode;
  bool tiled = false;
};

// Formats of a rule's operands; copy: of a copy of the parameter, null where there is none.
struct Combination {
  Conversion parameter, state[2];  // the first state, and others
  Decode gradient;
  Encode copy;
};

// A format in which arrays are stored.
struct Codec {
  const char* name;
  std::size_t bits;              // of an element
  std::size_t block, aux;        // a block has `block` elements and `aux` bytes beside them
  Decode decode[COMPUTE_TYPES];  // null where the array has the compute type
  Encode encode[COMPUTE_TYPES];  // the same
  Encode copy[COMPUTE_TYPES];    // of a parameter, into an array beside it; null if none has this
  Encode zero;                   // stores zeros; null where no gradient has the format
  bool random = false;           // takes a key
};

// Arrays of one length whose sum is divided by a number; the first stands for all, and an element's
// place among its bytes is that of the others' elements.
struct Summand {
  const char* data;
  std::size_t bytes;  // of an element
  Decode decode;      // null where the array has the compute type
};
struct Summands {
  const Summand* parts;
  std::size_t count;
  // A division by a power of two has the bits of the product with its inverse, and takes longer:
  // factor is 0 for any other divisor.
  double divisor, factor;
};

// Newton-Schulz steps x := (a + b A + c A^2) x, A = x x^T, of one matrix in C order.
struct NewtonSchulz {
  std::size_t rows, columns;
  const double* coefficients;  // a, b, c of each step
  int steps;
  double prescale, eps, factor;  // the norm is prescale * (that of the matrix) + eps
  bool by_row;                   // each row has its own norm ("aol")
};

// Replaces the matrix by factor times its iterate.
using Orthogonalize = void (*)(const NewtonSchulz& how, void* matrix, void* space);

struct Table {
  const Operation* operations;
  int operation_count;
  const Codec* codecs;
  int codec_count;
  Orthogonalize orthogonalize[COMPUTE_TYPES];
  std::size_t (*orthogonalize_space)(std::size_t rows, std::size_t columns);  // elements
  const Combination* combinations;  // COMBINATIONS of them
  Decode mean[COMPUTE_TYPES];       // data: in the first array; aux: the `Summands`
};

}  // namespace fusedopt
