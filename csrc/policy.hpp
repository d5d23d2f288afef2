// The duties of a whole step in one call besides the update, and its StepInfo.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "gradient_transforms.hpp"
#include "schedules.hpp"

namespace fusedopt {

namespace py = pybind11;

// The findings of a step.
struct Found {
  std::vector<double> norms, scales;  // of all gradients, or of those of each group
  std::vector<std::size_t> bad;       // leaves whose sum of squares is not finite
  bool skipped = false, refused = false;
  bool fits = true;  // the factors are finite in the compute types
};

// fusedopt.plan.interface.Policy, which says what its fields are.
class Policy {
 public:
  // The first column of sums in a plan's results, behind those of `SquareSum` and the elements
  // touched.
  static constexpr std::size_t FIRST_SUM = 3;

  explicit Policy(const py::object& description);

  // The inverse of the scale of the gradients; 0 where Python has to look at that.
  double factor(PyObject* grad_scale) const;

  // The `StepInfo` of a step.
  py::object told(std::int64_t number, const std::vector<double>& rates, const Found& found,
                  const py::object& stats) const;

  py::object refusal, rates, stats;
  py::list numbers;
  std::vector<std::optional<Schedule>> schedules;
  std::vector<double> limits;
  std::vector<std::pair<std::size_t, std::vector<std::size_t>>> gradient_sums;
  bool by_group, clips, skips, measures, moving;
  std::unique_ptr<GradientTransforms> transforms;  // or null

  // Whether a step differs from the one before in more than learning rates and gradients.
  bool changes() const { return moving || scheduled_; }
  // The values that a group's schedules, but for that of its learning rate, give a step.
  py::dict values(std::size_t group, const py::object& rule, std::int64_t step) const;

 private:
  py::tuple paths(const std::vector<std::size_t>& leaves) const;
  // A number, or a dict of many.
  py::object by_label(const std::vector<double>& values, bool many) const;

  PyTypeObject* info_;
  py::object held_;
  py::list labels_, paths_;
  // Of each group its scheduled numbers, and how the core finds them where it can.
  std::vector<std::vector<std::pair<py::str, std::optional<Schedule>>>> numbers_;
  bool narrow_, scheduled_ = false;
};

}  // namespace fusedopt
