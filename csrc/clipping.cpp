#include "clipping.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>

namespace fusedopt {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();

// The sum of numbers >= 0, rounded once, so that no order shows; infinite where it leaves float64.
// The parts of the sum do not overlap and together are exact (Shewchuk 1997, "Adaptive precision
// floating-point arithmetic", theorem 10).
double sum_of_parts(const std::vector<double>& values) {
  std::vector<double> parts;  // the smallest first
  for (double rest : values) {
    std::size_t kept = 0;
    for (double part : parts) {
      if (std::fabs(rest) < std::fabs(part)) std::swap(rest, part);
      const double high = rest + part;
      const double low = part - (high - rest);
      if (low != 0) parts[kept++] = low;
      rest = high;
    }
    if (rest == INF) return INF;
    parts.resize(kept);
    parts.push_back(rest);
  }
  if (parts.empty()) return 0;
  double sum = parts.back(), lost = 0;
  parts.pop_back();
  while (!parts.empty() && lost == 0) {
    const double part = parts.back(), high = sum + part;
    lost = part - (high - sum);
    sum = high;
    parts.pop_back();
  }
  // What was lost may be half a unit, rounded to even; what is left of the parts decides then.
  if (!parts.empty() && lost != 0 && (lost > 0) == (parts.back() > 0)) {
    const double further = sum + 2 * lost;
    if (further - sum == 2 * lost) sum = further;
  }
  return sum;
}

// The same, in nearly all cases at a tenth of the cost.
class Sum {
 public:
  void add(double value) {
    const double next = sum_ + value, added = next - sum_;
    lost_ += (sum_ - (next - added)) + (value - added);
    sum_ = next;
    ++count_;
  }
  // What the additions lost is known to within less than `error`. False where that is not enough.
  bool exact(double& sum) const {
    const double count = static_cast<double>(count_) * 0x1p-52;
    const double error = count * count * sum_;
    const double low = sum_ + (lost_ - error), high = sum_ + (lost_ + error);
    sum = low;
    return error > 0 && low == high;
  }

 private:
  double sum_ = 0, lost_ = 0;
  std::size_t count_ = 0;
};

double exact_sum(const std::vector<double>& values) {
  Sum quick;
  for (const double value : values) quick.add(value);
  double sum;
  return quick.exact(sum) ? sum : sum_of_parts(values);
}

}  // namespace

double combined(const std::vector<SquareSum>& leaves) {
  // Nearly always one pass is enough: no number has a scale, and none is NaN or infinite.
  Sum quick;
  bool usual = true;
  for (const auto& [sum, scale] : leaves) {
    usual = usual && (scale == 1 || sum == 0);
    quick.add(sum);
  }
  if (double sum; usual && quick.exact(sum) && sum < INF) return std::sqrt(sum);
  std::vector<double> values;
  values.reserve(leaves.size());
  bool scaled = false, infinite = false;
  for (const auto& [sum, scale] : leaves) {
    // Zeros were looked at again, in vain; their scales are not to show either.
    if (sum == 0 || scale == 0) continue;
    if (std::isnan(sum)) return sum;
    infinite = infinite || std::isinf(sum);
    scaled = scaled || scale != 1;
    values.push_back(sum);
  }
  if (infinite) return INF;
  if (!scaled) {
    const double total = exact_sum(values);
    if (total < INF) return std::sqrt(total);
  }
  values.clear();
  double largest = 0;
  for (const auto& [sum, scale] : leaves) {
    if (sum == 0 || scale == 0) continue;
    values.push_back(std::sqrt(sum) / scale);
    largest = std::max(largest, values.back());
  }
  if (largest == 0 || largest == INF) return largest;
  for (double& norm : values) norm = norm / largest * (norm / largest);
  return largest * std::sqrt(exact_sum(values));
}

}  // namespace fusedopt
