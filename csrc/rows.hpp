// Gradients of some rows: equal rows become one.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_rows(pybind11::module_& module);

}  // namespace fusedopt
