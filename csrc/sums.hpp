// Sums of arrays, element by element.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_sums(pybind11::module_& module);

}  // namespace fusedopt
