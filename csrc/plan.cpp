#include "plan.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "cpu.hpp"
#include "hyperparameters.hpp"

namespace fusedopt {
namespace {

// A group with another rule; by the class that named tuples have from tuples, since their own is
// Python.
py::object with_rule(const py::tuple& group, const py::object& rule) {
  const py::tuple arguments = py::make_tuple(py::make_tuple(group[0], rule));
  PyObject* const made = PyTuple_Type.tp_new(Py_TYPE(group.ptr()), arguments.ptr(), nullptr);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// The object that Python and a plan share.
template <class T>
T* numbers_of(const py::object& o, std::size_t count) {
  using Numbers = py::array_t<T, py::array::c_style>;
  if (!py::isinstance<Numbers>(o))
    throw py::type_error("plan: counters are int64, rates and results float64, dense");
  auto numbers = py::reinterpret_borrow<Numbers>(o);
  if (static_cast<std::size_t>(numbers.size()) != count)
    throw py::value_error("plan: the counters, rates or results have another size");
  return numbers.mutable_data();
}

}  // namespace

Plan::Plan(const py::object& description)
    : tree_(description.attr("tree")),
      groups_(description.attr("groups").cast<std::vector<int>>()),
      batches_(description.attr("batches").cast<std::vector<int>>()),
      rates_(description.attr("rates")),
      factors_(description.attr("factors")),
      counters_(description.attr("counters")),
      combine_(description.attr("combine")),
      after_kept_(description.attr("after_kept")),
      before_(description.attr("before")),
      between_(description.attr("between")),
      results_(description.attr("results")),
      decide_(description.attr("decide")),
      sided_(description.attr("sided").cast<bool>()),
      zero_grads_(description.attr("zero_grads").cast<bool>()),
      threads_(description.attr("threads").cast<int>()) {
  use_file(description.attr("state_file"));
  const py::list programs = description.attr("programs");
  using Arrays = std::vector<std::vector<py::object>>;
  const auto arrays = description.attr("arrays").cast<Arrays>();
  const auto mirrors = description.attr("mirrors").cast<Arrays>();
  const auto keys = description.attr("keys").cast<std::vector<std::vector<RandomKey>>>();
  program_objects_ = programs;
  for (const py::handle program : programs) programs_.push_back(&program.cast<const Program&>());
  for (const py::handle each : description.attr("numbers")) numbers_.emplace_back(each);
  const std::size_t leaves = arrays.size();
  if (groups_.size() != leaves || batches_.size() != leaves || mirrors.size() != leaves ||
      keys.size() != leaves || numbers_.size() != programs_.size())
    throw py::value_error("plan: the lists differ in length");
  for (const Program* program : programs_) {
    sums_ = std::max(sums_, program->sums);
    most_ = std::max(most_, program->ops.size());
  }
  counts_ = numbers_of<std::int64_t>(counters_, leaves + 1);
  rate_ = numbers_of<double>(rates_, programs_.size());
  factor_ = numbers_of<double>(factors_, programs_.size());
  result_ = numbers_of<double>(results_, leaves * columns());
  table_ = level().table;
  for (std::size_t k = 0; k < leaves; ++k) add_leaf(arrays[k], mirrors[k], keys[k], k);
  number_rows();
  for (const py::handle each : description.attr("beside")) {
    if (!py::isinstance<py::array>(each)) throw py::type_error("plan: only ndarrays are beside");
    const auto array = py::reinterpret_borrow<py::array>(each);
    held_.push_back(array);
    const char* const data = proxy_of(array.ptr())->data;
    if (array.nbytes()) written_.push_back({data, data + array.nbytes()});
  }
  for (const py::handle each : description.attr("watched")) {
    if (!py::isinstance<py::array>(each)) throw py::type_error("plan: only ndarrays are watched");
    held_.push_back(py::reinterpret_borrow<py::object>(each));
    watch(proxy_of(each.ptr()), false);
  }
  std::sort(written_.begin(), written_.end(), by_address);
  for (const int batch : batches_) batch_count_ = std::max(batch_count_, batch + 1);
}

void Plan::use_file(const py::object& file) {
  if (file.is_none()) return;
  const py::object block = file.attr("block");
  const auto memory = py::cast<py::array>(block);
  mapped_ = {static_cast<char*>(proxy_of(memory.ptr())->data),
             static_cast<std::size_t>(memory.nbytes()), file.attr("file").cast<int>(),
             file.attr("window").cast<std::size_t>()};
  held_.push_back(file);
}

void Plan::add_leaf(const std::vector<py::object>& arrays, const std::vector<py::object>& mirrors,
                    const std::vector<RandomKey>& keys, std::size_t k) {
  const Program& program = *programs_.at(static_cast<std::size_t>(groups_[k]));
  const std::size_t first_mirror =
      INPUTS + arrays.size() + static_cast<std::size_t>(program.scratch + program.sums);
  if (static_cast<int>(arrays.size()) != program.arrays || keys.size() < arrays.size() ||
      first_mirror + mirrors.size() > static_cast<std::size_t>(MAX_OPERANDS))
    throw py::value_error("plan: a leaf's arrays do not fit its program");
  PyObject* const first = arrays[0].ptr();
  const Proxy* const parameter = as_array(
      PyTuple_Check(first) && PyTuple_GET_SIZE(first) > 1 ? PyTuple_GET_ITEM(first, 1) : first);
  const int compute = compute_of(parameter);
  if (compute < 0) throw py::value_error("plan: no such dtype");
  const std::size_t n = elements_of(parameter);
  const std::size_t first_operand = operands_.size();
  operands_.resize(first_operand + first_mirror + mirrors.size());
  Operand* const own = &operands_[first_operand];
  for (int j = 0; j < INPUTS; ++j) own[j].role = Role::INPUT;
  for (int j = 0; j < program.scratch; ++j) own[INPUTS + program.arrays + j].role = Role::SCRATCH;
  for (int j = 0; j < program.sums; ++j) own[program.first_sum() + j].role = Role::SUMS;
  const auto add = [&](const py::object& array, std::size_t place, int source) {
    Target target;
    Operand& operand = own[place];
    if (!read_target(array.ptr(), parameter, n, compute, *table_, target, operand))
      throw py::value_error("plan: an array does not fit its parameter");
    if (source >= 0) use_copy(table_->codecs[target.codec], compute, source, operand);
    coded_.push_back({first_operand + place, compute, target.codec});
    // Work space comes last of the arrays, is nobody's business, and is shared between leaves.
    const bool work =
        source < 0 && place + static_cast<std::size_t>(program.works) >= INPUTS + arrays.size();
    for (const Range& range : target.ranges)
      if (range.begin != range.end && !work) written_.push_back(range);
    if (place == PARAMETER || source >= 0) watch(target.data, true);
    held_.push_back(array);
    return target;
  };
  for (std::size_t j = 0; j < arrays.size(); ++j) {
    const Target target = add(arrays[j], PARAMETER + j, -1);
    if (table_->codecs[target.codec].random)
      random_.push_back({first_operand + PARAMETER + j, k, keys[j]});
  }
  for (std::size_t j = 0; j < mirrors.size(); ++j) add(mirrors[j], first_mirror + j, PARAMETER);
  own_.push_back(
      {parameter, n, first_operand, compute, static_cast<int>(first_mirror + mirrors.size()), {}});
  if (program.over != Over::LEAF && n && parameter->nd > 1) {
    // Rows of memory, whichever they are: Python has seen to it that that axis is the slowest one.
    const int axis = program.over == Over::ROW ? 0 : parameter->nd - 1;
    own_.back().rows = {nullptr, nullptr, n / static_cast<std::size_t>(parameter->dimensions[axis]),
                        n};
  }
  for (int j = 0; j < INPUTS; ++j) {
    inputs_.emplace_back();
    inputs_.back().array.layout = layouts_.size();
    layouts_.resize(layouts_.size() + 2 * static_cast<std::size_t>(parameter->nd));
  }
  touched_.push_back({n, {n, n}, {}});
}

void Plan::number_rows() {
  std::size_t most = 0;
  for (const Own& own : own_)
    if (own.rows.length) most = std::max(most, own.elements / own.rows.length);
  row_numbers_.resize(most);
  std::iota(row_numbers_.begin(), row_numbers_.end(), 0);
  for (Own& own : own_)
    if (own.rows.length) own.rows.rows = own.rows.from = row_numbers_.data();
}

void Plan::watch(const Proxy* array, bool target) {
  watched_.push_back({array, array->data, array->descr, array->nd, layouts_.size(), target});
  // A dtype that an array no longer has must not be another's address.
  held_.push_back(py::reinterpret_borrow<py::object>(array->descr));
  layouts_.insert(layouts_.end(), array->dimensions, array->dimensions + array->nd);
  layouts_.insert(layouts_.end(), array->strides, array->strides + array->nd);
}

void Plan::seize(const void* token) {
  const void* nobody = nullptr;
  if (!holder_.compare_exchange_strong(nobody, token))
    throw std::runtime_error(
        "this optimizer is in use in another thread: give each thread its own optimizer");
}

void Plan::release(const void* token) { holder_.compare_exchange_strong(token, nullptr); }

bool Plan::reprogram(const py::list& programs, const py::list& numbers) {
  if (programs.size() != programs_.size() || numbers.size() != numbers_.size()) return false;
  std::vector<const Program*> fresh;
  std::vector<Numbers> described;
  for (const py::handle each : numbers) described.emplace_back(each);
  for (const py::handle each : programs) {
    const auto& program = each.cast<const Program&>();
    const Program& old = *programs_[fresh.size()];
    if (program.arrays != old.arrays || program.works != old.works ||
        program.phases != old.phases || program.measured_sums != old.measured_sums ||
        program.scratch != old.scratch || program.sums != old.sums || program.over != old.over)
      return false;
    fresh.push_back(&program);
  }
  programs_ = std::move(fresh);
  ++layout_;
  forget_inputs();
  // Dropped objects are released last: the end of a caller's object may run anything.
  numbers_.swap(described);
  const py::object before = std::exchange(program_objects_, programs);
  most_ = 0;
  for (const Program* program : programs_) most_ = std::max(most_, program->ops.size());
  return true;
}

bool Plan::renumber(const py::list& given) {
  const Use use(*this);
  return policy_ && given.size() == programs_.size() && take_numbers(&given);
}

bool Plan::take_numbers(const py::list* given) {
  const Names& is = Names::get();
  const py::object& rates = policy_->rates;
  const py::list old_groups = py::getattr(rates, is.groups);
  const py::list old_current = py::getattr(rates, is.current);
  const std::size_t count = programs_.size();
  const std::int64_t step = counts_[0] + 1;
  py::list groups(given ? count : 0), current(count);
  py::object extras = py::none(), old_extras;  // where they change
  bool any = !given;
  if (!given && policy_->moving) {
    old_extras = py::getattr(rates, is.extras);
    extras = py::getattr(py::getattr(rates, is.extras_given), is.at)(step);
    // Slow weights have operations of their own in the steps in which they move.
    const auto moves = [&is](const py::object& o) { return py::bool_(py::getattr(o, is.slow)); };
    if (!moves(extras).equal(moves(old_extras))) return false;
  }
  std::vector<Numbers> fresh;
  std::vector<double> rate(rate_, rate_ + count);
  for (std::size_t k = 0; k < count; ++k) {
    const py::tuple group = old_groups[k], now = old_current[k];
    const py::dict values = given ? py::dict((*given)[k]) : policy_->values(k, group[1], step);
    const auto other = [&](const py::tuple& before) -> py::object {
      const py::object rule = renumbered(before[1], values, policy_->numbers[k]);
      return rule ? with_rule(before, rule) : py::object();
    };
    py::object own = group, running = now;
    if (!values.empty()) {
      any = true;
      running = other(now);
      if (given) own = group[1].is(now[1]) ? running : other(group);
      if (!running || !own) return false;
      if (values.contains(is.lr)) rate[k] = values[is.lr].cast<double>();
    }
    if (given) groups[k] = own;
    current[k] = running;
    const py::object rule = py::tuple(running)[1];
    fresh.push_back(numbers_[k].of(rule, extras));
    if (!values.contains(is.weight_decay)) continue;
    const py::tuple line = py::getattr(rule, is.decay_line);
    fresh[k].base = line[0].cast<double>();
    fresh[k].slope = line[1].cast<double>();
  }
  if (!any) return false;
  // What is dropped is released last: see `reprogram`.
  numbers_.swap(fresh);
  std::copy(rate.begin(), rate.end(), rate_);
  if (given) py::setattr(rates, is.groups, groups);
  py::setattr(rates, is.current, current);
  if (old_extras) py::setattr(rates, is.extras, extras);
  return true;
}

void Plan::change_level() {
  table_ = level().table;
  ++layout_;
  forget_inputs();
  for (const Coded& coded : coded_) {
    Operand& operand = operands_[coded.operand];
    const Codec& codec = table_->codecs[coded.codec];
    use_codec(codec, coded.compute, operand);
    if (operand.source >= 0) use_copy(codec, coded.compute, operand.source, operand);
  }
}

void bind_plan(py::module_& module) {
  numpy();
  py::class_<Program>(module, "Program").def(py::init<const py::list&, int, int, int, int, int>());
  py::class_<Plan>(module, "Plan")
      .def(py::init<const py::object&>())
      .def("take", &Plan::take)
      .def("give", &Plan::give)
      .def("held", &Plan::held)
      .def("reprogram", &Plan::reprogram)
      .def("renumber", &Plan::renumber)
      .def("step", &Plan::step)
      .def("settle", &Plan::settle)
      .def("whole_step", &Plan::whole_step);
}

}  // namespace fusedopt
