// A whole step in one call: learning rates, norms, clipping, the update, and its StepInfo.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "floating_point.hpp"
#include "plan.hpp"
#include "python_driver.hpp"
#include "unlocked.hpp"

namespace fusedopt {

void Plan::settle(const py::object& policy) {
  auto settled = std::make_unique<Policy>(policy);
  for (const Program* program : programs_) {
    const bool alone = program->measures && after_kept_.is_none() && !settled->transforms;
    if (program->phases > 1 && !alone)
      throw py::value_error("settle: Python has its part in several phases");
  }
  policy_ = std::move(settled);
}

py::object Plan::whole_step(const py::object& gradients, const py::object& hessian,
                            const py::object& grad_scale, const py::object& ask) {
  const DefaultControl control;
  const Use use(*this);
  const double factor = policy_ ? policy_->factor(grad_scale.ptr()) : 0.0;
  if (factor == 0.0 || (policy_->changes() && !take_numbers(nullptr)) ||
      !collect(gradients, hessian, false))
    return py::none();
  // A schedule of one's own is asked once a step, so not before gradients that Python must look at.
  if (!ask.is_none() && !read(false)) return py::none();
  if (!find_rates(ask)) return py::none();
  // Clipping finds the factors only where Python cannot run.
  std::fill_n(factor_, programs_.size(), policy_->measures ? 1.0 : factor);
  prepare();
  if (!read(false)) return py::none();
  const Policy& policy = *policy_;
  Found found;
  found.scales.assign(policy.limits.size(), 1.0);
  bool stepped = false;
  const std::unique_ptr<Plan, void (*)(Plan*)> untransformed(
      policy.transforms ? this : nullptr, [](Plan* plan) { plan->take_transforms_back(false); });
  const bool measures = active_measure();
  const auto update = [&] {
    if (stepped) run_phase(active_of(-1), -1, &choice_);
    if (stepped && measures) store_kept();
    if (policy.transforms) take_transforms_back(stepped && zero_grads_);
  };
  unlocked_if_long(elements_, [&] {
    if (policy.transforms) transform_gradients(factor);
    if (policy.measures) {
      measure_gradients();
      decide(factor, found);
    } else {
      begin_results();
    }
    stepped = !found.skipped && !found.refused && found.fits;
    if (!measures) update();
  });
  if (measures && stepped) {
    take_measures();
    if (!read(false)) return py::none();
    unlocked_if_long(elements_, update);
  }
  if (found.refused) {
    const py::object error = called(policy.refusal, py::make_tuple(found.bad));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    throw py::error_already_set();
  }
  if (!found.fits) prepare();  // says which
  if (!found.skipped) count();
  const std::vector<double> rates(rate_, rate_ + programs_.size());
  py::object stats = py::none();
  if (!policy.stats.is_none() && !found.skipped) {
    stats = stats_of(factor);
    if (!policy.measures) found.norms = norms(factor);
  }
  return policy.told(counts_[0], rates, found, stats);
}

void Plan::transform_gradients(double factor) {
  std::vector<Transformed> leaves;
  for (const std::size_t k : active_) {
    const Proxy* const p = own_[k].parameter;
    const std::size_t rows =
        p->nd > 1 && own_[k].elements ? static_cast<std::size_t>(p->dimensions[0]) : 1;
    leaves.push_back({operands(k) + GRADIENT, operands(k) + PARAMETER, own_[k].elements, rows,
                      own_[k].compute, p->nd});
  }
  if (policy_->transforms->apply(leaves, factor, threads())) measured_read_ = 0;
}

void Plan::take_transforms_back(bool zero) {
  if (policy_->transforms->restore(zero)) measured_read_ = 0;
}

// `ask`, if not None, knows how; otherwise they are the core's to compute.
bool Plan::find_rates(const py::object& ask) {
  const std::int64_t step = counts_[0] + 1;
  if (!ask.is_none()) {
    called(ask, py::make_tuple(step));
    return true;
  }
  for (std::size_t k = 0; k < programs_.size(); ++k) {
    if (!policy_->schedules[k]) continue;
    const double rate = (*policy_->schedules[k])(static_cast<double>(step));
    if (!(rate >= 0.0 && std::isfinite(rate))) return false;
    rate_[k] = rate;
  }
  return true;
}

std::vector<double> Plan::norms(double factor) const {
  std::vector<std::vector<SquareSum>> sums(policy_->limits.size());
  for (auto& each : sums) each.reserve(own_.size());
  for (std::size_t k = 0; k < own_.size(); ++k) {
    const double* const row = result_ + k * columns();
    sums[policy_->by_group ? static_cast<std::size_t>(groups_[k]) : 0].push_back({row[0], row[1]});
  }
  std::vector<double> norms;
  for (const auto& leaves : sums) norms.push_back(combined(leaves) * factor);
  return norms;
}

// The decision of `GradientClipper` in fusedopt/step/clipping.py, which other backends use.
void Plan::decide(double factor, Found& found) {
  const Policy& policy = *policy_;
  found.norms = norms(factor);
  if (!std::all_of(found.norms.begin(), found.norms.end(),
                   [](double x) { return std::isfinite(x); })) {
    for (std::size_t k = 0; k < own_.size(); ++k)
      if (!std::isfinite(result_[k * columns()])) found.bad.push_back(k);
    found.skipped = policy.skips;
    found.refused = policy.clips && !policy.skips;
    if (found.skipped || found.refused) return;
  }
  for (std::size_t k = 0; k < found.scales.size(); ++k)
    found.scales[k] = clip_scale(policy.limits[k], found.norms[k]);
  for (std::size_t k = 0; k < programs_.size(); ++k)
    factor_[k] = factor * found.scales[policy.by_group ? k : 0];
  found.fits = use_factors();
}

py::object Plan::stats_of(double factor) {
  const std::size_t count = own_.size() * columns();
  for (const auto& [column, leaves] : policy_->gradient_sums)
    for (const std::size_t k : leaves) result_[k * columns()] = result_[k * columns() + column];
  const py::array_t<double> copy(static_cast<py::ssize_t>(count), result_);
  return called(policy_->stats, py::make_tuple(copy, factor));
}

}  // namespace fusedopt
