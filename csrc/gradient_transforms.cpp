#include "gradient_transforms.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.hpp"
#include "parallel.hpp"
#include "programs.hpp"

namespace fusedopt {
namespace {

// The least norm that a row of a parameter is taken to have, so that one of zeros can move: the
// same as in fusedopt/step/gradient_transforms.py.
constexpr double LEAST_ROW = 1e-3;

alignas(64) thread_local char decoded_segment[SEGMENT * sizeof(double)];

// Calls visit(x, from, size) for segments of n elements, from one on, in the compute type.
template <class T, class Visit>
void each_segment(const Operand& operand, std::size_t at, std::size_t n, const Visit& visit) {
  for (std::size_t from = 0; from < n; from += SEGMENT) {
    const std::size_t size = std::min(SEGMENT, n - from), first = at + from;
    const char* data = operand.data + first * operand.bits / 8;
    if (operand.decode) {
      const char* const beside = operand.aux + first * operand.aux_bytes / TILE;
      operand.decode(data, operand.aux ? beside : nullptr, decoded_segment, size);
      data = decoded_segment;
    }
    visit(reinterpret_cast<const T*>(data), from, size);
  }
}

// The norm that an array of these elements alone has by `SquareSums`.
template <class T>
double norm(TileFunction squares, const Operand& operand, std::size_t at, std::size_t n) {
  const auto sum = [&](double scale) {
    const T factor = static_cast<T>(scale);
    double total = 0, found;
    each_segment<T>(operand, at, n, [&](const T* x, std::size_t, std::size_t size) {
      void* const operands[] = {&found, const_cast<T*>(x)};
      squares(operands, &factor, size);
      total += found;
    });
    return total;
  };
  const double once = sum(1), scale = sizeof(T) == sizeof(double) ? rescaling(once) : 1;
  return scale == 1 ? std::sqrt(once) : std::sqrt(sum(scale)) / scale;
}

// Their mean; the sum has an order that is always the same.
template <class T>
T mean(const Operand& operand, std::size_t at, std::size_t n) {
  double lanes[LANES] = {};
  each_segment<T>(operand, at, n, [&](const T* x, std::size_t, std::size_t size) {
    for (std::size_t i = 0; i < size; i += LANES)
      for (std::size_t lane = 0; lane < std::min(LANES, size - i); ++lane)
        lanes[lane] += static_cast<double>(x[i + lane]);
  });
  double sum = lanes[0];
  for (std::size_t lane = 1; lane < LANES; ++lane) sum += lanes[lane];
  return static_cast<T>(sum / static_cast<double>(n));
}

template <class T>
void multiply(const Operand& operand, std::size_t at, std::size_t n, double factor, char* to) {
  T* const out = reinterpret_cast<T*>(to) + at;
  const T by = static_cast<T>(factor);
  each_segment<T>(operand, at, n, [&](const T* x, std::size_t from, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i) out[from + i] = x[i] * by;
  });
}

// What brings a norm to its limit, or 1. One that is not finite stays.
double factor_to(double limit, double norm) {
  return std::isfinite(norm) && norm > limit ? limit / norm : 1.0;
}

// An array of the compute type.
void describe(int compute, char* data, Operand& out) {
  out.data = data;
  out.aux = nullptr;
  out.decode = nullptr;
  out.bits = 8u * SIZES[compute];
  out.aux_bytes = 0;
}

// body(k) for each k.
template <class Body>
void for_each(std::size_t count, int threads, const Body& body) {
  const auto run = [](void* of, std::size_t k) { (*static_cast<const Body*>(of))(k); };
  parallel_for(count, threads, run, const_cast<Body*>(&body));
}

// Calls function(T()) with the compute type.
template <class Function>
void in_type(int compute, const Function& function) {
  if (compute == F64)
    function(double());
  else
    function(float());
}

// Parts of leaves that a thread takes one after the other: rows, or elements.
struct Unit {
  std::size_t leaf, first, last;
};

// In units of about a segment; `size` gives the number of equal pieces of a leaf.
template <class Size>
std::vector<Unit> units_of(const std::vector<Transformed>& leaves, const Size& size) {
  std::vector<Unit> units;
  for (std::size_t k = 0; k < leaves.size(); ++k) {
    const std::size_t pieces = size(k);
    if (!pieces || !leaves[k].elements) continue;
    const std::size_t each = std::max<std::size_t>(1, leaves[k].elements / pieces);
    const std::size_t step = std::max<std::size_t>(1, SEGMENT / each);
    for (std::size_t from = 0; from < pieces; from += step)
      units.push_back({k, from, std::min(pieces, from + step)});
  }
  return units;
}

}  // namespace

bool GradientTransforms::apply(std::vector<Transformed>& leaves, double factor, int threads) {
  changes_.clear();
  std::size_t elements = 0;
  for (const Transformed& leaf : leaves) elements += leaf.elements;
  if (elements < SERIAL) threads = 1;
  if (buffers_.size() < leaves.size()) {
    buffers_.resize(leaves.size());
    sizes_.resize(leaves.size());
  }
  if (centralize_ || clip_adaptive_ > 0) transform_rows(leaves, factor, threads);
  if (clip_leaf_ > 0) clip_leaves(leaves, factor, threads);
  return !changes_.empty();
}

bool GradientTransforms::restore(bool zero) {
  const bool changed = !changes_.empty();
  // The last change of a leaf comes first: what was there before it may be another one.
  for (auto change = changes_.rbegin(); change != changes_.rend(); ++change)
    *change->place = change->before;
  if (zero)
    for (const Change& change : changes_)
      std::memset(change.place->data, 0, change.elements * change.place->bits / 8);
  changes_.clear();
  return changed;
}

char* GradientTransforms::buffer(std::size_t k, const Transformed& leaf) {
  const std::size_t size = leaf.elements * SIZES[leaf.compute];
  if (sizes_[k] < size) {
    buffers_[k].reset(new char[size]);
    sizes_[k] = size;
  }
  return buffers_[k].get();
}

void GradientTransforms::change(Transformed& leaf, char* data) {
  changes_.push_back({leaf.gradient, *leaf.gradient, leaf.elements});
  describe(leaf.compute, data, *leaf.gradient);
}

void GradientTransforms::transform_rows(std::vector<Transformed>& leaves, double factor,
                                        int threads) {
  const auto centred = [this](const Transformed& leaf) { return centralize_ && leaf.axes > 1; };
  const TileFunction* const squares = operation_named(*level().table, "squares").segment;
  std::vector<char*> written(leaves.size());
  std::vector<std::size_t> begin(leaves.size() + 1);
  for (std::size_t k = 0; k < leaves.size(); ++k) {
    begin[k + 1] = begin[k] + leaves[k].rows;
    if (centred(leaves[k])) written[k] = buffer(k, leaves[k]);
  }
  std::vector<double> factors(begin.back(), 1.0);
  const auto units = units_of(leaves, [&](std::size_t k) { return leaves[k].rows; });
  for_each(units.size(), threads, [&](std::size_t unit) {
    const auto [k, first, last] = units[unit];
    const Transformed& leaf = leaves[k];
    const std::size_t length = leaf.elements / leaf.rows;
    Operand own = *leaf.gradient;
    if (written[k]) describe(leaf.compute, written[k], own);
    in_type(leaf.compute, [&, k = k, first = first, last = last](auto zero) {
      using T = decltype(zero);
      for (std::size_t row = first, at = row * length; row < last; ++row, at += length) {
        if (written[k]) {
          T* const to = reinterpret_cast<T*>(written[k]) + at;
          const T subtracted = mean<T>(*leaf.gradient, at, length);
          each_segment<T>(*leaf.gradient, at, length,
                          [&](const T* x, std::size_t from, std::size_t size) {
                            for (std::size_t i = 0; i < size; ++i) to[from + i] = x[i] - subtracted;
                          });
        }
        if (!(clip_adaptive_ > 0)) continue;
        const TileFunction sum = squares[leaf.compute];
        const double size = norm<T>(sum, *leaf.parameter, at, length);
        const double limit = clip_adaptive_ * (size < LEAST_ROW ? LEAST_ROW : size);
        factors[begin[k] + row] = factor_to(limit, norm<T>(sum, own, at, length) * factor);
      }
    });
  });
  std::vector<char> clipped(leaves.size());
  for (std::size_t k = 0; k < leaves.size(); ++k) {
    clipped[k] = std::any_of(factors.begin() + static_cast<std::ptrdiff_t>(begin[k]),
                             factors.begin() + static_cast<std::ptrdiff_t>(begin[k + 1]),
                             [](double x) { return x != 1.0; });
    if (written[k]) change(leaves[k], written[k]);
  }
  multiply_some(leaves, clipped, factors, &begin, threads);
}

void GradientTransforms::clip_leaves(std::vector<Transformed>& leaves, double factor, int threads) {
  std::vector<Measured> measured;
  for (const Transformed& leaf : leaves)
    measured.push_back({leaf.gradient, leaf.elements, leaf.compute, nullptr});
  square_sums_.take(measured);
  square_sums_.find(threads);
  std::vector<double> factors;
  std::vector<char> clipped;
  for (const Measured& each : measured) {
    factors.push_back(factor_to(clip_leaf_, std::sqrt(each.sum) / each.scale * factor));
    clipped.push_back(factors.back() != 1.0);
  }
  multiply_some(leaves, clipped, factors, nullptr, threads);
}

// By a factor of each leaf, or with `rows` of each row; rows[k]: the first one of leaf k.
void GradientTransforms::multiply_some(std::vector<Transformed>& leaves,
                                       const std::vector<char>& some,
                                       const std::vector<double>& factors,
                                       const std::vector<std::size_t>* rows, int threads) {
  std::vector<char*> to(leaves.size());
  for (std::size_t k = 0; k < leaves.size(); ++k)
    if (some[k]) to[k] = buffer(k, leaves[k]);
  const auto units = units_of(leaves, [&](std::size_t k) {
    return !some[k] ? 0 : rows ? leaves[k].rows : leaves[k].elements;
  });
  for_each(units.size(), threads, [&](std::size_t unit) {
    const auto [k, first, last] = units[unit];
    const Transformed& leaf = leaves[k];
    in_type(leaf.compute, [&, k = k, first = first, last = last](auto zero) {
      using T = decltype(zero);
      if (!rows) return multiply<T>(*leaf.gradient, first, last - first, factors[k], to[k]);
      const std::size_t length = leaf.elements / leaf.rows;
      for (std::size_t row = first; row < last; ++row)
        multiply<T>(*leaf.gradient, row * length, length, factors[(*rows)[k] + row], to[k]);
    });
  });
  for (std::size_t k = 0; k < leaves.size(); ++k)
    if (some[k]) change(leaves[k], to[k]);
}

}  // namespace fusedopt
