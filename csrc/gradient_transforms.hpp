// What is done to each gradient on its own, before the norm of all is found: its rows lose their
// means, then are kept within a share of the norms of the parameter's rows, and then its own norm
// is kept within a limit. As in fusedopt/step/gradient_transforms.py, bit for bit.
#pragma once
#include <memory>
#include <vector>

#include "norms.hpp"

namespace fusedopt {

// A leaf that takes part. gradient: describes the new one from `apply` to `restore`, where it is
// not the old one. rows: in C order, one index of the first axis each; 1 of an array with one axis.
struct Transformed {
  Operand* gradient;
  const Operand* parameter;
  std::size_t elements, rows;
  int compute, axes;
};

class GradientTransforms {
 public:
  // Limits of 0: none.
  GradientTransforms(double clip_leaf, double clip_adaptive, bool centralize)
      : clip_leaf_(clip_leaf), clip_adaptive_(clip_adaptive), centralize_(centralize) {}

  // factor: the inverse of the gradients' scale. Returns whether any gradient is another one now;
  // until `restore`. May raise std::bad_alloc, and runs no Python.
  bool apply(std::vector<Transformed>& leaves, double factor, int threads);
  // Lets all operands describe what they did before `apply`, and returns whether any did not. zero:
  // then also fills with zeros the gradients whose place a new one had taken.
  bool restore(bool zero);

 private:
  struct Change {
    Operand *place, before;
    std::size_t elements;
  };

  // Memory for the new gradient of leaf k, kept from step to step.
  char* buffer(std::size_t k, const Transformed& leaf);
  void change(Transformed& leaf, char* data);
  void transform_rows(std::vector<Transformed>& leaves, double factor, int threads);
  void clip_leaves(std::vector<Transformed>& leaves, double factor, int threads);
  void multiply_some(std::vector<Transformed>& leaves, const std::vector<char>& some,
                     const std::vector<double>& factors, const std::vector<std::size_t>* rows,
                     int threads);

  const double clip_leaf_, clip_adaptive_;
  const bool centralize_;
  std::vector<std::unique_ptr<char[]>> buffers_;
  std::vector<std::size_t> sizes_;  // of these
  std::vector<Change> changes_;
  SquareSums square_sums_;
};

}  // namespace fusedopt
