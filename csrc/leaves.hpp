// Python's side of the driver: walks trees of arrays, checks them, and runs programs on them.
// Every check here answers yes or no; Python (fusedopt/arrays/checks.py) finds and explains the reason.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedopt {

void bind_leaves(pybind11::module_& module);

}  // namespace fusedopt
