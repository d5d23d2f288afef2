// Which thread works on which memory.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_placement(pybind11::module_& module);

}  // namespace fusedopt
