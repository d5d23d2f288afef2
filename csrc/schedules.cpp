#include "schedules.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <tuple>

namespace py = pybind11;

namespace fusedopt {
namespace {

constexpr double PI = 3.141592653589793;

// The position of a step between two others, from 0 to 1.
double share(double step, double low, double high) {
  if (step >= high) return 1.0;
  return step > low ? (step - low) / (high - low) : 0.0;
}

struct Form {
  const char* name;
  std::size_t numbers;
};

// In the order of `Schedule::Kind`. What falls has (base, warmup, start, end, final) first.
constexpr Form FORMS[] = {
    {"constant", 2},     {"linear", 5},    {"polynomial", 6}, {"cosine", 5}, {"half cosine", 5},
    {"root", 5},         {"one cycle", 5}, {"restarts", 4},   {"stair", 3},  {"exponential", 3},
    {"inverse sqrt", 2}, {"product", 0},   {"sequential", 0}};

}  // namespace

Schedule::Schedule(const py::handle& formula) {
  const auto [name, numbers, parts] =
      formula.cast<std::tuple<std::string, std::vector<double>, py::tuple>>();
  const Form* const form = std::find_if(std::begin(FORMS), std::end(FORMS),
                                        [&n = name](const Form& f) { return n == f.name; });
  if (form == std::end(FORMS)) throw py::key_error(name);
  kind_ = static_cast<Kind>(form - FORMS);
  numbers_ = numbers;
  for (const py::handle part : parts) parts_.emplace_back(part);
  const bool fits = kind_ == Kind::PRODUCT      ? parts_.size() == 2
                    : kind_ == Kind::SEQUENTIAL ? parts_.size() == numbers_.size() + 1
                                                : numbers_.size() == form->numbers;
  if (!fits) throw py::value_error("schedule '" + name + "': another count of numbers or parts");
}

double Schedule::operator()(double step) const {
  const double* const x = numbers_.data();
  switch (kind_) {
    case Kind::CONSTANT:
      return x[0] * (step < x[1] ? step / x[1] : 1.0);
    case Kind::ONE_CYCLE: {  // base, peak, end, start, final
      const bool rising = step < x[1];
      const double low = rising ? x[3] : x[4];
      const double at = rising ? 1.0 - share(step, 1.0, x[1]) : share(step, x[1], x[2]);
      return x[0] * (low + (1.0 - low) * (1.0 + std::cos(PI * at)) / 2.0);
    }
    case Kind::RESTARTS:
      return restarted(step);
    case Kind::STAIR:  // base, factor, every
      return x[0] * std::pow(x[1], std::floor((step - 1.0) / x[2]));
    case Kind::EXPONENTIAL:
      return x[0] * std::pow(x[1], (step - 1.0) / x[2]);
    case Kind::INVERSE_SQRT:
      return x[0] * std::min(step / x[1], std::sqrt(x[1] / step));
    case Kind::PRODUCT:
      return parts_[0](step) * parts_[1](step);
    case Kind::SEQUENTIAL: {
      std::size_t k = 0;
      while (k < numbers_.size() && step > numbers_[k]) ++k;
      return parts_[k](k ? step - numbers_[k - 1] : step);
    }
    default:
      return falling(step);
  }
}

double Schedule::falling(double step) const {
  const double* const x = numbers_.data();
  const double base = x[0], warmup = x[1], final = x[4];
  if (step < warmup) return base * (step / warmup);
  const double at = share(step, x[2], x[3]);
  if (kind_ == Kind::COSINE)
    return base * ((1.0 + final) / 2.0 + (1.0 - final) / 2.0 * std::cos(PI * at));
  const double left = kind_ == Kind::POLYNOMIAL    ? std::pow(1.0 - at, x[5])
                      : kind_ == Kind::HALF_COSINE ? (1.0 + std::cos(PI * at)) / 2.0
                      : kind_ == Kind::ROOT        ? 1.0 - std::sqrt(at)
                                                   : 1.0 - at;
  return base * (final + (1.0 - final) * left);
}

// Half waves of the cosine: base, period, growth, final.
double Schedule::restarted(double step) const {
  const double base = numbers_[0], growth = numbers_[2], final = numbers_[3];
  double since = step - 1.0, length = numbers_[1];
  if (growth == 1.0) since = std::fmod(since, length);
  while (since >= length) {
    since -= length;
    length *= growth;
  }
  const double half = (1.0 - final) / 2.0;
  return base * (final + half * (1.0 + std::cos(PI * since / length)));
}

}  // namespace fusedopt
