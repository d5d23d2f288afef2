#include "rows.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "cpu.hpp"
#include "floating_point.hpp"
#include "unlocked.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

// An index, and its place among the indices as they were given.
struct Entry {
  std::uint64_t index;
  std::size_t place;
};

// By index, and equal ones in the order in which they came: digit by digit from the lowest.
void sort(std::vector<Entry>& entries) {
  constexpr int BITS = 11;
  constexpr std::uint64_t MASK = (1 << BITS) - 1;
  std::uint64_t all = 0;
  bool sorted = true;
  for (std::size_t k = 0; k < entries.size(); ++k) {
    all |= entries[k].index;
    sorted = sorted && (!k || entries[k - 1].index <= entries[k].index);
  }
  if (sorted) return;
  std::vector<Entry> other(entries.size());
  for (int shift = 0; shift < 64 && all >> shift; shift += BITS) {
    std::size_t starts[MASK + 1] = {};
    for (const Entry& e : entries) ++starts[e.index >> shift & MASK];
    std::size_t next = 0;
    for (std::size_t& start : starts) next += std::exchange(start, next);
    for (const Entry& e : entries) other[starts[e.index >> shift & MASK]++] = e;
    entries.swap(other);
  }
}

using Integers = py::array_t<std::int64_t, py::array::c_style>;

Integers array_of(std::size_t n) { return Integers(static_cast<py::ssize_t>(n)); }

// (rows, starts, order): the different indices, ascending; where each one's places begin in
// `order`; and the places of all, those of one index in the order in which they came. Entries of
// the index `skipped` are left out. Indices are at least 0.
py::tuple sort_rows(const Integers& indices, std::optional<std::int64_t> skipped) {
  const std::int64_t* const given = indices.data();
  std::vector<Entry> entries;
  const auto n = static_cast<std::size_t>(indices.size());
  std::size_t different = 0;
  unlocked([&] {
    entries.reserve(n);
    for (std::size_t k = 0; k < n; ++k)
      if (given[k] != skipped) entries.push_back({static_cast<std::uint64_t>(given[k]), k});
    sort(entries);
    for (std::size_t k = 0; k < entries.size(); ++k)
      different += !k || entries[k].index != entries[k - 1].index;
  });
  Integers rows = array_of(different), starts = array_of(different),
           order = array_of(entries.size());
  std::int64_t *row = rows.mutable_data(), *start = starts.mutable_data(),
               *place = order.mutable_data();
  for (std::size_t k = 0; k < entries.size(); ++k) {
    if (!k || entries[k].index != entries[k - 1].index) {
      *row++ = static_cast<std::int64_t>(entries[k].index);
      *start++ = static_cast<std::int64_t>(k);
    }
    *place++ = static_cast<std::int64_t>(entries[k].place);
  }
  return py::make_tuple(rows, starts, order);
}

// Row r of the sums is values[order[starts[r]]] + values[order[starts[r] + 1]] + ..., from the
// left. Elements that need no decoding are `Number`s already.
template <class Number>
void add_up(const char* values, std::size_t bytes, Decode decode, const Integers& starts,
            const Integers& order, Number* sums, std::size_t length) {
  alignas(64) Number tile[TILE];
  const auto count = static_cast<std::size_t>(starts.size());
  const std::int64_t *const start = starts.data(), *const place = order.data();
  for (std::size_t r = 0; r < count; ++r, sums += length) {
    const std::size_t first = static_cast<std::size_t>(start[r]);
    const std::size_t last = static_cast<std::size_t>(r + 1 < count ? start[r + 1] : order.size());
    for (std::size_t k = first; k < last; ++k) {
      const char* const row = values + static_cast<std::size_t>(place[k]) * length * bytes;
      for (std::size_t at = 0; at < length; at += TILE) {
        const std::size_t n = std::min(TILE, length - at);
        const Number* more = reinterpret_cast<const Number*>(row + at * bytes);
        if (decode) {
          decode(row + at * bytes, nullptr, tile, n);
          more = tile;
        }
        Number* const sum = sums + at;
        if (k == first)
          std::memcpy(sum, more, n * sizeof(Number));
        else
          for (std::size_t j = 0; j < n; ++j) sum[j] += more[j];
      }
    }
  }
}

// Fills `sums`, an array in the compute type, with the rows of `values` added up as `sort_rows`
// found them. False where an array does not fit, and nothing was written then.
bool add_rows(const py::object& values, const Integers& starts, const Integers& order,
              const py::object& sums) {
  const Proxy *const from = as_array(values.ptr()), *const to = as_array(sums.ptr());
  const int format = format_of(from), compute = format_of(to);
  if (format < 0 || (compute != F32 && compute != F64) || !is_target(to) ||
      !(from->flags & C_ORDER) || !(from->flags & ALIGNED) || !(to->flags & C_ORDER))
    return false;
  const std::size_t length = to->nd && to->dimensions[0] ? elements_of(to) / to->dimensions[0] : 0;
  const Decode decode = level().table->codecs[format].decode[compute];
  unlocked([&] {
    const DefaultControl control;
    if (compute == F32)
      add_up(from->data, SIZES[format], decode, starts, order, reinterpret_cast<float*>(to->data),
             length);
    else
      add_up(from->data, SIZES[format], decode, starts, order, reinterpret_cast<double*>(to->data),
             length);
  });
  return true;
}

}  // namespace

void bind_rows(py::module_& module) {
  module.def("sort_rows", &sort_rows);
  module.def("add_rows", &add_rows);
}

}  // namespace fusedopt
