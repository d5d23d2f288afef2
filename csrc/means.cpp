#include "means.hpp"

#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>

#include "cpu.hpp"
#include "floating_point.hpp"
#include "unlocked.hpp"

namespace fusedopt {
namespace {

PyTypeObject* mean_type = nullptr;

}  // namespace

Mean::Mean(const std::vector<py::object>& arrays, double divisor)
    : held_(arrays), summands_{nullptr, arrays.size(), divisor, 0} {
  int exponent;
  if (std::frexp(divisor, &exponent) == 0.5) summands_.factor = 1 / divisor;
  for (const py::object& each : held_) {
    const Proxy* const from = as_array(each.ptr());
    const int format = format_of(from);
    if (format < 0 || from->nd != 1 || !(from->flags & ALIGNED) || !is_dense(from) ||
        (!parts_.empty() && elements_of(from) != elements_))
      throw std::invalid_argument("a mean is of flat, dense arrays of one length");
    elements_ = elements_of(from);
    formats_.push_back(format);
    parts_.push_back({from->data, SIZES[format], nullptr});
  }
  if (parts_.empty()) throw std::invalid_argument("a mean is of one array at least");
  summands_.parts = parts_.data();
}

void Mean::use(int compute, Operand& out) {
  const Table& table = *level().table;
  for (std::size_t k = 0; k < parts_.size(); ++k)
    parts_[k].decode = table.codecs[formats_[k]].decode[compute];
  use_input(table.codecs[formats_[0]], compute, false, const_cast<char*>(parts_[0].data), out);
  put(out.decode, table.mean[compute]);
  put(out.aux, reinterpret_cast<char*>(&summands_));  // aux_bytes is 0: the same for each tile
}

bool Mean::write(const py::object& out) {
  const Proxy* const to = as_array(out.ptr());
  const int compute = format_of(to);
  if ((compute != F32 && compute != F64) || !is_target(to) || to->nd != 1 ||
      elements_of(to) != elements_)
    return false;
  Operand operand;
  use(compute, operand);
  unlocked([&] {
    const DefaultControl control;
    operand.decode(operand.data, operand.aux, to->data, elements_);
  });
  return true;
}

Mean* as_mean(PyObject* o) {
  return Py_TYPE(o) == mean_type ? py::handle(o).cast<Mean*>() : nullptr;
}

void bind_means(py::module_& module) {
  py::class_<Mean> bound(module, "Mean");
  bound.def(py::init<const std::vector<py::object>&, double>()).def("write", &Mean::write);
  mean_type = reinterpret_cast<PyTypeObject*>(bound.ptr());
}

}  // namespace fusedopt
