#include "policy.hpp"

#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <tuple>
#include <utility>

#include "hyperparameters.hpp"

namespace fusedopt {

Policy::Policy(const py::object& description)
    : refusal(description.attr("refusal")),
      rates(description.attr("rates")),
      stats(description.attr("stats")),
      numbers(description.attr("numbers")),
      limits(description.attr("limits").cast<std::vector<double>>()),
      gradient_sums(description.attr("gradient_sums").cast<decltype(gradient_sums)>()),
      by_group(description.attr("by_group").cast<bool>()),
      clips(description.attr("clips").cast<bool>()),
      skips(description.attr("skips").cast<bool>()),
      measures(description.attr("measures").cast<bool>()),
      moving(description.attr("moving").cast<bool>()),
      held_(description.attr("info")),
      labels_(description.attr("labels")),
      paths_(description.attr("paths")),
      narrow_(description.attr("narrow").cast<bool>()) {
  info_ = reinterpret_cast<PyTypeObject*>(held_.ptr());
  if (!PyType_Check(held_.ptr()) || !PyType_IsSubtype(info_, &PyTuple_Type))
    throw py::type_error("policy: info is no type of tuples");
  if (const py::object given = description.attr("transforms"); !given.is_none()) {
    const auto [leaf, adaptive, centralize] = given.cast<std::tuple<double, double, bool>>();
    transforms = std::make_unique<GradientTransforms>(leaf, adaptive, centralize);
  }
  for (const py::handle formula : description.attr("schedules")) {
    schedules.emplace_back();
    if (!formula.is_none()) schedules.back().emplace(formula);
  }
  for (const py::handle each : description.attr("scheduled")) {
    numbers_.emplace_back();
    for (const auto& [name, formula] : py::reinterpret_borrow<py::dict>(each)) {
      scheduled_ = true;
      numbers_.back().emplace_back(py::reinterpret_borrow<py::str>(name), std::nullopt);
      if (!formula.is_none()) numbers_.back().back().second.emplace(formula);
    }
  }
  if (numbers_.size() != labels_.size() || schedules.size() != labels_.size() ||
      numbers.size() != labels_.size() || limits.size() != (by_group ? labels_.size() : 1))
    throw py::value_error("policy: the lists differ in length");
}

py::dict Policy::values(std::size_t group, const py::object& rule, std::int64_t step) const {
  py::dict found;
  for (const auto& [name, schedule] : numbers_[group])
    found[name] = schedule ? py::object(py::float_((*schedule)(static_cast<double>(step))))
                           : value_in_step(rule, name, step);
  return found;
}

double Policy::factor(PyObject* grad_scale) const {
  double scale = 0;
  if (PyFloat_Check(grad_scale))
    scale = PyFloat_AS_DOUBLE(grad_scale);
  else if (PyLong_CheckExact(grad_scale))
    scale = PyLong_AsDouble(grad_scale);
  if (scale == -1.0 && PyErr_Occurred()) PyErr_Clear();
  const double inverse = scale > 0 ? 1.0 / scale : 0.0;
  const double used = narrow_ ? static_cast<double>(static_cast<float>(inverse)) : inverse;
  return used > 0 && std::isfinite(used) ? inverse : 0.0;
}

py::object Policy::by_label(const std::vector<double>& values, bool many) const {
  if (!many) return py::float_(values[0]);
  py::dict found;
  for (std::size_t k = 0; k < values.size(); ++k) found[labels_[k]] = py::float_(values[k]);
  return found;
}

py::tuple Policy::paths(const std::vector<std::size_t>& leaves) const {
  py::tuple found(leaves.size());
  for (std::size_t k = 0; k < leaves.size(); ++k) found[k] = paths_[leaves[k]];
  return found;
}

py::object Policy::told(std::int64_t number, const std::vector<double>& rates, const Found& found,
                        const py::object& stats) const {
  const py::tuple values =
      py::make_tuple(number, by_label(rates, rates.size() > 1),
                     found.norms.empty() ? py::object(py::none()) : by_label(found.norms, by_group),
                     by_label(found.scales, by_group), found.skipped, paths(found.bad), stats);
  // The constructor of tuple, which does not unpack its argument into fields by name.
  const auto info = py::reinterpret_steal<py::object>(
      PyTuple_Type.tp_new(info_, py::make_tuple(values).ptr(), nullptr));
  if (!info) throw py::error_already_set();
  return info;
}

}  // namespace fusedopt
