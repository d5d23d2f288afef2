// Arrays as the binding sees them: NumPy's own structs, read without NumPy's headers.
#pragma once
#include <pybind11/numpy.h>

#include "driver.hpp"
#include "table.h"

namespace fusedopt {
namespace {

namespace py = pybind11;

using Proxy = py::detail::PyArray_Proxy;

struct Numpy {
  PyTypeObject* ndarray;
  PyObject* dtypes[FORMATS];
};

// Never destroyed: module teardown and interpreter exit race otherwise.
const Numpy& numpy() {
  static const Numpy* names = [] {
    const py::module_ np = py::module_::import("numpy");
    const auto dtype = [&](const char* name) {
      return py::object(np.attr("dtype")(name)).release().ptr();
    };
    return new Numpy{
        reinterpret_cast<PyTypeObject*>(py::object(np.attr("ndarray")).release().ptr()),
        {dtype("float32"), dtype("float64")}};
  }();
  return *names;
}

constexpr std::size_t SIZES[FORMATS] = {4, 8};
constexpr int DENSE = 0x1 | 0x2, ALIGNED = 0x100, WRITEABLE = 0x400;  // NumPy's C and F order

// The array behind a Python object, or null: subclasses and unusual dtype objects take the slow
// way, through Python.
const Proxy* as_array(PyObject* o) {
  return Py_TYPE(o) == numpy().ndarray ? py::detail::array_proxy(o) : nullptr;
}

int format_of(const Proxy* a) {
  for (int f = 0; f < FORMATS; ++f)
    if (a->descr == numpy().dtypes[f]) return f;
  return -1;
}

std::size_t elements_of(const Proxy* a) {
  std::size_t n = 1;
  for (int k = 0; k < a->nd; ++k) n *= static_cast<std::size_t>(a->dimensions[k]);
  return n;
}

// The same shape, and element i of one stands where element i of the other stands.
bool same_layout(const Proxy* a, std::size_t a_size, const Proxy* b, std::size_t b_size) {
  if (a->nd != b->nd) return false;
  bool empty = false;
  for (int k = 0; k < a->nd; ++k) {
    if (a->dimensions[k] != b->dimensions[k]) return false;
    empty = empty || a->dimensions[k] == 0;
  }
  for (int k = 0; k < a->nd && !empty; ++k)
    if (a->dimensions[k] > 1 && a->strides[k] * static_cast<py::ssize_t>(b_size) !=
                                    b->strides[k] * static_cast<py::ssize_t>(a_size))
      return false;
  return true;
}

bool is_target(const Proxy* a) {
  const int needed = ALIGNED | WRITEABLE;
  return (a->flags & needed) == needed && (a->flags & DENSE);
}

struct Range {
  const char *begin, *end;
};

bool overlap(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }

// A gradient that fits the parameter becomes an operand.
bool read_input(PyObject* o, const Proxy* parameter, int compute, const Table& table,
                Operand& out) {
  const Proxy* a = as_array(o);
  if (!a || !(a->flags & ALIGNED)) return false;
  const int format = format_of(a);
  if (format < 0 || !same_layout(a, SIZES[format], parameter, SIZES[compute])) return false;
  out.data = a->data;
  out.decode = table.decode[format][compute];
  out.size = SIZES[format];
  return true;
}

}  // namespace
}  // namespace fusedopt
