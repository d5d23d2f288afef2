#include "stacks.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cpu.hpp"
#include "parallel.hpp"
#include "unlocked.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

struct Work {
  NewtonSchulz how;
  Orthogonalize run;
  char *stack, *space;
  std::size_t count, matrix_bytes, space_bytes, parts;
};

void work_on(void* context, std::size_t part) {
  const Work& w = *static_cast<Work*>(context);
  for (std::size_t k = part; k < w.count; k += w.parts)
    w.run(w.how, w.stack + k * w.matrix_bytes, w.space + part * w.space_bytes);
}

// Replaces each matrix of a stack (count, rows, columns) of float32 or float64, in C order, by
// factor times its iterate. coefficients: a, b, c of each step. space: flat, of the same dtype,
// with `orthogonalize_space` elements for each of at most `threads` parts of the work.
void orthogonalize(py::array stack, py::array space, const std::vector<double>& coefficients,
                   double prescale, double eps, double factor, bool by_row, int threads) {
  const bool narrow = stack.dtype().is(py::dtype::of<float>());
  if (!(narrow || stack.dtype().is(py::dtype::of<double>())) || !space.dtype().is(stack.dtype()) ||
      stack.ndim() != 3 || !(stack.flags() & space.flags() & py::array::c_style))
    throw py::type_error(
        "orthogonalize: expected a stack and space of float32 or of float64, in C order");
  const auto extent = [&](int k) { return static_cast<std::size_t>(stack.shape(k)); };
  const std::size_t count = extent(0), rows = extent(1), columns = extent(2);
  if (!stack.size()) return;
  const Table& table = *level().table;
  const std::size_t each = table.orthogonalize_space(rows, columns);
  const std::size_t parts = std::min({static_cast<std::size_t>(space.size()) / each, count,
                                      static_cast<std::size_t>(std::max(1, threads))});
  if (!parts) throw py::value_error("orthogonalize: too little space");
  const auto bytes = static_cast<std::size_t>(stack.itemsize());
  const int steps = static_cast<int>(coefficients.size() / 3);
  Work work{{rows, columns, coefficients.data(), steps, prescale, eps, factor, by_row},
            table.orthogonalize[narrow ? F32 : F64],
            static_cast<char*>(stack.mutable_data()),
            static_cast<char*>(space.mutable_data()),
            count,
            rows * columns * bytes,
            each * bytes,
            parts};
  unlocked([&] { parallel_for(parts, std::min(threads, parallel_limit()), work_on, &work); });
}

}  // namespace

void bind_stacks(py::module_& module) {
  module.def("orthogonalize", &orthogonalize);
  module.def("orthogonalize_space", [](std::size_t rows, std::size_t columns) {
    return level().table->orthogonalize_space(rows, columns);
  });
}

}  // namespace fusedopt
