// One step of a plan.
#include <pybind11/stl.h>

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <utility>

#include "cpu.hpp"
#include "floating_point.hpp"
#include "plan.hpp"
#include "python_driver.hpp"
#include "unlocked.hpp"

namespace fusedopt {
namespace {

constexpr std::int64_t HALFWAY = -1;  // see fusedopt/plan/spec.py

Range range_of(const Operand& input, std::size_t n) {
  return {input.data, input.data + n * input.bits / 8};
}

// Absent: no operation that needs it runs, and nothing is decoded.
void clear(Operand& operand) {
  put<char*>(operand.data, nullptr);
  put<Decode>(operand.decode, nullptr);
  put<Encode>(operand.encode, nullptr);
}

// In place of std::equal, which calls memcmp for one number or two.
bool same(const py::ssize_t* a, const py::ssize_t* b, int count) {
  for (int k = 0; k < count; ++k)
    if (a[k] != b[k]) return false;
  return true;
}

}  // namespace

py::object Plan::step(const py::object& gradients, const py::object& hessian, bool flat) {
  const DefaultControl control;
  const std::unique_ptr<Plan, void (*)(Plan*)> at_the_end(this,
                                                          [](Plan* plan) { plan->given_.clear(); });
  if (!collect(gradients, hessian, flat)) return py::none();
  if (!decide_.is_none()) {
    if (!read(flat)) return py::none();
    unlocked_if_long(elements_, [this] { measure_gradients(); });
    if (!called(decide_, py::tuple()).cast<bool>()) return py::int_(counts_[0]);
  }
  return update(flat) ? py::int_(counts_[0]) : py::object(py::none());
}

bool Plan::collect(const py::object& gradients, const py::object& hessian, bool flat) {
  if (level().table != table_) change_level();
  measured_ = false;
  if (!collect_tree(GRADIENT, gradients, flat) || !collect_tree(HESSIAN, hessian, flat))
    return false;
  find_active();
  return true;
}

bool Plan::update(bool flat) {
  prepare();
  if (!before_.is_none()) {
    if (!read(flat)) return false;
    called(before_, py::make_tuple(active_));
  }
  if (!read(flat)) return false;
  if (!measured_) begin_results();
  const bool measures = active_measure();
  if (measures) {
    take_measures();
    if (!read(flat)) return false;
  }
  bool begun = false;
  try {
    for (int batch = 0; batch < batch_count_; ++batch) run_batch(batch, flat, begun);
    unlocked_if_long(elements_, [this] { run_phase(active_of(-1), -1, &choice_); });
    begun = true;
    if (measures) {
      store_kept();
      if (!after_kept_.is_none()) called(after_kept_, py::tuple());
    }
  } catch (...) {
    if (begun) counts_[0] = HALFWAY;
    throw;
  }
  count();
  return true;
}

void Plan::count() {
  for (const std::size_t k : active_) ++counts_[k + 1];
  ++counts_[0];
}

// begun: becomes true before anything but work space is written. What comes between the phases
// writes side states, where there are any.
void Plan::run_batch(int batch, bool flat, bool& begun) {
  const std::vector<std::size_t> members = active_of(batch);
  if (members.empty()) return;
  const int last = program(members[0]).phases - 1;
  for (int phase = 0; phase < last; ++phase) {
    unlocked_if_long(elements_, [&] { run_phase(members, phase, nullptr); });
    begun = begun || phase > 0 || sided_;
    called(between_, py::make_tuple(batch, phase, members));
    if (!read(flat)) throw std::runtime_error("an array was given other memory during a step");
  }
  begun = true;
  unlocked_if_long(elements_, [&] { run_phase(members, last, nullptr); });
}

std::vector<std::size_t> Plan::active_of(int batch) const {
  std::vector<std::size_t> members;
  std::copy_if(active_.begin(), active_.end(), std::back_inserter(members),
               [&](std::size_t k) { return batches_[k] == batch; });
  return members;
}

bool Plan::unchanged(const Watched& w) const {
  const py::ssize_t* const layout = layouts_.data() + w.layout;
  return w.array->data == w.data && w.array->descr == w.dtype && w.array->nd == w.nd &&
         same(w.array->dimensions, layout, w.nd) && same(w.array->strides, layout + w.nd, w.nd);
}

bool Plan::unmoved() const {
  return std::all_of(watched_.begin(), watched_.end(), [this](const Watched& w) {
    return unchanged(w) && (!w.target || is_target(w.array));
  });
}

bool Plan::is_known(const Input& input, PyObject* o) const {
  const Proxy* const array = as_array(o);
  return array && array == input.array.array && array->flags == input.flags &&
         unchanged(input.array);
}

void Plan::remember(Input& input, const Proxy* array) {
  Watched& w = input.array;
  w = {array, array->data, array->descr, array->nd, w.layout, false};
  std::copy_n(array->dimensions, w.nd, layouts_.begin() + static_cast<std::ptrdiff_t>(w.layout));
  std::copy_n(array->strides, w.nd,
              layouts_.begin() + static_cast<std::ptrdiff_t>(w.layout) + w.nd);
  input.flags = array->flags;
}

void Plan::forget_inputs() {
  for (Input& input : inputs_) input.array.array = nullptr;
}

bool Plan::overlaps_written(const Range& range) const {
  auto it = std::partition_point(written_.begin(), written_.end(),
                                 [&](const Range& w) { return w.begin < range.end; });
  return range.begin != range.end && it != written_.begin() && overlap(*--it, range);
}

bool Plan::gradients_overlap() {
  ranges_.clear();
  for (std::size_t k = 0; k < own_.size(); ++k)
    for (const int slot : {GRADIENT, HESSIAN}) {
      const Operand& input = operands(k)[slot];
      const std::size_t n = touched_[k].given[slot];
      if (input.data && n) ranges_.push_back(range_of(input, n));
    }
  std::sort(ranges_.begin(), ranges_.end(), by_address);
  for (std::size_t k = 1; k < ranges_.size(); ++k)
    if (ranges_[k].begin < ranges_[k - 1].end) return true;
  return false;
}

bool Plan::collect_tree(Slot slot, const py::object& tree, bool flat) {
  const std::size_t first = slot == GRADIENT ? 0 : own_.size(), end = first + own_.size();
  if (slot == HESSIAN) {
    estimates_ = !tree.is_none();
    read_estimates_ = read_estimates_ || estimates_;
    if (!estimates_) {
      given_.resize(end);
      return true;
    }
  }
  const auto visit = [&](PyObject* o) {
    if (given_.size() == end) return false;
    given_.push_back(o == Py_None ? Given() : Given(o));
    return true;
  };
  if (!flat) return walk(tree_, tree.ptr(), visit) && given_.size() == end;
  for (const py::handle leaf : tree)
    if (!visit(leaf.ptr())) return false;
  return given_.size() == end;
}

bool Plan::read(bool checked) {
  if (!unmoved()) return false;
  for (std::size_t k = 0; k < own_.size(); ++k)
    if (!read_leaf(GRADIENT, k, checked) || (read_estimates_ && !read_leaf(HESSIAN, k, checked)))
      return false;
  read_estimates_ = estimates_;
  if (counted_ != layout_) {
    elements_ = 0;
    for (const std::size_t k : active_) elements_ += touched_[k].elements;
    counted_ = layout_;
  }
  if (zero_grads_ && apart_ != read_) {
    if (gradients_overlap()) return false;
    apart_ = read_;
  }
  return true;
}

bool Plan::read_leaf(Slot slot, std::size_t k, bool checked) {
  Input& input = inputs_[k * INPUTS + slot];
  PyObject* const o = given_[slot * own_.size() + k].object.ptr();
  if (o ? is_known(input, o) : input.kind == Input::ABSENT) return true;
  ++read_;
  input.array.array = nullptr;
  const auto kind = input.kind;
  input.kind = Input::ABSENT;
  const bool fits = !o || read_anew(slot, k, checked, input);
  if (input.kind == Input::ABSENT) clear(operands(k)[slot]);
  if (input.kind != kind || kind == Input::ROWS) ++layout_;
  return fits;
}

bool Plan::read_anew(Slot slot, std::size_t k, bool checked, Input& input) {
  Operand& operand = operands(k)[slot];
  Touched& touched = touched_[k];
  if (slot == GRADIENT) touched.all(own_[k].elements);
  put(touched.given[slot], own_[k].elements);
  const Given& given = given_[slot * own_.size() + k];
  PyObject* const o = given.object.ptr();
  const bool rows = checked && PyTuple_Check(o);
  if (slot == HESSIAN && !program(k).takes_hessian) return false;
  if (Mean* const mean = given.exchange ? nullptr : as_mean(o)) {
    if (!read_mean(k, *mean, operand)) return false;
    input.kind = Input::WHOLE;
    return true;
  }
  if (rows ? !read_rows(slot, k, o, operand)
           : !read_input(given, own_[k].parameter, own_[k].compute, *table_,
                         zero_grads_ && slot == GRADIENT, operand))
    return false;
  // Memory that passed in the last step passes again.
  const Range range = range_of(operand, touched.given[slot]);
  if (range.begin != input.passed.begin || range.end != input.passed.end) {
    input.passed = {};
    if (overlaps_written(range)) return false;
    input.passed = range;
  }
  input.kind = rows ? Input::ROWS : Input::WHOLE;
  if (!rows && !given.exchange) remember(input, as_array(o));
  return true;
}

bool Plan::read_mean(std::size_t k, Mean& mean, Operand& operand) const {
  if (zero_grads_ || mean.elements() != own_[k].elements ||
      !mean.apart([this](const Range& range) { return overlaps_written(range); }))
    return false;
  mean.use(own_[k].compute, operand);
  return true;
}

bool Plan::read_rows(Slot slot, std::size_t k, PyObject* o, Operand& operand) {
  if (PyTuple_GET_SIZE(o) != 3 ||
      (program(k).phases > 1 && (program(k).over != Over::ROW || !own_[k].rows.rows)))
    return false;
  const Proxy* parts[3];
  for (int j = 0; j < 3; ++j)
    if (!(parts[j] = as_array(PyTuple_GET_ITEM(o, j)))) return false;
  const auto [rows, places, values] = parts;
  const Proxy* const p = own_[k].parameter;
  const int format = format_of(values);
  const int needed = ALIGNED | C_ORDER, passed = values->flags & rows->flags & places->flags;
  if (format < 0 || (passed & needed) != needed || !(p->flags & C_ORDER) || p->nd < 1 ||
      values->nd != p->nd || rows->nd != 1 || places->nd != 1 ||
      elements_of(rows) != elements_of(places))
    return false;
  for (int j = 1; j < p->nd; ++j)
    if (values->dimensions[j] != p->dimensions[j]) return false;
  const bool zero = zero_grads_ && slot == GRADIENT;
  if (zero && !(values->flags & WRITEABLE)) return false;
  use_input(table_->codecs[format], own_[k].compute, zero, values->data, operand);
  Touched& touched = touched_[k];
  touched.given[slot] = elements_of(values);
  const auto inside = [](const Proxy* indices, const Proxy* array) {
    const auto* const first = reinterpret_cast<const std::int64_t*>(indices->data);
    const auto most = static_cast<std::int64_t>(array->dimensions[0]);
    return std::all_of(first, first + elements_of(indices),
                       [most](std::int64_t k) { return k >= 0 && k < most; });
  };
  if (!inside(rows, p) || !inside(places, values)) return false;
  if (slot != GRADIENT) return true;
  touched.rows = {
      reinterpret_cast<const std::int64_t*>(rows->data),
      reinterpret_cast<const std::int64_t*>(places->data),
      own_[k].elements / std::max<std::size_t>(1, static_cast<std::size_t>(p->dimensions[0])),
      own_[k].elements};
  touched.elements = elements_of(rows) * touched.rows.length;
  return true;
}

void Plan::find_active() {
  active_.clear();
  for (std::size_t k = 0; k < own_.size(); ++k)
    if (given_[k].object) active_.push_back(k);
}

void Plan::begin_results() {
  if (sums_ || !decide_.is_none() || (policy_ && policy_->measures))
    std::fill(result_, result_ + own_.size() * columns(), 0.0);
  if (sums_)
    for (const std::size_t k : active_) {
      result_[k * columns() + 1] = 1;
      result_[k * columns() + 2] = static_cast<double>(touched_[k].elements);
    }
}

void Plan::measure_gradients() {
  measured_ = true;
  begin_results();
  if (measured_read_ != read_) {
    measured_leaves_.clear();
    for (const std::size_t k : active_)
      measured_leaves_.push_back(
          {operands(k) + GRADIENT, touched_[k].elements, own_[k].compute, touched_[k].some()});
    square_sums_.take(measured_leaves_);
    measured_read_ = read_;
  }
  square_sums_.find(threads(), &norm_choice_);
  for (std::size_t j = 0; j < active_.size(); ++j) {
    double* const row = result_ + active_[j] * columns();
    row[0] = measured_leaves_[j].sum;
    row[1] = measured_leaves_[j].scale;
  }
}

void Plan::prepare() {
  scalar_places_.clear();
  leaf_scalars_.resize(own_.size());
  std::size_t last = own_.size();  // the leaf before this one that takes part
  for (const std::size_t k : active_) {
    const bool alike = last < k && groups_[k] == groups_[last] &&
                       own_[k].compute == own_[last].compute && counts_[k + 1] == counts_[last + 1];
    const Scalars* const found = alike ? leaf_scalars_[last] : &scalars_of(k);
    if (leaf_scalars_[k] != found) ++layout_;
    leaf_scalars_[k] = found;
    last = k;
  }
  for (const Random& r : random_)
    operands_[r.operand].key =
        subkey(r.key.first, static_cast<std::uint64_t>(counts_[r.leaf + 1])) +
        r.key.second * GOLDEN;
}

const Scalars& Plan::scalars_of(std::size_t k) {
  const std::int64_t t = counts_[k + 1] + 1;
  const std::tuple<int, int, std::int64_t> key{groups_[k], own_[k].compute, t};
  const auto found = scalar_places_.find(key);
  if (found != scalar_places_.end()) return scalars_[found->second];
  const std::size_t place = scalar_places_.size();
  if (place == scalars_.size()) scalars_.emplace_back();
  const auto group = static_cast<std::size_t>(groups_[k]);
  scalars_[place].fold(program(k), numbers_[group], t, rate_[group], factor_[group],
                       own_[k].compute);
  scalar_places_.emplace(key, place);
  return scalars_[place];
}

bool Plan::use_factors() {
  bool fit = true;
  for (const auto& [key, place] : scalar_places_) {
    const auto group = static_cast<std::size_t>(std::get<0>(key));
    fit = scalars_[place].use_factor(*programs_[group], numbers_[group], factor_[group]) && fit;
  }
  return fit;
}

bool Plan::active_measure() const {
  return std::any_of(active_.begin(), active_.end(),
                     [this](std::size_t k) { return program(k).measures; });
}

void Plan::take_measures() {
  std::vector<std::size_t> members;
  for (const std::size_t k : active_)
    if (program(k).measures) members.push_back(k);
  unlocked_if_long(elements_, [&] { run_phase(members, 0, &measure_choice_); });
  kept_.clear();
  if (!combine_.is_none()) take_kept(called(combine_, py::make_tuple(members)));
  measured_scalars_.clear();
  std::vector<double> sums, sums_before;
  const Scalars* scalars_before = nullptr;
  std::size_t last = 0;  // of a leaf's sums, among those of all; its rule's own are its last
  for (std::size_t j = 0; j < members.size(); ++j) {
    const std::size_t k = members[j];
    const Leaf& leaf = leaves_[j];
    const auto count = static_cast<std::size_t>(program(k).measured_sums);
    last += std::bitset<MAX_OPERANDS>(leaf.summed).count();
    std::size_t rows = 1;
    if (leaf.by_row) {
      rows = leaf.elements / leaf.rows->length;
      sums.clear();
      for (std::size_t sum = last - count; sum < last; ++sum)
        for (std::size_t row = 0; row < rows; ++row)
          sums.push_back(partials_.total(sum, row, rows));
    } else {
      const auto first =
          static_cast<std::size_t>(program(k).first_measured() - program(k).first_sum());
      const double* const own = result_ + k * columns() + Policy::FIRST_SUM + first;
      sums.assign(own, own + count);
      if (program(k).over != Over::LEAF && !leaf.elements) rows = 0;
    }
    // Leaves whose measures are taken together have the same sums.
    if (rows != 1 || leaf_scalars_[k] != scalars_before || sums != sums_before) {
      const auto group = static_cast<std::size_t>(groups_[k]);
      measured_scalars_.push_back(leaf_scalars_[k]->with(
          program(k), numbers_[group], counts_[k + 1] + 1, rate_[group], sums, rows));
      scalars_before = rows == 1 ? leaf_scalars_[k] : nullptr;
      sums_before = sums;
    }
    leaf_scalars_[k] = &measured_scalars_.back();
  }
}

void Plan::take_kept(py::object pairs) {
  for (const py::handle pair : pairs) {
    const bool two = PyTuple_Check(pair.ptr()) && PyTuple_GET_SIZE(pair.ptr()) == 2;
    const Proxy* const place = two ? as_array(PyTuple_GET_ITEM(pair.ptr(), 0)) : nullptr;
    const Proxy* const value = two ? as_array(PyTuple_GET_ITEM(pair.ptr(), 1)) : nullptr;
    const int format = format_of(place);
    if (format < 0 || format_of(value) != format || elements_of(place) != 1 ||
        elements_of(value) != 1)
      throw py::value_error("plan: what is kept is one number in the format of its place");
    kept_.push_back({place->data, value->data, SIZES[format]});
  }
  kept_arrays_ = std::move(pairs);
}

void Plan::store_kept() {
  for (const Kept& kept : kept_) std::memcpy(kept.place, kept.value, kept.size);
}

void Plan::run_phase(const std::vector<std::size_t>& members, int phase, ThreadChoice* choice) {
  if (phase >= 0 || laid_out_ != layout_) {
    lay_out(members, phase);
    laid_out_ = phase < 0 ? layout_ : 0;
  }
  partials_.begin();
  run(leaves_, threads(), mapped_.data ? &mapped_ : nullptr, choice);
  if (sums_) take_sums(members);
}

void Plan::lay_out(const std::vector<std::size_t>& members, int phase) {
  steps_.clear();
  steps_.reserve(members.size() * most_);  // the leaves point into it
  leaves_.resize(members.size());
  partials_.clear();
  std::size_t count = 0;
  const Scalars* scalars = nullptr;
  bool refreshed = false;
  int operand_count = 0;
  Phase steps;
  for (const std::size_t k : members) {
    Operand* const own = operands(k);
    // Neighbours with the same scalars, inputs and number of mirrors have the same steps.
    if (leaf_scalars_[k] != scalars || refreshed != (own[HESSIAN].data != nullptr) ||
        operand_count != own_[k].operand_count) {
      scalars = leaf_scalars_[k];
      refreshed = own[HESSIAN].data != nullptr;
      operand_count = own_[k].operand_count;
      const int own_phase = phase < 0 ? program(k).phases - 1 : phase;
      steps = append_phase(program(k), own_phase, own_[k].compute, *scalars, own, steps_);
    }
    // Field by field: a struct made beside its place and copied stalls on its own stores.
    Leaf& leaf = leaves_[count++];
    put(leaf.elements, touched_[k].elements);
    put<const Operand*>(leaf.operands, own);
    put<const Step*>(leaf.steps, steps_.data() + steps.first);
    put(leaf.operand_count, operand_count);
    put(leaf.step_count, steps.count);
    put(leaf.used, steps.used);
    put(leaf.written, steps.written);
    put(leaf.summed, steps.summed);
    put(leaf.maxima, steps.maxima);
    const Rows* const all = own_[k].rows.rows ? &own_[k].rows : nullptr;
    put(leaf.rows, touched_[k].some() ? touched_[k].some() : all);
    put(leaf.by_row, all != nullptr);
    if (leaf.summed) partials_.add(leaf, own);
  }
  leaves_.resize(count);
  partials_.place();
}

void Plan::take_sums(const std::vector<std::size_t>& members) {
  auto leaf = leaves_.begin();
  std::size_t next = 0;
  for (const std::size_t k : members) {
    for (int j = 0; j < program(k).sums; ++j)
      if (leaf->summed >> (program(k).first_sum() + j) & 1)
        result_[k * columns() + Policy::FIRST_SUM + static_cast<std::size_t>(j)] =
            partials_.total(next++);
    ++leaf;
  }
}

int Plan::threads() const {
  const int limit = thread_count.load();
  return threads_ > 0 ? std::min(threads_, limit) : limit;
}

}  // namespace fusedopt
