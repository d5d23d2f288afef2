#include "programs.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "unlocked.hpp"

namespace fusedopt {
namespace {

// The slots that an operation uses, and those that it writes.
std::pair<std::uint32_t, std::uint32_t> masks(const Operation& op, bool peek,
                                              const std::vector<std::uint8_t>& operands) {
  std::uint32_t used = 0, written = 0;
  for (std::size_t k = 0; k < operands.size(); ++k) {
    const std::uint32_t bit = 1u << operands[k];
    const int place = static_cast<int>(k);
    used |= bit;
    if (peek                 ? k + 1 == operands.size()
        : op.kind == RULE    ? place == 0 || (place >= 2 && place < 2 + op.written)
        : op.kind == MEASURE ? place < op.written
                             : place == 0)
      written |= bit;
  }
  return {used, written};
}

}  // namespace

const Operation& operation_named(const Table& table, const std::string& name) {
  const Operation* const end = table.operations + table.operation_count;
  const Operation* const op =
      std::find_if(table.operations, end, [&](const Operation& o) { return name == o.name; });
  if (op == end) throw py::key_error(name);
  return *op;
}

Program::Program(const py::list& rows, int arrays, int works, int scratch, int sums, int over)
    : arrays(arrays), works(works), scratch(scratch), sums(sums), over(static_cast<Over>(over)) {
  const int slot_count = INPUTS + arrays + scratch + sums;
  if (arrays < 1 || works < 0 || works >= arrays || scratch < 0 || sums < 0 ||
      slot_count > MAX_OPERANDS)
    throw py::value_error("a program has 1 to " + std::to_string(MAX_OPERANDS) + " operands");
  const Table& table = *level().table;
  for (const py::handle row : rows) {
    const auto [name, mode, phase, input, measured, slots, outside] =
        row.cast<std::tuple<std::string, int, int, int, int, std::vector<int>, py::object>>();
    const auto given = outside.is_none() ? Outside{} : outside.cast<Outside>();
    const int index = outside.is_none()
                          ? static_cast<int>(&operation_named(table, name) - table.operations)
                          : adopt(name, mode, static_cast<int>(slots.size()), given);
    const Operation* const op = &operation(index);
    const bool peek = mode == PEEK || mode == PEEK_L2;
    if (mode < 0 || mode >= MODES || !op->compute[0].mode[mode] || phase < 0 ||
        static_cast<int>(slots.size()) != op->operands + peek || measured < 0 ||
        (op->kind == MEASURE && phase != 0) ||
        (measured && (op->kind != RULE || phase != 1 || measured > op->scalars - 2)))
      throw py::value_error("operation '" + name + "' cannot be used so");
    std::vector<std::uint8_t> operands;
    for (const int slot : slots) {
      if (slot < 0 || slot >= slot_count) throw py::value_error("no such operand slot");
      operands.push_back(static_cast<std::uint8_t>(slot));
    }
    const auto [used, written] = masks(*op, peek, operands);
    const std::uint32_t summed = op->kind == SUM || op->kind == MEASURE ? written : 0;
    std::uint32_t maxima = 0;
    for (int k = op->written - std::get<1>(given); op->kind == MEASURE && k < op->written; ++k)
      maxima |= 1u << operands[static_cast<std::size_t>(k)];
    ops.push_back(
        {index, mode, phase, input, measured, operands, used, written & ~summed, summed, maxima});
    scalar_count += op->scalars;
    phases = std::max(phases, phase + 1);
    takes_hessian = takes_hessian || input == HESSIAN;
    filtered = filtered || op->kind == FILTER;
    if (op->kind == MEASURE) {
      measures = true;
      measured_sums = op->written;
    }
  }
  if (over < 0 || over > static_cast<int>(Over::COLUMN))
    throw py::value_error("a program's sums are of a leaf (0), of rows (1) or of columns (2)");
  if ((measures && (phases != 2 || works || measured_sums > sums)) ||
      (this->over != Over::LEAF && !measures))
    throw py::value_error("a program measures in the first of two phases, without work space");
}

int Program::adopt(const std::string& name, int mode, int operands, const Outside& outside) {
  const auto& [measures, maxima, scalars, addresses] = outside;
  if (mode < 0 || mode >= PEEK || operands < 2 + measures || measures < 0 || maxima < 0 ||
      maxima > measures || scalars < 2 ||
      addresses.size() != static_cast<std::size_t>(COMPUTE_TYPES))
    throw py::value_error("operation '" + name + "' cannot be used so");
  foreign.emplace_back(name, Operation{});
  auto& [kept, operation] = foreign.back();
  operation = {kept.c_str(),
               operands,
               measures ? MEASURE : RULE,
               measures ? measures : operands - 2,
               scalars,
               {},
               {},
               {}};
  for (int compute = 0; compute < COMPUTE_TYPES; ++compute)
    operation.compute[compute].mode[mode] =
        reinterpret_cast<TileFunction>(addresses[static_cast<std::size_t>(compute)]);
  return ~static_cast<int>(foreign.size() - 1);
}

Numbers::Numbers(const py::handle& description) {
  PyObject *own, *head;
  if (!PyArg_ParseTuple(description.ptr(), "O!O!", &PyTuple_Type, &own, &PyTuple_Type, &head) ||
      !PyArg_ParseTuple(head, "ddd", &factor, &base, &slope))
    throw py::error_already_set();
  folds = py::reinterpret_borrow<py::tuple>(own);
}

Numbers Numbers::of(const py::handle& rule, const py::handle& extras) const {
  Numbers result = *this;
  result.folds = py::tuple(folds.size());
  for (std::size_t k = 0; k < folds.size(); ++k) {
    py::object fold = folds[k];
    for (const py::handle owner : {rule, extras}) {
      if (!PyMethod_Check(fold.ptr()) ||
          Py_TYPE(PyMethod_GET_SELF(fold.ptr())) != Py_TYPE(owner.ptr()))
        continue;
      fold = py::reinterpret_steal<py::object>(
          PyMethod_New(PyMethod_GET_FUNCTION(fold.ptr()), owner.ptr()));
      if (!fold) throw py::error_already_set();
    }
    result.folds[k] = fold;
  }
  return result;
}

void Scalars::fold(const Program& program, const Numbers& numbers, std::int64_t t, double lr,
                   double factor, int compute) {
  storage_.resize(static_cast<std::size_t>(program.scalar_count));
  compute_ = compute;
  use_factor(program, numbers, factor);
  const py::int_ step(t);
  const py::float_ rate(lr);
  PyObject* const arguments[] = {step.ptr(), rate.ptr()};
  if (numbers.folds.size() != program.ops.size() + program.measures)
    throw py::value_error("one fold for each operation");
  int first = 0;
  for (std::size_t k = 0; k < program.ops.size(); ++k) {
    const Operation& operation = program.operation(program.ops[k].index);
    const bool decays = operation.kind == RULE || operation.kind == MEASURE;
    const int head = decays ? 2 : operation.kind == FILTER;
    if (decays) put(first + 1, numbers.base + numbers.slope * lr);
    PyObject* const fold = PyTuple_GET_ITEM(numbers.folds.ptr(), static_cast<Py_ssize_t>(k));
    const auto found = py::reinterpret_steal<py::object>(
        in_python([&] { return PyObject_Vectorcall(fold, arguments, 2, nullptr); }));
    if (!found) throw py::error_already_set();
    const int own = operation.scalars - program.ops[k].measured;
    put_all(first + head, found, own - head, operation.name);
    check(first, first + own, fold, operation.name, t, lr);
    first += operation.scalars;
  }
}

bool Scalars::use_factor(const Program& program, const Numbers& numbers, double factor) {
  bool finite = true;
  int first = 0;
  for (const Program::Op& op : program.ops) {
    const Operation& operation = program.operation(op.index);
    const bool decays = operation.kind == RULE || operation.kind == MEASURE;
    if (decays || operation.kind == FILTER) {
      put(first, decays && program.filtered ? 1.0 : factor * numbers.factor);
      finite = finite && is_finite(first);
    }
    first += operation.scalars;
  }
  return finite;
}

Scalars Scalars::with(const Program& program, const Numbers& numbers, std::int64_t t, double lr,
                      const std::vector<double>& sums, std::size_t rows) const {
  Scalars result = *this;
  if (!rows) return result;
  const std::size_t size = storage_.size();
  if (rows > 1) result.each_ = SIZES[compute_] * size;
  result.storage_.resize(size * rows);
  for (std::size_t row = 1; row < rows; ++row)
    std::memcpy(reinterpret_cast<char*>(result.storage_.data()) + row * result.each_,
                storage_.data(), result.each_);
  const std::size_t count = sums.size() / rows;
  const py::object fold = numbers.folds[numbers.folds.size() - 1];
  py::object given;
  if (program.over != Over::LEAF) {
    given = py::array_t<double>({count, rows}, sums.data());
  } else {
    py::tuple numbers_given(count);
    for (std::size_t k = 0; k < count; ++k) numbers_given[k] = sums[k];
    given = numbers_given;
  }
  const py::object measured = called(fold, py::make_tuple(t, lr, given));
  int end = 0;
  for (const Program::Op& op : program.ops) {
    const Operation& operation = program.operation(op.index);
    end += operation.scalars;
    if (!op.measured) continue;
    const int from = end - op.measured;
    if (program.over != Over::LEAF)
      result.put_rows(from, measured, op.measured, rows, operation.name);
    else
      result.put_all(from, measured, op.measured, operation.name);
    for (std::size_t row = 0; row < rows; ++row) {
      bool finite = true;
      for (std::size_t k = 0; k < count; ++k)
        finite = finite && std::isfinite(sums[k * rows + row]);
      // Sums of a gradient that is not finite give numbers that are not, as its elements do.
      const int own = static_cast<int>(row * size);
      if (finite) result.check(own + from, own + end, fold, operation.name, t, lr);
    }
  }
  return result;
}

void Scalars::put_rows(int index, const py::object& numbers, int length, std::size_t rows,
                       const char* name) {
  using Columns = py::array_t<double, py::array::c_style>;
  const auto wrong = [&] {
    return py::value_error("the scalars of '" + std::string(name) +
                           "' are not the array that it takes");
  };
  if (!py::isinstance<Columns>(numbers)) throw wrong();
  const auto columns = py::reinterpret_borrow<Columns>(numbers);
  if (columns.ndim() != 2 || columns.shape(0) != length ||
      columns.shape(1) != static_cast<py::ssize_t>(rows))
    throw wrong();
  const double* const values = columns.data();
  const std::size_t size = storage_.size() / rows;
  for (std::size_t row = 0; row < rows; ++row)
    for (int k = 0; k < length; ++k)
      put(static_cast<int>(row * size) + index + k,
          values[static_cast<std::size_t>(k) * rows + row]);
}

void Scalars::put_all(int index, const py::object& numbers, int length, const char* name) {
  if (!PyTuple_Check(numbers.ptr()) || PyTuple_GET_SIZE(numbers.ptr()) != length)
    throw py::value_error("the scalars of '" + std::string(name) +
                          "' are not the tuple that it takes");
  for (int j = 0; j < length; ++j) {
    const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), j));
    if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    put(index + j, value);
  }
}

void Scalars::check(int from, int to, const py::handle& fold, const char* name, std::int64_t t,
                    double lr) const {
  for (int k = from; k < to; ++k) {
    if (!is_finite(k))
      py::module_::import("fusedopt.programs.program")
          .attr("refuse_scalar")(fold, name, compute_ == F32 ? "float32" : "float64", t, lr);
  }
}

bool Scalars::is_finite(int index) const {
  return compute_ == F32 ? std::isfinite(*static_cast<const float*>(at(index)))
                         : std::isfinite(*static_cast<const double*>(at(index)));
}

void Scalars::put(int index, double value) {
  char* const place = reinterpret_cast<char*>(storage_.data()) + SIZES[compute_] * index;
  const float narrow = static_cast<float>(value);
  if (compute_ == F32)
    std::memcpy(place, &narrow, sizeof narrow);
  else
    std::memcpy(place, &value, sizeof value);
}

Phase append_phase(const Program& program, int phase, int compute, const Scalars& scalars,
                   const Operand* operands, std::vector<Step>& steps) {
  Phase result;
  result.first = steps.size();
  int first = 0;
  for (const Program::Op& op : program.ops) {
    const Operation& operation = program.operation(op.index);
    if (op.phase == phase && (op.input < 0 || operands[op.input].data)) {
      steps.push_back({operation.compute[compute].mode[op.mode], scalars.at(first),
                       op.operands.data(), static_cast<int>(op.operands.size()),
                       compute == F32 ? operation.direct.mode[op.mode] : nullptr,
                       level().table->combinations, scalars.each(), operation.segment[compute]});
      ++result.count;
      result.used |= op.used;
      result.written |= op.written;
      result.summed |= op.summed;
      result.maxima |= op.maxima;
    }
    first += operation.scalars;
  }
  // The gradient is zeroed where the parameter has been written.
  if (operands[GRADIENT].encode && (result.written >> PARAMETER & 1))
    result.written |= 1u << GRADIENT;
  // A mirror is stored together with its source.
  for (int k = PARAMETER; k < MAX_OPERANDS; ++k)
    if (operands[k].data && operands[k].source >= 0 && (result.written >> operands[k].source & 1)) {
      result.used |= 1u << k;
      result.written |= 1u << k;
    }
  return result;
}

}  // namespace fusedopt
