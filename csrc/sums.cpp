#include "sums.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "arrays.hpp"
#include "cpu.hpp"
#include "floating_point.hpp"
#include "unlocked.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

// An array to be added: elements that need no decoding are of the sum's type already.
struct Summand {
  const char* data;
  std::size_t bytes;  // of an element
  Decode decode;
};

template <class Number>
void average_of(const std::vector<Summand>& parts, Number divisor, Number* out, std::size_t count) {
  alignas(64) Number sum[TILE], tile[TILE];
  // A division by a power of two has the bits of this product, and takes longer.
  const Number factor = 1 / divisor;
  int exponent;
  const bool exact = std::frexp(divisor, &exponent) == Number(0.5);
  for (std::size_t at = 0; at < count; at += TILE, out += TILE) {
    const std::size_t n = std::min(TILE, count - at);
    for (std::size_t k = 0; k < parts.size(); ++k) {
      const Summand& part = parts[k];
      const char* const data = part.data + at * part.bytes;
      const Number* more = reinterpret_cast<const Number*>(data);
      if (part.decode) {
        part.decode(data, nullptr, tile, n);
        more = tile;
      }
      if (k)
        for (std::size_t j = 0; j < n; ++j) sum[j] += more[j];
      else
        std::memcpy(sum, more, n * sizeof(Number));
    }
    if (exact)
      for (std::size_t j = 0; j < n; ++j) out[j] = sum[j] * factor;
    else
      for (std::size_t j = 0; j < n; ++j) out[j] = sum[j] / divisor;
  }
}

// Fills `out`, in the compute type, with the sum of flat arrays of any format, from the first to
// the last, divided by a number. False where an array does not fit, and nothing was written then.
bool average_arrays(const std::vector<py::object>& arrays, const py::object& out, double divisor) {
  const Proxy* const to = as_array(out.ptr());
  const int compute = format_of(to);
  if (arrays.empty() || (compute != F32 && compute != F64) || !is_target(to) || to->nd != 1)
    return false;
  const std::size_t count = elements_of(to);
  std::vector<Summand> parts;
  for (const py::object& each : arrays) {
    const Proxy* const from = as_array(each.ptr());
    const int format = format_of(from);
    if (format < 0 || !(from->flags & ALIGNED) || !is_dense(from) || from->nd != 1 ||
        elements_of(from) != count)
      return false;
    parts.push_back({from->data, SIZES[format], level().table->codecs[format].decode[compute]});
  }
  unlocked([&] {
    const DefaultControl control;
    if (compute == F32)
      average_of(parts, static_cast<float>(divisor), reinterpret_cast<float*>(to->data), count);
    else
      average_of(parts, divisor, reinterpret_cast<double*>(to->data), count);
  });
  return true;
}

}  // namespace

void bind_sums(py::module_& module) { module.def("average_arrays", &average_arrays); }

}  // namespace fusedopt
