#include "leaves.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "cpu.hpp"
#include "driver.hpp"
#include "norms.hpp"
#include "programs.hpp"
#include "thread_choice.hpp"
#include "trees.hpp"
#include "windows.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

std::atomic<int> thread_count{1};

// One tensor, one step, in place; false where the arrays do not fit, and nothing was written then.
bool update(const Program& program, const py::tuple& folds, std::int64_t t, double lr,
            const py::object& gradient, const py::object& hessian, const py::tuple& arrays) {
  if (static_cast<int>(arrays.size()) != program.arrays || program.phases != 1 || program.scratch ||
      program.sums)
    return false;
  const Proxy* parameter = as_array(arrays[0].ptr());
  const int compute = compute_of(parameter);
  if (compute < 0) return false;
  const Table& table = *level().table;
  const std::size_t n = elements_of(parameter);
  Operand operands[MAX_OPERANDS];
  Range ranges[2 * MAX_OPERANDS];
  int range_count = 0;
  const auto apart = [&](const Range& range) {
    for (int j = 0; j < range_count; ++j)
      if (overlap(range, ranges[j])) return false;
    return true;
  };
  for (int k = 0; k < program.arrays; ++k) {
    Target target;
    if (!read_target(PyTuple_GET_ITEM(arrays.ptr(), k), parameter, n, compute, table, target,
                     operands[PARAMETER + k]))
      return false;
    for (const Range& range : target.ranges) {
      if (range.begin == range.end) continue;
      if (!apart(range)) return false;
      ranges[range_count++] = range;
    }
  }
  PyObject* const inputs[INPUTS] = {gradient.ptr(), hessian.ptr()};
  for (int i = 0; i < INPUTS; ++i) {
    if (inputs[i] == Py_None) {
      if (i == GRADIENT) return false;
      continue;
    }
    if ((i == HESSIAN && !program.takes_hessian) ||
        !read_input(inputs[i], parameter, compute, table, false, operands[i]))
      return false;
    if (n && !apart({operands[i].data, operands[i].data + n * operands[i].bits / 8})) return false;
  }
  const Scalars scalars(program, folds, t, lr, 1.0, compute);
  std::vector<Step> steps;
  const Phase phase = append_phase(program, 0, compute, scalars, operands, steps);
  std::vector<Leaf> leaves{{n, operands, steps.data(), INPUTS + program.arrays, phase.count,
                            phase.used, phase.written, 0, nullptr, 0}};
  run_unlocked(leaves, n, thread_count.load());  // the arguments hold every array alive
  return true;
}

// Of an array's random bits: the key, and the array's first tile in the one that it is a part of.
using RandomKey = std::pair<std::uint64_t, std::uint64_t>;

// Everything about an optimizer that does not change from step to step.
class Plan {
 public:
  // arrays: for each leaf its parameter, states and work space, as `read_target` takes them.
  // mirrors: for each leaf the arrays into which its parameter is written besides. keys: for each
  // leaf the keys of the arrays' random bits. batches: for each leaf -1, or the number of the batch
  // of matrices whose products come between its two phases. counters: the optimizer's step number,
  // then each leaf's. folds: for each group those of its operations. rates: float64, the groups'
  // learning rates and then their factors on gradients, read in each step. beside: what else a step
  // writes. before(leaves), if not None, is called before anything is written, between(batch,
  // phase, leaves) after each phase but the last, both with the lock held. results: float64, for
  // each leaf its gradient's sum of squares, the scale of that (0 of a leaf that took no part), the
  // elements that were touched, and the sums of its program. decide: asked when the first two are
  // known, with the lock held, whether to go on; None: they are not computed. zero_grads: gradients
  // are set to zero; threads 0 means no limit of its own. scratch: None, or an object with the
  // block, file and window of `Mapped`.
  Plan(const py::object& tree, const py::list& arrays, const py::list& mirrors,
       const std::vector<std::vector<RandomKey>>& keys, std::vector<int> groups,
       std::vector<int> batches, const py::list& programs, std::vector<py::tuple> folds,
       py::object rates, py::object counters, const py::list& beside, py::object before,
       py::object between, py::object results, py::object decide, bool zero_grads, int threads,
       const py::object& scratch)
      : tree_(tree),
        groups_(std::move(groups)),
        batches_(std::move(batches)),
        folds_(std::move(folds)),
        rates_(std::move(rates)),
        counters_(std::move(counters)),
        before_(std::move(before)),
        between_(std::move(between)),
        results_(std::move(results)),
        decide_(std::move(decide)),
        zero_grads_(zero_grads),
        threads_(threads) {
    if (!scratch.is_none()) {
      const py::object block = scratch.attr("block");
      const auto memory = py::cast<py::array>(block);
      mapped_ = {static_cast<char*>(py::detail::array_proxy(block.ptr())->data),
                 static_cast<std::size_t>(memory.nbytes()), scratch.attr("file").cast<int>(),
                 scratch.attr("window").cast<std::size_t>()};
      held_.push_back(scratch);
    }
    program_objects_ = programs;
    for (const py::handle program : programs) programs_.push_back(&program.cast<const Program&>());
    const std::size_t leaves = arrays.size();
    if (groups_.size() != leaves || batches_.size() != leaves || mirrors.size() != leaves ||
        keys.size() != leaves || folds_.size() != programs_.size())
      throw py::value_error("plan: the lists differ in length");
    for (const Program* program : programs_) {
      sums_ = std::max(sums_, program->sums);
      most_ = std::max(most_, program->ops.size());
    }
    counts_ = numbers_of<std::int64_t>(counters_, leaves + 1);
    rate_ = numbers_of<double>(rates_, 2 * programs_.size());
    result_ = numbers_of<double>(results_, leaves * columns());
    table_ = level().table;
    for (std::size_t k = 0; k < leaves; ++k)
      add_leaf(py::cast<std::vector<py::object>>(arrays[k]),
               py::cast<std::vector<py::object>>(mirrors[k]), keys[k], k);
    for (const py::handle each : beside) {
      const Proxy* const array = as_array(each.ptr());
      const int format = format_of(array);
      if (format < 0) throw py::value_error("plan: no such dtype beside the parameters");
      held_.push_back(py::reinterpret_borrow<py::object>(each));
      const std::size_t bytes = elements_of(array) * table_->codecs[format].bits / 8;
      if (bytes) written_.push_back({array->data, array->data + bytes});
    }
    std::sort(written_.begin(), written_.end(), by_address);
    for (const int batch : batches_) batch_count_ = std::max(batch_count_, batch + 1);
  }

  // Keeps everything else from using this plan until `give`; refused where something does already.
  void take() {
    if (busy_.exchange(true))
      throw std::runtime_error(
          "this optimizer is in use in another thread: give each thread its own optimizer");
  }
  void give() { busy_.store(false); }

  // Other scalars, weight decay and operations on the same arrays, by a caller who has taken the
  // plan. False where the programs would need other arrays; nothing has changed then.
  bool reprogram(const py::list& programs, std::vector<py::tuple> folds) {
    if (programs.size() != programs_.size() || folds.size() != folds_.size()) return false;
    std::vector<const Program*> fresh;
    for (const py::handle each : programs) {
      const auto& program = each.cast<const Program&>();
      const Program& old = *programs_[fresh.size()];
      if (program.arrays != old.arrays || program.works != old.works ||
          program.phases != old.phases || program.scratch != old.scratch ||
          program.sums != old.sums)
        return false;
      fresh.push_back(&program);
    }
    programs_ = std::move(fresh);
    folds_ = std::move(folds);
    program_objects_ = programs;
    most_ = 0;
    for (const Program* program : programs_) most_ = std::max(most_, program->ops.size());
    return true;
  }

  // One step, by a caller who has taken the plan. None where something does not fit; nothing was
  // written then. `flat`: the trees are lists of leaves already.
  py::object step(const py::object& gradients, const py::object& hessian, bool flat) {
    const std::unique_ptr<Plan, void (*)(Plan*)> at_the_end(
        this, [](Plan* plan) { plan->refs_.clear(); });
    if (level().table != table_) change_level();
    if (!unmoved() || !read_tree(GRADIENT, gradients, flat) || !read_tree(HESSIAN, hessian, flat) ||
        (zero_grads_ && gradients_overlap()))
      return py::none();
    find_active();
    if (!decide_.is_none()) {
      measure_gradients();
      if (!decide_().cast<bool>()) return py::int_(counts_[0]);
    }
    prepare();
    if (!before_.is_none()) before_(active_);
    for (int batch = 0; batch < batch_count_; ++batch) {
      py::list members;
      for (const std::size_t k : active_)
        if (batches_[k] == batch) members.append(k);
      if (members.empty()) continue;
      const int last = program(py::cast<std::size_t>(members[0])).phases - 1;
      for (int phase = 0; phase < last; ++phase) {
        run_phase(batch, phase);
        between_(batch, phase, members);
      }
      run_phase(batch, last);
    }
    run_phase(-1, 0);
    for (const std::size_t k : active_) ++counts_[k + 1];
    return py::int_(++counts_[0]);
  }

  // The same with trees, by one who has not taken it: the whole of a simple optimizer's step.
  py::object step_alone(const py::object& gradients, const py::object& hessian) {
    take();
    const std::unique_ptr<Plan, void (*)(Plan*)> at_the_end(this, [](Plan* plan) { plan->give(); });
    return step(gradients, hessian, false);
  }

 private:
  struct Own {
    const Proxy* parameter;
    std::size_t elements;
    int compute, operand_count;
  };
  // What a step touches of a leaf: all elements, or those of some rows.
  struct Touched {
    std::size_t elements, given[INPUTS];  // given: of its inputs, which may hold other rows too
    Rows rows;
    const Rows* some() const { return rows.rows ? &rows : nullptr; }
  };
  // An array of the caller's, which he could resize under the plan's feet.
  struct Watched {
    const Proxy* array;
    char* data;
    std::size_t elements;
  };
  // An operand whose functions change with the instruction set, and whose key with the step.
  struct Coded {
    std::size_t operand;
    int compute, codec;
  };
  struct Random {
    std::size_t operand, leaf;
    RandomKey key;
  };

  // What Python and a plan share.
  template <class T>
  static T* numbers_of(const py::object& o, std::size_t count) {
    using Numbers = py::array_t<T, py::array::c_style>;
    if (!py::isinstance<Numbers>(o))
      throw py::type_error("plan: counters are int64, rates and results float64, dense");
    auto numbers = py::reinterpret_borrow<Numbers>(o);
    if (static_cast<std::size_t>(numbers.size()) != count)
      throw py::value_error("plan: the counters, rates or results have another size");
    return numbers.mutable_data();
  }

  static bool by_address(const Range& a, const Range& b) { return a.begin < b.begin; }

  void add_leaf(const std::vector<py::object>& arrays, const std::vector<py::object>& mirrors,
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
    operands_.resize(operands_.size() + MAX_OPERANDS);
    Operand* const own = &operands_[k * MAX_OPERANDS];
    for (int j = 0; j < INPUTS; ++j) own[j].role = Role::INPUT;
    for (int j = 0; j < program.scratch; ++j) own[INPUTS + program.arrays + j].role = Role::SCRATCH;
    for (int j = 0; j < program.sums; ++j) own[program.first_sum() + j].role = Role::SUMS;
    const auto add = [&](const py::object& array, std::size_t place, int source) {
      Target target;
      Operand& operand = own[place];
      if (!read_target(array.ptr(), parameter, n, compute, *table_, target, operand))
        throw py::value_error("plan: an array does not fit its parameter");
      if (source >= 0) use_copy(table_->codecs[target.codec], compute, source, operand);
      coded_.push_back({k * MAX_OPERANDS + place, compute, target.codec});
      // Work space comes last of the arrays, is nobody's business, and is shared between leaves.
      const bool work =
          source < 0 && place + static_cast<std::size_t>(program.works) >= INPUTS + arrays.size();
      for (const Range& range : target.ranges)
        if (range.begin != range.end && !work) written_.push_back(range);
      if (place == PARAMETER || source >= 0)
        watched_.push_back({target.data, target.data->data, n});
      held_.push_back(array);
      return target;
    };
    for (std::size_t j = 0; j < arrays.size(); ++j) {
      const Target target = add(arrays[j], PARAMETER + j, -1);
      if (table_->codecs[target.codec].random)
        random_.push_back({k * MAX_OPERANDS + PARAMETER + j, k, keys[j]});
    }
    for (std::size_t j = 0; j < mirrors.size(); ++j) add(mirrors[j], first_mirror + j, PARAMETER);
    own_.push_back({parameter, n, compute, static_cast<int>(first_mirror + mirrors.size())});
    touched_.push_back({n, {n, n}, {}});
  }

  void change_level() {
    table_ = level().table;
    for (const Coded& coded : coded_) {
      Operand& operand = operands_[coded.operand];
      const Codec& codec = table_->codecs[coded.codec];
      use_codec(codec, coded.compute, operand);
      if (operand.source >= 0) use_copy(codec, coded.compute, operand.source, operand);
    }
  }

  bool unmoved() const {
    for (const Watched& w : watched_)
      if (!is_target(w.array) || w.array->data != w.data || elements_of(w.array) != w.elements)
        return false;
    return true;
  }

  static Range range_of(const Operand& input, std::size_t n) {
    return {input.data, input.data + n * input.bits / 8};
  }

  bool overlaps_written(const Range& range) const {
    auto it = std::partition_point(written_.begin(), written_.end(),
                                   [&](const Range& w) { return w.begin < range.end; });
    return range.begin != range.end && it != written_.begin() && overlap(*--it, range);
  }

  // Each other, or an estimate.
  bool gradients_overlap() {
    ranges_.clear();
    for (std::size_t k = 0; k < own_.size(); ++k)
      for (const int slot : {GRADIENT, HESSIAN}) {
        const Operand& input = operands_[k * MAX_OPERANDS + slot];
        const std::size_t n = touched_[k].given[slot];
        if (input.data && n) ranges_.push_back(range_of(input, n));
      }
    std::sort(ranges_.begin(), ranges_.end(), by_address);
    for (std::size_t k = 1; k < ranges_.size(); ++k)
      if (ranges_[k].begin < ranges_[k - 1].end) return true;
    return false;
  }

  bool read_tree(Slot slot, const py::object& tree, bool flat) {
    if (slot == HESSIAN && tree.is_none()) {
      for (std::size_t k = 0; k < own_.size(); ++k) clear(operands_[k * MAX_OPERANDS + slot]);
      return true;
    }
    std::size_t k = 0;
    const auto visit = [&](PyObject* o) {
      return k < own_.size() && read_leaf(slot, k++, o, flat);
    };
    if (!flat) return walk(tree_, tree.ptr(), visit) && k == own_.size();
    for (const py::handle leaf : tree)
      if (!visit(leaf.ptr())) return false;
    return k == own_.size();
  }

  // Absent: no operation that needs it runs, and nothing is decoded.
  static void clear(Operand& operand) {
    operand.data = nullptr;
    operand.decode = nullptr;
    operand.encode = nullptr;
  }

  // checked: by Python, which alone makes tuples of rows; a caller's own could say anything.
  bool read_leaf(Slot slot, std::size_t k, PyObject* o, bool checked) {
    Operand& operand = operands_[k * MAX_OPERANDS + slot];
    const char* const passed = operand.data;
    const std::uint32_t passed_bits = operand.bits;
    clear(operand);
    const std::size_t n = own_[k].elements;
    if (slot == GRADIENT) touched_[k] = {n, {n, n}, {}};
    if (o == Py_None) return true;
    refs_.push_back(py::reinterpret_borrow<py::object>(o));
    const bool some = checked && PyTuple_Check(o);
    bool fits = (slot != HESSIAN || program(k).takes_hessian) &&
                (some ? read_rows(slot, k, o, operand)
                      : read_input(o, own_[k].parameter, own_[k].compute, *table_,
                                   zero_grads_ && slot == GRADIENT, operand));
    // Memory that passed in the last step passes again.
    if (some || operand.data != passed || operand.bits != passed_bits)
      fits = fits && !overlaps_written(range_of(operand, touched_[k].given[slot]));
    if (!fits) clear(operand);
    return fits;
  }

  // (rows, places, values): row rows[j] of the leaf has values[places[j]]; Python has checked the
  // indices, and that estimates have the gradient's.
  bool read_rows(Slot slot, std::size_t k, PyObject* o, Operand& operand) {
    if (PyTuple_GET_SIZE(o) != 3 || program(k).phases > 1) return false;
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
    const Codec& codec = table_->codecs[format];
    use_codec(codec, own_[k].compute, operand);
    operand.encode = zero ? codec.zero : nullptr;
    operand.data = values->data;
    Touched& touched = touched_[k];
    touched.given[slot] = elements_of(values);
    if (slot != GRADIENT) return true;
    touched.rows = {
        reinterpret_cast<const std::int64_t*>(rows->data),
        reinterpret_cast<const std::int64_t*>(places->data),
        own_[k].elements / std::max<std::size_t>(1, static_cast<std::size_t>(p->dimensions[0])),
        own_[k].elements};
    touched.elements = elements_of(rows) * touched.rows.length;
    return true;
  }

  // Which leaves take part.
  void find_active() {
    active_.clear();
    for (std::size_t k = 0; k < own_.size(); ++k)
      if (operands_[k * MAX_OPERANDS + GRADIENT].data) active_.push_back(k);
    if (sums_ || !decide_.is_none()) std::fill(result_, result_ + own_.size() * columns(), 0.0);
    if (sums_)
      for (const std::size_t k : active_) {
        result_[k * columns() + 1] = 1;
        result_[k * columns() + 2] = static_cast<double>(touched_[k].elements);
      }
  }

  void measure_gradients() {
    std::vector<Measured> inputs;
    for (const std::size_t k : active_)
      inputs.push_back({operands_[k * MAX_OPERANDS + GRADIENT], touched_[k].elements,
                        own_[k].compute, touched_[k].some()});
    measure(inputs, threads());
    for (std::size_t j = 0; j < active_.size(); ++j) {
      double* const row = result_ + active_[j] * columns();
      row[0] = inputs[j].sum;
      row[1] = inputs[j].scale;
    }
  }

  // The leaves' scalars: once for each group, compute type and t.
  void prepare() {
    scalar_cache_.clear();
    leaf_scalars_.resize(own_.size());
    std::size_t last = own_.size();  // the leaf before this one that takes part
    for (const std::size_t k : active_) {
      const bool alike = last < k && groups_[k] == groups_[last] &&
                         own_[k].compute == own_[last].compute &&
                         counts_[k + 1] == counts_[last + 1];
      leaf_scalars_[k] = alike ? leaf_scalars_[last] : &scalars_of(k);
      last = k;
    }
    for (const Random& r : random_)
      operands_[r.operand].key =
          subkey(r.key.first, static_cast<std::uint64_t>(counts_[r.leaf + 1])) +
          r.key.second * GOLDEN;
  }

  const Scalars& scalars_of(std::size_t k) {
    const std::int64_t t = counts_[k + 1] + 1;
    const std::tuple<int, int, std::int64_t> key{groups_[k], own_[k].compute, t};
    auto found = scalar_cache_.find(key);
    if (found == scalar_cache_.end()) {
      const auto group = static_cast<std::size_t>(groups_[k]);
      Scalars fresh(program(k), folds_[group], t, rate_[group], rate_[programs_.size() + group],
                    own_[k].compute);
      found = scalar_cache_.emplace(key, std::move(fresh)).first;
    }
    return found->second;
  }

  void run_phase(int batch, int phase) {
    steps_.clear();
    steps_.reserve(active_.size() * most_);  // the leaves point into it
    leaves_.resize(active_.size());
    partials_.clear();
    std::size_t count = 0, elements = 0;
    const Scalars* scalars = nullptr;
    bool refreshed = false;
    int operand_count = 0;
    Phase steps;
    for (const std::size_t k : active_) {
      if (batches_[k] != batch) continue;
      Operand* const operands = &operands_[k * MAX_OPERANDS];
      // Neighbours with the same scalars, inputs and number of mirrors have the same steps.
      if (leaf_scalars_[k] != scalars || refreshed != (operands[HESSIAN].data != nullptr) ||
          operand_count != own_[k].operand_count) {
        scalars = leaf_scalars_[k];
        refreshed = operands[HESSIAN].data != nullptr;
        operand_count = own_[k].operand_count;
        steps = append_phase(program(k), phase, own_[k].compute, *scalars, operands, steps_);
      }
      // Field by field: a struct made beside its place and copied stalls on its own stores.
      Leaf& leaf = leaves_[count++];
      elements += leaf.elements = touched_[k].elements;
      leaf.operands = operands;
      leaf.steps = steps_.data() + steps.first;
      leaf.operand_count = operand_count;
      leaf.step_count = steps.count;
      leaf.used = steps.used;
      leaf.written = steps.written;
      leaf.summed = steps.summed;
      leaf.rows = touched_[k].some();
      if (leaf.summed) partials_.add(leaf, operands);
    }
    leaves_.resize(count);
    partials_.place();
    // refs_ and held_ keep every array alive
    run_unlocked(leaves_, elements, threads(), mapped_.data ? &mapped_ : nullptr, &choice_);
    if (sums_) take_sums(batch);
  }

  void take_sums(int batch) {
    auto leaf = leaves_.begin();
    for (const std::size_t k : active_) {
      if (batches_[k] != batch) continue;
      for (int j = 0; j < program(k).sums; ++j) {
        const int slot = program(k).first_sum() + j;
        if (leaf->summed >> slot & 1)
          result_[k * columns() + 3 + static_cast<std::size_t>(j)] =
              Partials::total(*leaf, leaf->operands[slot]);
      }
      ++leaf;
    }
  }

  int threads() const {
    const int limit = thread_count.load();
    return threads_ > 0 ? std::min(threads_, limit) : limit;
  }

  std::size_t columns() const { return 3 + static_cast<std::size_t>(sums_); }

  const Program& program(std::size_t k) const {
    return *programs_[static_cast<std::size_t>(groups_[k])];
  }

  Node tree_;
  std::vector<int> groups_, batches_;
  std::vector<py::tuple> folds_;
  py::object rates_, counters_, before_, between_, results_, decide_;
  const bool zero_grads_;
  const int threads_;
  int batch_count_ = 0, sums_ = 0;  // sums_: of the program that has most
  std::size_t most_ = 0;            // operations, likewise
  std::int64_t* counts_ = nullptr;
  const double* rate_ = nullptr;
  double* result_ = nullptr;
  const Table* table_ = nullptr;
  std::vector<py::object> held_;  // arrays
  py::object program_objects_;    // keeps `programs_` alive
  Mapped mapped_;
  ThreadChoice choice_;
  std::vector<const Program*> programs_;
  std::vector<Own> own_;
  std::vector<Operand> operands_;  // MAX_OPERANDS for each leaf
  std::vector<Touched> touched_;
  std::vector<Coded> coded_;
  std::vector<Random> random_;
  std::vector<Watched> watched_;
  std::vector<Range> written_;  // by address
  std::atomic<bool> busy_{false};
  // Of the step in progress; members so that their memory is kept.
  std::vector<py::object> refs_;
  std::vector<Range> ranges_;
  std::vector<std::size_t> active_;
  std::map<std::tuple<int, int, std::int64_t>, Scalars> scalar_cache_;
  std::vector<const Scalars*> leaf_scalars_;
  std::vector<Step> steps_;
  std::vector<Leaf> leaves_;
  Partials partials_;
};

// For each array (sum, scale), as `measure` finds them; None where one does not fit.
py::object sums_of_squares(const py::list& arrays) {
  std::vector<Measured> inputs;
  for (const py::handle array : arrays) {
    const Proxy* const a = as_array(array.ptr());
    Measured m{};
    m.compute = compute_of(a);
    if (m.compute < 0 || !(a->flags & DENSE) ||
        !read_input(array.ptr(), a, m.compute, *level().table, false, m.input))
      return py::none();
    m.elements = elements_of(a);
    m.scale = 1;
    inputs.push_back(m);
  }
  measure(inputs, thread_count.load());  // the list holds every array alive
  py::list found;
  for (const Measured& m : inputs) found.append(py::make_tuple(m.sum, m.scale));
  return found;
}

}  // namespace

void bind_leaves(py::module_& module) {
  numpy();
  py::class_<Program>(module, "Program")
      .def(py::init<const py::list&, double, double, double, int, int, int, int>());
  py::class_<Plan>(module, "Plan")
      .def(
          py::init<const py::object&, const py::list&, const py::list&,
                   const std::vector<std::vector<RandomKey>>&, std::vector<int>, std::vector<int>,
                   const py::list&, std::vector<py::tuple>, py::object, py::object, const py::list&,
                   py::object, py::object, py::object, py::object, bool, int, const py::object&>(),
          py::kw_only(), py::arg("tree"), py::arg("arrays"), py::arg("mirrors"), py::arg("keys"),
          py::arg("groups"), py::arg("batches"), py::arg("programs"), py::arg("folds"),
          py::arg("rates"), py::arg("counters"), py::arg("beside"), py::arg("before"),
          py::arg("between"), py::arg("results"), py::arg("decide"), py::arg("zero_grads"),
          py::arg("threads"), py::arg("scratch"))
      .def("take", &Plan::take)
      .def("give", &Plan::give)
      .def("reprogram", &Plan::reprogram)
      .def("step", &Plan::step)
      .def("step_alone", &Plan::step_alone);
  module.def("update", &update);
  module.def("sums_of_squares", &sums_of_squares);
  module.def("set_threads", [](int n) { thread_count.store(n); });
  module.def("get_threads", [] { return thread_count.load(); });
}

}  // namespace fusedopt
