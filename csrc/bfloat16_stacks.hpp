// Stacks of matrices that are orthogonalised with products of bfloat16.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {
void bind_bfloat16_stacks(pybind11::module_& module);
}  // namespace fusedopt
