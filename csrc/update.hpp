// Functions that need no plan: one step of one tensor, norms, and the number of threads.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_update(pybind11::module_& module);

}  // namespace fusedopt
