// Leaves -> parts -> tiles -> programs. Knows nothing of Python.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "table.h"

namespace fusedopt {

// One array of a leaf. A null `decode` means that it already has the compute type.
struct Operand {
  char* data;
  Decode decode;
  std::size_t size;  // bytes per stored element
};

// One operation of a leaf's program; `operands` are indices into the leaf's operands.
struct Step {
  TileFunction run;
  const void* scalars;
  const std::uint8_t* operands;
  int operand_count;
};

struct Leaf {
  std::size_t elements;
  const Operand* operands;
  const Step* steps;
  int operand_count, step_count;
  std::size_t start;  // in the concatenation of all leaves; `run` finds it
};

// Runs every leaf's program over all of its elements, in one parallel region. The result does not
// depend on `threads` or on how the leaves are cut.
void run(std::vector<Leaf>& leaves, int threads);

}  // namespace fusedopt
