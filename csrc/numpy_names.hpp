// NumPy's structs, dtypes and flags, without NumPy's headers.
#pragma once
#include <pybind11/numpy.h>

#include "table.h"

namespace fusedopt {

namespace py = pybind11;

// The fields of NumPy's array object. What pybind11 calls its detail stays inside these two lines.
using Proxy = py::detail::PyArray_Proxy;
inline Proxy* proxy_of(PyObject* array) { return py::detail::array_proxy(array); }

struct Numpy {
  PyTypeObject* ndarray;
  PyObject* dtypes[FORMATS];
};

// Never destroyed: module teardown and interpreter exit race otherwise.
inline const Numpy& numpy() {
  static const Numpy* names = [] {
    const py::module_ np = py::module_::import("numpy");
    const auto dtype = [&](const char* name) {
      return py::object(np.attr("dtype")(name)).release().ptr();
    };
    return new Numpy{
        reinterpret_cast<PyTypeObject*>(py::object(np.attr("ndarray")).release().ptr()),
        {dtype("float32"), dtype("float64"),
         np.attr("dtype")(py::module_::import("ml_dtypes").attr("bfloat16")).release().ptr(),
         dtype("float16")}};
  }();
  return *names;
}

constexpr std::size_t SIZES[FORMATS] = {4, 8, 2, 2};
constexpr int C_ORDER = 0x1, DENSE = C_ORDER | 0x2, ALIGNED = 0x100,
              WRITEABLE = 0x400;  // NumPy's C and F order

}  // namespace fusedopt
