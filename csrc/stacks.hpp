// Stacks of matrices that are orthogonalised each by itself.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_stacks(pybind11::module_& module);

}  // namespace fusedopt
