// Python's trees: nested dicts, lists and tuples with arrays for leaves.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace fusedopt {
namespace {

namespace py = pybind11;

// The shape of the parameters' tree; a leaf's index is its place in depth-first order.
struct Node {
  std::vector<Node> children;
  std::vector<py::object> keys;  // of a dict
  bool leaf = false, mapping = false;

  // An int is a leaf, (keys, children) a dict, a list a list or tuple.
  explicit Node(const py::handle spec) {
    if (py::isinstance<py::int_>(spec)) {
      leaf = true;
      return;
    }
    mapping = py::isinstance<py::tuple>(spec);
    if (mapping)
      for (const py::handle key : spec[py::int_(0)])
        keys.push_back(py::reinterpret_borrow<py::object>(key));
    const py::object list =
        mapping ? py::object(spec[py::int_(1)]) : py::reinterpret_borrow<py::object>(spec);
    for (const py::handle child : list) children.emplace_back(child);
  }
};

// Visits the leaves of a tree of the same shape, in order; false where it differs or where a visit
// says so.
template <class Visit>
bool walk(const Node& node, PyObject* o, const Visit& visit) {
  if (node.leaf) return visit(o);
  const auto count = static_cast<Py_ssize_t>(node.children.size());
  if (node.mapping) {
    if (!PyDict_Check(o) || PyDict_Size(o) != count) return false;
    Py_ssize_t k = 0, at = 0;
    PyObject *key, *next;
    // Nearly always the same key objects in the same order: then nothing has to be looked up.
    while (k < count && PyDict_Next(o, &at, &key, &next) && key == node.keys[k].ptr())
      if (!walk(node.children[k++], next, visit)) return false;
    for (; k < count; ++k) {
      PyObject* const value = PyDict_GetItemWithError(o, node.keys[k].ptr());
      if (!value && PyErr_Occurred()) throw py::error_already_set();
      if (!value || !walk(node.children[k], value, visit)) return false;
    }
    return true;
  }
  if ((!PyList_Check(o) && !PyTuple_Check(o)) || PySequence_Fast_GET_SIZE(o) != count) return false;
  for (Py_ssize_t k = 0; k < count; ++k)
    if (PySequence_Fast_GET_SIZE(o) != count ||
        !walk(node.children[k], PySequence_Fast_GET_ITEM(o, k), visit))
      return false;
  return true;
}

}  // namespace
}  // namespace fusedopt
