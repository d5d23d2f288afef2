// Means of arrays, taken element by element where they are read.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "arrays.hpp"

namespace fusedopt {

// Flat arrays of any formats, whose sum, from the first to the last, is divided by a number. As the
// gradient of a leaf it is never in memory: each tile is added up when it is due.
class Mean {
 public:
  // Raises ValueError where the arrays are not flat, aligned, dense and of one length.
  Mean(const std::vector<py::object>& arrays, double divisor);
  Mean(const Mean&) = delete;
  Mean& operator=(const Mean&) = delete;

  std::size_t elements() const { return elements_; }

  // Whether none of the arrays overlaps a range for which `overlaps` says yes.
  template <class Overlaps>
  bool apart(const Overlaps& overlaps) const {
    for (const Summand& part : parts_)
      if (overlaps(Range{part.data, part.data + elements_ * part.bytes})) return false;
    return true;
  }

  // The operand that reads the mean, in the instruction set in use.
  void use(int compute, Operand& out);

  // Fills a flat array of a compute type; false where it does not fit, and nothing is written.
  bool write(const py::object& out);

 private:
  std::vector<py::object> held_;
  std::vector<int> formats_;
  std::vector<Summand> parts_;
  Summands summands_;
  std::size_t elements_;
};

// The mean that a Python object is, or null.
Mean* as_mean(PyObject* o);

void bind_means(py::module_& module);

}  // namespace fusedopt
