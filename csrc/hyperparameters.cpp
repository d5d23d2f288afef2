#include "hyperparameters.hpp"

namespace fusedopt {
namespace {

// Whether a value, or each of a tuple, is a float that fits, and so is the one before.
bool is_other_number(PyObject* before, PyObject* value, double low, double high, bool zero) {
  if (PyFloat_CheckExact(value) && PyFloat_CheckExact(before)) {
    const double x = PyFloat_AS_DOUBLE(value);
    return low <= x && x < high && (zero || (x == 0) == (PyFloat_AS_DOUBLE(before) == 0));
  }
  if (!PyTuple_CheckExact(value) || !PyTuple_CheckExact(before) ||
      PyTuple_GET_SIZE(value) != PyTuple_GET_SIZE(before))
    return false;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(value); ++k) {
    PyObject* const each = PyTuple_GET_ITEM(value, k);
    if (!PyFloat_CheckExact(each) ||
        !is_other_number(PyTuple_GET_ITEM(before, k), each, low, high, zero))
      return false;
  }
  return true;
}

// A member of a dict, or null.
PyObject* member(const py::dict& dict, PyObject* name) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), name);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found;
}

void set_member(const py::dict& dict, PyObject* name, PyObject* value) {
  if (PyDict_SetItem(dict.ptr(), name, value) != 0) throw py::error_already_set();
}

// The value of a schedule, as a float where it is a number of Python's own.
py::object value_of(const py::handle& each, const py::int_& step) {
  const py::object value =
      PyCallable_Check(each.ptr()) ? each(step) : py::reinterpret_borrow<py::object>(each);
  PyObject* const o = value.ptr();
  if (PyFloat_CheckExact(o) || !(PyFloat_Check(o) || PyLong_CheckExact(o))) return value;
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Float(o));
  if (!number) PyErr_Clear();  // too large, which Python says better
  return number ? number : value;
}

}  // namespace

py::object value_in_step(const py::object& rule, const py::str& name, std::int64_t step) {
  const py::object value = py::getattr(rule, name);
  const py::int_ number(step);
  if (!PyTuple_CheckExact(value.ptr())) return value_of(value, number);
  const py::tuple old(value);
  py::tuple each(old.size());
  for (std::size_t k = 0; k < each.size(); ++k) each[k] = value_of(old[k], number);
  return each;
}

py::object renumbered(const py::object& rule, const py::dict& values, const py::tuple& numbers) {
  const Names& is = Names::get();
  const py::dict bounds = numbers[0];
  const py::tuple names = numbers[1];
  const auto old = py::reinterpret_steal<py::dict>(PyObject_GenericGetDict(rule.ptr(), nullptr));
  if (!old) throw py::error_already_set();
  // What the rule has derived from its numbers stays behind.
  const py::dict own;
  for (const py::handle name : names) {
    PyObject* const value = member(old, name.ptr());
    if (!value) return {};
    set_member(own, name.ptr(), value);
  }
  for (const auto& [name, value] : values) {
    PyObject* const known = member(bounds, name.ptr());
    PyObject* const before = known ? member(own, name.ptr()) : nullptr;
    double low, high;
    int zero;
    if (!before || !PyArg_ParseTuple(known, "ddp", &low, &high, &zero) ||
        !is_other_number(before, value.ptr(), low, high, zero))
      return {};
    set_member(own, name.ptr(), value.ptr());
  }
  // The base of this form of decay is the learning rate that the rule was given.
  if (member(values, is.lr.ptr()) && is.independent.equal(own[is.decay])) return {};
  set_member(own, is.scheduled.ptr(), py::getattr(rule, is.scheduled).ptr());
  // The program of a rule that differs in numbers alone: see `Rule.program`.
  PyObject* like = member(old, is.program.ptr());
  if (!like) like = member(old, is.like.ptr());
  if (like) set_member(own, is.like.ptr(), like);
  PyTypeObject* const type = Py_TYPE(rule.ptr());
  auto fresh = py::reinterpret_steal<py::object>(type->tp_new(type, py::tuple().ptr(), nullptr));
  if (!fresh || PyObject_GenericSetDict(fresh.ptr(), own.ptr(), nullptr) != 0)
    throw py::error_already_set();
  if (!py::reinterpret_steal<py::object>(
          PyObject_CallMethodNoArgs(fresh.ptr(), is.check_together.ptr())))
    throw py::error_already_set();
  return fresh;
}

}  // namespace fusedopt
