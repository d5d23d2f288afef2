// Sums of squares of whole inputs: norms, and whether all is finite.
#pragma once
#include <algorithm>
#include <vector>

#include "driver.hpp"

namespace fusedopt {

// The sums of a run's leaves, one after the other, by segments: what the run puts into `data` of
// the operands that are sums.
class Partials {
 public:
  // Gives each sum of the leaf its place; `operands` are the leaf's.
  void add(const Leaf& leaf, Operand* operands) {
    for (int k = 0; k < leaf.operand_count; ++k)
      if (leaf.summed >> k & 1) {
        wanted_.push_back({&operands[k], size_, (leaf.maxima >> k & 1) != 0});
        size_ += sums_of(leaf);
      }
  }
  // Of all that were added.
  void place() {
    values_.resize(size_);
    for (const Wanted& wanted : wanted_)
      put(wanted.operand->data, reinterpret_cast<char*>(values_.data() + wanted.at));
  }
  // Before each run: not all segments need be touched.
  void begin() { std::fill(values_.begin(), values_.end(), 0.0); }
  // The k-th sum that was added, its segments in index order; or of one of equal parts.
  double total(std::size_t k, std::size_t part = 0, std::size_t parts = 1) const {
    const bool maximum = wanted_[k].maximum;
    const std::size_t begin = wanted_[k].at;
    const std::size_t end = k + 1 < wanted_.size() ? wanted_[k + 1].at : size_;
    const std::size_t each = (end - begin) / parts;
    double total = of_nothing(maximum);
    for (std::size_t at = begin + part * each; at < begin + (part + 1) * each; ++at)
      total = of_both(maximum, total, values_[at]);
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
    bool maximum;
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

// The factor of float64's elements with which a sum of their squares stays in range; 1 where it has
// without.
inline double rescaling(double sum) {
  if (sum >= 0x1p-900 && sum <= 0x1p1023) return 1;
  return sum < 1 ? 0x1p600 : 0x1p-600;
}

// The sums of arrays, found again and again.
class SquareSums {
 public:
  // The arrays from now on; they are described where `inputs` has them, and stay there.
  void take(std::vector<Measured>& inputs);

  // Finds the sums of all, and a second time those of float64 arrays whose squares left the range.
  // choice: see `run`.
  void find(int threads, ThreadChoice* choice = nullptr);

 private:
  struct Pass {
    std::vector<Measured*> inputs;
    std::vector<Leaf> leaves;
    std::vector<Step> steps;
    std::vector<Operand> operands;  // of each leaf its sum and its input
    Partials partials;

    void prepare();
    void run(int threads, ThreadChoice* choice);
  };

  Pass all_, again_;
  bool wide_ = false;  // some are float64
};

}  // namespace fusedopt
