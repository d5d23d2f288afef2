// Arrays as the binding sees them: NumPy's own structs, read without NumPy's headers.
#pragma once
#include <pybind11/numpy.h>

#include <algorithm>
#include <optional>
#include <string>

#include "driver.hpp"
#include "foreign.hpp"
#include "numpy_names.hpp"
#include "table.h"

namespace fusedopt {

// The array behind a Python object, or null: subclasses and unusual dtype objects take the slow
// way, through Python.
inline const Proxy* as_array(PyObject* o) {
  return Py_TYPE(o) == numpy().ndarray ? proxy_of(o) : nullptr;
}

// The format of an array; -1 for no array, or for a format that is not NumPy's own.
inline int format_of(const Proxy* a) {
  for (int f = 0; f < FORMATS; ++f)
    if (a && a->descr == numpy().dtypes[f]) return f;
  return -1;
}

inline std::size_t elements_of(const Proxy* a) {
  std::size_t n = 1;
  for (int k = 0; k < a->nd; ++k) n *= static_cast<std::size_t>(a->dimensions[k]);
  return n;
}

// Whether both have one shape, and element i of one stands where that of the other stands.
inline bool same_layout(const Proxy* a, std::size_t a_size, const Proxy* b, std::size_t b_size) {
  if (a->nd != b->nd) return false;
  bool empty = false;
  for (int k = 0; k < a->nd; ++k) {
    if (a->dimensions[k] != b->dimensions[k]) return false;
    empty = empty || a->dimensions[k] == 0;
  }
  for (int k = 0; k < a->nd && !empty; ++k)
    if (a->dimensions[k] > 1 && a->strides[k] * static_cast<py::ssize_t>(b_size) !=
                                    b->strides[k] * static_cast<py::ssize_t>(a_size))
      return false;
  return true;
}

// Whether an array has no gaps, in any order of its axes: strides of C order, permuted.
inline bool is_dense(const Proxy* a) {
  if (a->flags & DENSE) return true;
  const int format = format_of(a);
  if (format < 0) return false;
  auto stride = static_cast<py::ssize_t>(SIZES[format]);
  unsigned long long seen = 0;  // axes; NumPy has at most 64
  for (int found = 0; found < a->nd; ++found) {
    int k = 0;
    while (k < a->nd && (seen >> k & 1 || (a->dimensions[k] != 1 && a->strides[k] != stride))) ++k;
    if (k == a->nd) return false;
    seen |= 1ULL << k;
    stride *= a->dimensions[k];
  }
  return true;
}

inline bool is_target(const Proxy* a) {
  const int needed = ALIGNED | WRITEABLE;
  return (a->flags & needed) == needed && is_dense(a);
}

struct Range {
  const char *begin, *end;
};

inline bool overlap(const Range& a, const Range& b) { return a.begin < b.end && b.begin < a.end; }
inline bool by_address(const Range& a, const Range& b) { return a.begin < b.begin; }

// The type in which a leaf is computed; -1 where its parameter has no format.
inline int compute_of(const Proxy* parameter) {
  const int format = format_of(parameter);
  return format == F64 ? F64 : format < 0 ? -1 : F32;
}

// The codec's part of an operand: looked up in the table of the instruction set in use.
inline void use_codec(const Codec& codec, int compute, Operand& out) {
  out.decode = codec.decode[compute];
  out.encode = codec.encode[compute];
  out.bits = static_cast<std::uint32_t>(codec.bits);
  out.aux_bytes = static_cast<std::uint32_t>(TILE / codec.block * codec.aux);
  out.random = codec.random ? SIZES[compute] : 0;
}

// The operand of an array that comes with a step: it is only read, or zeroed in the end.
inline void use_input(const Codec& codec, int compute, bool zero, char* data, Operand& out) {
  put(out.decode, codec.decode[compute]);
  put(out.encode, zero ? codec.zero : nullptr);
  put(out.bits, static_cast<std::uint32_t>(codec.bits));
  put(out.data, data);
  put<char*>(out.aux, nullptr);
}

// The operand of a copy of another operand: it is only written.
inline void use_copy(const Codec& codec, int compute, int source, Operand& out) {
  out.source = source;
  out.encode = codec.copy[compute];
}

// An array that comes with a step, and how to read it where it is not NumPy's. To find that out may
// run Python; to read it does not.
struct Given {
  py::object object;  // null: none
  const Exchange* exchange = nullptr;

  Given() = default;
  explicit Given(PyObject* o) : object(py::reinterpret_borrow<py::object>(o)) {
    if (!as_array(o) && !PyTuple_Check(o)) exchange = Foreign::exchange_of(Py_TYPE(o));
  }
};

// A gradient that fits the parameter becomes an operand.
inline bool read_input(const Given& given, const Proxy* parameter, int compute, const Table& table,
                       bool zero, Operand& out) {
  PyObject* const o = given.object.ptr();
  const Proxy* a = as_array(o);
  std::optional<Foreign> foreign;
  if (!a) a = foreign.emplace().read(o, given.exchange);
  if (!a || !(a->flags & ALIGNED) || (zero && !(a->flags & WRITEABLE))) return false;
  const int format = format_of(a);
  if (format < 0 || !same_layout(a, SIZES[format], parameter, SIZES[format_of(parameter)]))
    return false;
  use_input(table.codecs[format], compute, zero, a->data, out);
  return true;
}

// An array that is updated in place, and what is stored beside it.
struct Target {
  int codec = -1;
  const Proxy* data = nullptr;
  Range ranges[2] = {};  // of data and aux
};

inline bool read_bytes(PyObject* o, std::size_t bytes, Range& out) {
  if (!py::isinstance<py::array>(o)) return false;
  const auto a = py::reinterpret_borrow<py::array>(o);
  const Proxy* const proxy = proxy_of(o);
  if (static_cast<std::size_t>(a.nbytes()) < bytes || !is_target(proxy)) return false;
  out = {proxy->data, proxy->data + bytes};
  return true;
}

// What Python calls an operand: an ndarray, or (name of the codec, data, aux or None). False where
// it does not fit a parameter of n elements.
inline bool read_target(PyObject* o, const Proxy* parameter, std::size_t n, int compute,
                        const Table& table, Target& target, Operand& out) {
  PyObject* aux = Py_None;
  if (PyTuple_Check(o)) {
    const auto [name, data, beside] = py::cast<std::tuple<std::string, py::object, py::object>>(o);
    const Codec* const end = table.codecs + table.codec_count;
    const Codec* const found =
        std::find_if(table.codecs, end, [&n = name](const Codec& c) { return n == c.name; });
    if (found == end) return false;
    target.codec = static_cast<int>(found - table.codecs);
    aux = beside.ptr();  // the tuple keeps both alive
    o = data.ptr();
  } else {
    target.codec = format_of(as_array(o));
    if (target.codec < 0) return false;
  }
  const Codec& codec = table.codecs[target.codec];
  use_codec(codec, compute, out);
  const std::size_t bytes = (n * codec.bits + 7) / 8;
  if (codec.bits >= 16) {  // elements that stand where the parameter's stand
    target.data = as_array(o);
    const int format = format_of(target.data);
    if (format < 0 || SIZES[format] * 8 != codec.bits || !is_target(target.data) ||
        !same_layout(target.data, SIZES[format], parameter, SIZES[format_of(parameter)]))
      return false;
    target.ranges[0] = {target.data->data, target.data->data + bytes};
  } else if (!read_bytes(o, bytes, target.ranges[0])) {
    return false;
  }
  out.data = const_cast<char*>(target.ranges[0].begin);
  if (!codec.aux) return aux == Py_None;
  if (!read_bytes(aux, (n + codec.block - 1) / codec.block * codec.aux, target.ranges[1]))
    return false;
  out.aux = const_cast<char*>(target.ranges[1].begin);
  return true;
}

}  // namespace fusedopt
