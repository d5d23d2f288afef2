#include "update.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "arrays.hpp"
#include "cpu.hpp"
#include "floating_point.hpp"
#include "norms.hpp"
#include "programs.hpp"
#include "python_driver.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

// One tensor, one step, in place; false where the arrays do not fit, and nothing was written then.
bool update(const Program& program, const py::tuple& described, std::int64_t t, double lr,
            const py::object& gradient, const py::object& hessian, const py::tuple& arrays) {
  if (static_cast<int>(arrays.size()) != program.arrays || program.phases != 1 || program.scratch ||
      program.sums)
    return false;
  const Proxy* parameter = as_array(arrays[0].ptr());
  const int compute = compute_of(parameter);
  if (compute < 0) return false;
  const DefaultControl control;
  PyObject* const inputs[INPUTS] = {gradient.ptr(), hessian.ptr()};
  Given given[INPUTS];
  for (int i = 0; i < INPUTS; ++i)
    if (inputs[i] != Py_None) given[i] = Given(inputs[i]);
  Scalars scalars;
  scalars.fold(program, Numbers(described), t, lr, 1.0, compute);
  // Python has run: nothing is looked at before, and all after.
  if (compute_of(parameter) != compute) return false;
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
  for (int i = 0; i < INPUTS; ++i) {
    if (!given[i].object) {
      if (i == GRADIENT) return false;
      continue;
    }
    if ((i == HESSIAN && !program.takes_hessian) ||
        !read_input(given[i], parameter, compute, table, false, operands[i]))
      return false;
    if (n && !apart({operands[i].data, operands[i].data + n * operands[i].bits / 8})) return false;
  }
  std::vector<Step> steps;
  const Phase phase = append_phase(program, 0, compute, scalars, operands, steps);
  std::vector<Leaf> leaves{{n, operands, steps.data(), INPUTS + program.arrays, phase.count,
                            phase.used, phase.written, 0, nullptr, 0}};
  // The arguments hold every array alive.
  unlocked_if_long(n, [&] { run(leaves, thread_count.load()); });
  return true;
}

// One step of many tensors in place, wherever they are: for each its elements; their addresses are
// those of all parameters, then of each state and of the gradients. They are dense, apart, and of
// the compute type; whoever calls keeps them alive.
void step_at(const Program& program, const py::tuple& described, std::int64_t t, double lr,
             bool wide, const std::vector<std::size_t>& elements,
             const std::vector<std::uintptr_t>& addresses) {
  const int compute = wide ? F64 : F32;
  const std::size_t count = elements.size();
  const auto arrays = static_cast<std::size_t>(program.arrays);
  if (program.phases != 1 || program.scratch || program.sums || program.takes_hessian ||
      addresses.size() != count * (arrays + 1))
    throw py::value_error("not the addresses of a step's arrays");
  std::vector<Operand> operands(count * MAX_OPERANDS);
  Scalars scalars;
  scalars.fold(program, Numbers(described), t, lr, 1.0, compute);
  std::vector<Step> steps;
  std::vector<Phase> phases;
  std::size_t total = 0;
  for (std::size_t leaf = 0; leaf < count; ++leaf) {
    Operand* const own = &operands[leaf * MAX_OPERANDS];
    for (std::size_t k = 0; k <= arrays; ++k) {
      Operand& operand = own[k < arrays ? PARAMETER + k : std::size_t{GRADIENT}];
      operand.data = reinterpret_cast<char*>(addresses[k * count + leaf]);
      operand.bits = static_cast<std::uint32_t>(8 * SIZES[compute]);
    }
    own[GRADIENT].role = Role::INPUT;
    phases.push_back(append_phase(program, 0, compute, scalars, own, steps));
    total += elements[leaf];
  }
  std::vector<Leaf> leaves;
  for (std::size_t leaf = 0; leaf < count; ++leaf) {
    const Phase& phase = phases[leaf];
    leaves.push_back({elements[leaf], &operands[leaf * MAX_OPERANDS], &steps[phase.first],
                      INPUTS + program.arrays, phase.count, phase.used, phase.written, 0, nullptr,
                      0});
  }
  unlocked_if_long(total, [&] { run(leaves, thread_count.load()); });
}

// For each array (sum, scale), as `SquareSums` finds them; None where one does not fit.
py::object sums_of_squares(const py::list& arrays) {
  std::vector<Measured> inputs;
  std::vector<Operand> operands(arrays.size());
  std::size_t total = 0;
  const DefaultControl control;
  for (const py::handle array : arrays) {
    const Proxy* const a = as_array(array.ptr());
    const int compute = compute_of(a);
    Operand& operand = operands[inputs.size()];
    if (compute < 0 || !is_dense(a) ||
        !read_input(Given(array.ptr()), a, compute, *level().table, false, operand))
      return py::none();
    inputs.push_back({&operand, elements_of(a), compute, nullptr});
    total += elements_of(a);
  }
  // The list holds every array alive.
  unlocked_if_long(total, [&] {
    SquareSums sums;
    sums.take(inputs);
    sums.find(thread_count.load());
  });
  py::list found;
  for (const Measured& m : inputs) found.append(py::make_tuple(m.sum, m.scale));
  return found;
}

}  // namespace

void bind_update(py::module_& module) {
  module.def("update", &update);
  module.def("step_at", &step_at);
  module.def("sums_of_squares", &sums_of_squares);
  module.def("set_threads", [](int n) { thread_count.store(n); });
  module.def("get_threads", [] { return thread_count.load(); });
}

}  // namespace fusedopt
