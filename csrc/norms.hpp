// Sums of squares of whole inputs: norms, and whether all is finite.
#pragma once
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.hpp"
#include "cpu.hpp"
#include "driver.hpp"

namespace fusedopt {
namespace {

// Runs the leaves, for long ones without Python's lock; whoever holds the arrays alive is the
// caller's affair. Handing the lock over costs 0.07 us, as much as 350 elements.
void run_unlocked(std::vector<Leaf>& leaves, std::size_t elements, int threads,
                  const Mapped* mapped = nullptr, ThreadChoice* choice = nullptr) {
  constexpr std::size_t SHORT = 1 << 13;
  if (elements < SHORT) {
    run(leaves, threads, mapped, choice);
  } else {
    const py::gil_scoped_release unlocked;
    run(leaves, threads, mapped, choice);
  }
}

// The sums of one run's leaves, one after the other. Reads what the run has put into `data` of the
// operands that are sums.
class Partials {
 public:
  // Gives each sum of the leaf its place; `operands` are the leaf's.
  void add(const Leaf& leaf, Operand* operands) {
    for (int k = 0; k < leaf.operand_count; ++k)
      if (leaf.summed >> k & 1) {
        wanted_.push_back({&operands[k], size_});
        size_ += sums_of(leaf);
      }
  }
  void place() {
    values_.assign(size_, 0.0);  // of segments that are not touched, too
    for (const auto& [operand, at] : wanted_)
      operand->data = reinterpret_cast<char*>(values_.data() + at);
  }
  // In index order.
  static double total(const Leaf& leaf, const Operand& operand) {
    const double* const values = reinterpret_cast<const double*>(operand.data);
    double total = 0;
    for (std::size_t k = 0, count = sums_of(leaf); k < count; ++k) total += values[k];
    return total;
  }
  void clear() {
    wanted_.clear();
    size_ = 0;
  }

 private:
  struct Wanted {
    Operand* operand;
    std::size_t at;
  };
  std::vector<Wanted> wanted_;
  std::vector<double> values_;
  std::size_t size_ = 0;
};

// One array, and what `square_sums` finds: the sum of the squares of its elements times scale, a
// power of two; not finite where an element is not.
struct Measured {
  Operand input;
  std::size_t elements;
  int compute;
  const Rows* rows;
  double sum = 0, scale = 1;
};

const Operation& operation_named(const char* name) {
  const Table& table = *level().table;
  const Operation* op = table.operations;
  while (std::strcmp(op->name, name) != 0) ++op;
  return *op;
}

void square_sums(const std::vector<Measured*>& inputs, int threads) {
  const Operation& squares = operation_named("squares");
  constexpr std::uint8_t ORDER[] = {0, 1};  // the sum, the input
  std::vector<Leaf> leaves;
  std::vector<Step> steps;
  std::vector<Operand> operands;
  std::vector<float> narrow(inputs.size(), 1.0f);
  Partials partials;
  steps.reserve(inputs.size());
  operands.reserve(2 * inputs.size());
  std::size_t elements = 0;
  for (std::size_t k = 0; k < inputs.size(); ++k) {
    const Measured& m = *inputs[k];
    Operand sum;
    sum.role = Role::SUMS;
    operands.push_back(sum);
    operands.push_back(m.input);
    const void* const scalars = m.compute == F32 ? static_cast<const void*>(&narrow[k]) : &m.scale;
    steps.push_back({squares.compute[m.compute].mode[PLAIN], scalars, ORDER, 2});
    leaves.push_back({m.elements, &operands[2 * k], &steps[k], 2, 1, 3, 0, 1, m.rows, 0});
    partials.add(leaves.back(), &operands[2 * k]);
    elements += m.elements;
  }
  partials.place();
  run_unlocked(leaves, elements, threads);
  for (std::size_t k = 0; k < inputs.size(); ++k)
    inputs[k]->sum = Partials::total(leaves[k], operands[2 * k]);
}

// The same, and once more for float64 arrays whose squares left the range.
void measure(std::vector<Measured>& inputs, int threads) {
  std::vector<Measured*> all, again;
  for (Measured& m : inputs) all.push_back(&m);
  square_sums(all, threads);
  for (Measured& m : inputs) {
    if (m.compute != F64 || (m.sum >= 0x1p-900 && m.sum <= 0x1p1023)) continue;
    m.scale = m.sum < 1 ? 0x1p600 : 0x1p-600;
    again.push_back(&m);
  }
  if (!again.empty()) square_sums(again, threads);
}

}  // namespace
}  // namespace fusedopt
