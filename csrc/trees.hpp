// Python's trees: nested dicts, lists and tuples with arrays for leaves.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "unlocked.hpp"

namespace fusedopt {

namespace py = pybind11;

// The shape of the parameters' tree; a leaf's index is its place in depth-first order.
struct Node {
  std::vector<Node> children;
  std::vector<py::object> keys;  // of a dict
  bool leaf = false, mapping = false, absent = false;

  // An int is a leaf, (keys, children) a dict, a list a list or tuple, None the place of no array.
  explicit Node(const py::handle spec) {
    if (py::isinstance<py::int_>(spec)) {
      leaf = true;
      return;
    }
    absent = spec.is_none();
    if (absent) return;
    mapping = py::isinstance<py::tuple>(spec);
    if (mapping)
      for (const py::handle key : spec[py::int_(0)])
        keys.push_back(py::reinterpret_borrow<py::object>(key));
    const py::object list =
        mapping ? py::object(spec[py::int_(1)]) : py::reinterpret_borrow<py::object>(spec);
    if (!py::isinstance<py::list>(list)) throw py::type_error("plan: a tree is made of lists");
    for (const py::handle child : list) children.emplace_back(child);
    if (mapping && keys.size() != children.size())
      throw py::value_error("plan: a dict has as many keys as children");
  }
};

// An element of a container. Without a global lock another thread may take it out at any moment.
#if defined(Py_GIL_DISABLED)
using Item = py::object;
#else
using Item = py::handle;
#endif

// None where the key is not there. Keys may compare themselves by Python code, which may do
// whatever it likes to the containers that are being walked.
inline py::object value_of(PyObject* dict, PyObject* key) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* value = nullptr;
  if (in_python([&] { return PyDict_GetItemRef(dict, key, &value); }) < 0)
    throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
#else
  PyObject* const value = in_python([&] { return PyDict_GetItemWithError(dict, key); });
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
#endif
}

// None where a list has become too short.
inline Item item_of(PyObject* sequence, Py_ssize_t k) {
#if defined(Py_GIL_DISABLED)
  if (PyList_Check(sequence)) {
    const auto item = py::reinterpret_steal<py::object>(PyList_GetItemRef(sequence, k));
    if (!item) PyErr_Clear();
    return item;
  }
  return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(sequence, k));
#else
  return k < PySequence_Fast_GET_SIZE(sequence) ? PySequence_Fast_GET_ITEM(sequence, k) : nullptr;
#endif
}

// Visits the leaves of a tree of the same shape, in order; false where it differs or where a visit
// says so.
template <class Visit>
bool walk(const Node& node, PyObject* o, const Visit& visit) {
  if (node.leaf) return visit(o);
  if (node.absent) return o == Py_None;
  const auto held = py::reinterpret_borrow<py::object>(o);
  const auto count = static_cast<Py_ssize_t>(node.children.size());
  if (node.mapping) {
    if (!PyDict_Check(o) || PyDict_Size(o) != count) return false;
    Py_ssize_t k = 0;
#if !defined(Py_GIL_DISABLED)
    Py_ssize_t at = 0;
    PyObject *key, *next;
    // Nearly always the same key objects in the same order: then nothing has to be looked up.
    while (k < count && PyDict_Next(o, &at, &key, &next) && key == node.keys[k].ptr())
      if (!walk(node.children[k++], next, visit)) return false;
#endif
    for (; k < count; ++k) {
      const py::object value = value_of(o, node.keys[k].ptr());
      if (!value || !walk(node.children[k], value.ptr(), visit)) return false;
    }
    return true;
  }
  if ((!PyList_Check(o) && !PyTuple_Check(o)) || PySequence_Fast_GET_SIZE(o) != count) return false;
  for (Py_ssize_t k = 0; k < count; ++k) {
    const Item item = item_of(o, k);
    if (!item || !walk(node.children[k], item.ptr(), visit)) return false;
  }
  return true;
}

}  // namespace fusedopt
