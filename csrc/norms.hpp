// Sums of squares of whole inputs: norms, and whether all is finite.
#pragma once
#include <vector>

#include "driver.hpp"

namespace fusedopt {

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
      put(operand->data, reinterpret_cast<char*>(values_.data() + at));
  }
  // In index order.
  static double total(const Leaf& leaf, int operand) {
    const double* const values = reinterpret_cast<const double*>(leaf.operands[operand].data);
    double total = of_nothing(leaf, operand);
    for (std::size_t k = 0, count = sums_of(leaf); k < count; ++k)
      total = of_both(leaf, operand, total, values[k]);
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

// One array, and what `SquareSums` finds: the sum of the squares of its elements times scale, a
// power of two; not finite where an element is not.
struct Measured {
  const Operand* input;
  std::size_t elements;
  int compute;
  const Rows* rows;
  double sum = 0, scale = 1;
};

// A pass over arrays that keeps its memory from one to the next.
class SquareSums {
 public:
  // Finds the sums of all, and a second time those of float64 arrays whose squares left the range.
  // choice: see `run`.
  void find(std::vector<Measured>& inputs, int threads, ThreadChoice* choice = nullptr);

 private:
  void pass(const std::vector<Measured*>& inputs, int threads, ThreadChoice* choice);

  std::vector<Measured*> all_, again_;
  std::vector<Leaf> leaves_;
  std::vector<Step> steps_;
  std::vector<Operand> operands_;  // of each leaf its sum and its input
  Partials partials_;
};

}  // namespace fusedopt
