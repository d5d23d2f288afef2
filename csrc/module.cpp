// The binding: a list.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "bfloat16_stacks.hpp"
#include "cpu.hpp"
#include "driver.hpp"
#include "errands.hpp"
#include "floating_point.hpp"
#include "means.hpp"
#include "parallel.hpp"
#include "placement.hpp"
#include "plan.hpp"
#include "rows.hpp"
#include "stacks.hpp"
#include "update.hpp"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// (name, operands, scalars) of everything in the table: Python compares it with its registry.
py::list operations() {
  py::list rows;
  const fusedopt::Table& table = *fusedopt::level().table;
  for (int k = 0; k < table.operation_count; ++k) {
    const fusedopt::Operation& op = table.operations[k];
    rows.append(py::make_tuple(op.name, op.operands, op.scalars));
  }
  return rows;
}

// (name, bits of an element, elements of a block, bytes beside each block) of every codec.
py::list codecs() {
  py::list rows;
  const fusedopt::Table& table = *fusedopt::level().table;
  for (int k = 0; k < table.codec_count; ++k) {
    const fusedopt::Codec& codec = table.codecs[k];
    rows.append(py::make_tuple(codec.name, codec.bits, codec.block, codec.aux));
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_core, module, py::mod_gil_not_used()) {
  fusedopt::guard_forks();
  py::module_::import("atexit").attr("register")(
      py::cpp_function([] { fusedopt::end_threads(); }, py::call_guard<py::gil_scoped_release>()));
  fusedopt::bind_errands(module);
  fusedopt::bind_plan(module);
  fusedopt::bind_update(module);
  fusedopt::bind_placement(module);
  fusedopt::bind_rows(module);
  fusedopt::bind_means(module);
  fusedopt::bind_stacks(module);
  fusedopt::bind_bfloat16_stacks(module);
  module.def("operations", &operations);
  module.def("codecs", &codecs);
  module.def("levels", [] {
    py::list names;
    for (const fusedopt::Level& l : fusedopt::levels()) names.append(l.name);
    return names;
  });
  module.def("get_level", [] { return fusedopt::level().name; });
  module.def("set_level", &fusedopt::force_level);
  module.def("parallel_limit", &fusedopt::parallel_limit);
  module.attr("sizes") =
      py::dict("SERIAL"_a = fusedopt::SERIAL, "SMALLEST_PART"_a = fusedopt::SMALLEST_PART,
               "SEGMENT"_a = fusedopt::SEGMENT);
  module.def("bound_processors", &fusedopt::bound_processors);
  module.def(
      "floating_point",
      [](std::optional<std::uint64_t> control) {
        const std::uint64_t own = fusedopt::get_control();
        fusedopt::set_control(control.value_or(fusedopt::DEFAULT_CONTROL));
        return own;
      },
      py::arg("control") = py::none());
  module.attr("parallel") = fusedopt::parallel_name();
  module.attr("compiler") = compiler();
}
