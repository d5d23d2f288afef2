// Work that a thread has another one do for it, so that nothing interrupts the work.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_errands(pybind11::module_& module);

}  // namespace fusedopt
