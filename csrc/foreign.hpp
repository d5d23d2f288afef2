// Arrays of other libraries in the host's memory, read through DLPack's C exchange interface.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_foreign(pybind11::module_& module);

}  // namespace fusedopt
