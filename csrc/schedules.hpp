// The schedules of fusedopt/schedules.py, computed in the same float64 operations as there.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

namespace fusedopt {

// A value for each step of an optimizer, 1 first.
class Schedule {
 public:
  // (kind, numbers, parts): what `Schedule.formula` gives; the parts are such descriptions too.
  explicit Schedule(const pybind11::handle& formula);

  double operator()(double step) const;

 private:
  enum class Kind {
    CONSTANT,
    LINEAR,
    POLYNOMIAL,
    COSINE,
    HALF_COSINE,
    ROOT,
    ONE_CYCLE,
    RESTARTS,
    STAIR,
    EXPONENTIAL,
    INVERSE_SQRT,
    PRODUCT,
    SEQUENTIAL
  };

  double falling(double step) const;
  double restarted(double step) const;

  Kind kind_;
  std::vector<double> numbers_;
  std::vector<Schedule> parts_;
};

}  // namespace fusedopt
