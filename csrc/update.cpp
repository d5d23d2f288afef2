#include "update.hpp"

#include <vector>

#include "arrays.hpp"
#include "cpu.hpp"
#include "norms.hpp"
#include "programs.hpp"
#include "python_driver.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

// One tensor, one step, in place; false where the arrays do not fit, and nothing was written then.
bool update(const Program& program, const py::tuple& folds, std::int64_t t, double lr,
            const py::object& gradient, const py::object& hessian, const py::tuple& arrays) {
  if (static_cast<int>(arrays.size()) != program.arrays || program.phases != 1 || program.scratch ||
      program.sums)
    return false;
  const Proxy* parameter = as_array(arrays[0].ptr());
  const int compute = compute_of(parameter);
  if (compute < 0) return false;
  const Table& table = *level().table;
  const std::size_t n = elements_of(parameter);
  Operand operands[MAX_OPERANDS];
  Range ranges[2 * MAX_OPERANDS];
  int range_count = 0;
  const auto apart = [&](const Range& range) {
    for (int j = 0; j < range_count; ++j)
      if (overlap(range, ranges[j])) return false;
    return true;
  };
  for (int k = 0; k < program.arrays; ++k) {
    Target target;
    if (!read_target(PyTuple_GET_ITEM(arrays.ptr(), k), parameter, n, compute, table, target,
                     operands[PARAMETER + k]))
      return false;
    for (const Range& range : target.ranges) {
      if (range.begin == range.end) continue;
      if (!apart(range)) return false;
      ranges[range_count++] = range;
    }
  }
  PyObject* const inputs[INPUTS] = {gradient.ptr(), hessian.ptr()};
  for (int i = 0; i < INPUTS; ++i) {
    if (inputs[i] == Py_None) {
      if (i == GRADIENT) return false;
      continue;
    }
    if ((i == HESSIAN && !program.takes_hessian) ||
        !read_input(inputs[i], parameter, compute, table, false, operands[i]))
      return false;
    if (n && !apart({operands[i].data, operands[i].data + n * operands[i].bits / 8})) return false;
  }
  const Scalars scalars(program, folds, t, lr, 1.0, compute);
  std::vector<Step> steps;
  const Phase phase = append_phase(program, 0, compute, scalars, operands, steps);
  std::vector<Leaf> leaves{{n, operands, steps.data(), INPUTS + program.arrays, phase.count,
                            phase.used, phase.written, 0, nullptr, 0}};
  run_unlocked(leaves, n, thread_count.load());  // the arguments hold every array alive
  return true;
}

// For each array (sum, scale), as `measure` finds them; None where one does not fit.
py::object sums_of_squares(const py::list& arrays) {
  std::vector<Measured> inputs;
  for (const py::handle array : arrays) {
    const Proxy* const a = as_array(array.ptr());
    Measured m{};
    m.compute = compute_of(a);
    if (m.compute < 0 || !is_dense(a) ||
        !read_input(array.ptr(), a, m.compute, *level().table, false, m.input))
      return py::none();
    m.elements = elements_of(a);
    m.scale = 1;
    inputs.push_back(m);
  }
  measure(inputs, thread_count.load());  // the list holds every array alive
  py::list found;
  for (const Measured& m : inputs) found.append(py::make_tuple(m.sum, m.scale));
  return found;
}

}  // namespace

void bind_update(py::module_& module) {
  module.def("update", &update);
  module.def("sums_of_squares", &sums_of_squares);
  module.def("set_threads", [](int n) { thread_count.store(n); });
  module.def("get_threads", [] { return thread_count.load(); });
}

}  // namespace fusedopt
