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
#include "programs.hpp"

namespace py = pybind11;

namespace fusedopt {
namespace {

std::atomic<int> thread_count{1};

// Runs the leaves, for long ones without Python's lock; whoever holds the arrays alive is the
// caller's affair. Handing the lock over costs 0.07 us, as much as 350 elements.
void run_unlocked(std::vector<Leaf>& leaves, std::size_t elements, int threads) {
  constexpr std::size_t SHORT = 1 << 13;
  if (elements < SHORT) {
    run(leaves, threads);
  } else {
    const py::gil_scoped_release unlocked;
    run(leaves, threads);
  }
}

// One tensor, one step, in place; false where the arrays do not fit, and nothing was written then.
bool update(const Program& program, const py::tuple& folds, std::int64_t t, double lr,
            const py::object& gradient, const py::object& hessian, const py::tuple& arrays) {
  if (static_cast<int>(arrays.size()) != program.arrays || program.phases != 1) return false;
  const Proxy* parameter = as_array(arrays[0].ptr());
  const int compute = parameter ? format_of(parameter) : -1;
  if (compute < 0 || compute >= COMPUTE_TYPES) return false;
  Operand operands[MAX_OPERANDS] = {};
  Range ranges[MAX_OPERANDS];
  const std::size_t n = elements_of(parameter);
  for (int k = 0; k < program.arrays; ++k) {
    const Proxy* a = as_array(PyTuple_GET_ITEM(arrays.ptr(), k));
    if (!a || format_of(a) != compute || !is_target(a) ||
        !same_layout(a, SIZES[compute], parameter, SIZES[compute]))
      return false;
    operands[PARAMETER + k] = {a->data, nullptr, SIZES[compute]};
    ranges[k] = {a->data, a->data + n * SIZES[compute]};
    for (int j = 0; j < k; ++j)
      if (n && overlap(ranges[k], ranges[j])) return false;
  }
  const PyObject* inputs[INPUTS] = {gradient.ptr(), hessian.ptr()};
  for (int i = 0; i < INPUTS; ++i) {
    if (inputs[i] == Py_None) {
      if (i == GRADIENT) return false;
      continue;
    }
    if ((i == HESSIAN && !program.takes_hessian) ||
        !read_input(const_cast<PyObject*>(inputs[i]), parameter, compute, *level().table,
                    operands[i]))
      return false;
    const Range range{operands[i].data, operands[i].data + n * operands[i].size};
    for (int k = 0; k < program.arrays; ++k)
      if (n && overlap(range, ranges[k])) return false;
  }
  const Scalars scalars(program, folds, t, lr, compute);
  std::vector<Step> steps;
  append_steps(program, 0, compute, scalars, operands, steps);
  std::vector<Leaf> leaves{
      {n, operands, steps.data(), INPUTS + program.arrays, static_cast<int>(steps.size()), 0}};
  run_unlocked(leaves, n, thread_count.load());  // the arguments hold every array alive
  return true;
}

// ---------------------------------------------------------------- trees

// The shape of the parameters' tree; a leaf's index is its place in depth-first order.
struct Node {
  std::vector<Node> children;
  std::vector<py::object> keys;  // of a dict
  bool leaf = false, mapping = false;

  // An int is a leaf, (keys, children) a dict, a list a list or tuple.
  explicit Node(const py::handle spec) {
    if (py::isinstance<py::int_>(spec)) {
      leaf = true;
      return;
    }
    mapping = py::isinstance<py::tuple>(spec);
    if (mapping)
      for (const py::handle key : spec[py::int_(0)])
        keys.push_back(py::reinterpret_borrow<py::object>(key));
    const py::object list =
        mapping ? py::object(spec[py::int_(1)]) : py::reinterpret_borrow<py::object>(spec);
    for (const py::handle child : list) children.emplace_back(child);
  }
};

// Visits the leaves of a tree of the same shape, in order; false where it differs or where a visit
// says so.
template <class Visit>
bool walk(const Node& node, PyObject* o, const Visit& visit) {
  if (node.leaf) return visit(o);
  const auto count = static_cast<Py_ssize_t>(node.children.size());
  if (node.mapping) {
    if (!PyDict_Check(o) || PyDict_Size(o) != count) return false;
    Py_ssize_t k = 0, at = 0;
    PyObject *key, *next;
    // Nearly always the same key objects in the same order: then nothing has to be looked up.
    while (k < count && PyDict_Next(o, &at, &key, &next) && key == node.keys[k].ptr())
      if (!walk(node.children[k++], next, visit)) return false;
    for (; k < count; ++k) {
      PyObject* const value = PyDict_GetItemWithError(o, node.keys[k].ptr());
      if (!value && PyErr_Occurred()) throw py::error_already_set();
      if (!value || !walk(node.children[k], value, visit)) return false;
    }
    return true;
  }
  if ((!PyList_Check(o) && !PyTuple_Check(o)) || PySequence_Fast_GET_SIZE(o) != count) return false;
  for (Py_ssize_t k = 0; k < count; ++k)
    if (PySequence_Fast_GET_SIZE(o) != count ||
        !walk(node.children[k], PySequence_Fast_GET_ITEM(o, k), visit))
      return false;
  return true;
}

// ---------------------------------------------------------------- plans

// Everything about an optimizer that does not change from step to step.
class Plan {
 public:
  // arrays: for each leaf its parameter, states and work space. batches: for each leaf -1, or the
  // number of the batch of matrices whose products come between its two phases. counters: the
  // optimizer's step number, then each leaf's. folds: for each group those of its operations.
  // rates: float64, the groups' learning rates, read in each step. between(batch, leaves) is called
  // with the lock held; threads 0 means no limit of its own.
  Plan(const py::object& tree, const py::list& arrays, std::vector<int> groups,
       std::vector<int> batches, const py::list& programs, std::vector<py::tuple> folds,
       py::object rates, py::object counters, py::object between, int threads)
      : tree_(tree),
        groups_(std::move(groups)),
        batches_(std::move(batches)),
        folds_(std::move(folds)),
        rates_(std::move(rates)),
        counters_(std::move(counters)),
        between_(std::move(between)),
        threads_(threads) {
    for (const py::handle program : programs) {
      held_.push_back(py::reinterpret_borrow<py::object>(program));
      programs_.push_back(program.cast<const Program*>());
    }
    const Proxy* const counts = as_array(counters_.ptr());
    const Proxy* const rate = as_array(rates_.ptr());
    if (!counts || elements_of(counts) != arrays.size() + 1 || groups_.size() != arrays.size() ||
        batches_.size() != arrays.size() || !rate || format_of(rate) != F64 ||
        elements_of(rate) != programs_.size() || folds_.size() != programs_.size())
      throw py::value_error("plan: the lists differ in length");
    counts_ = reinterpret_cast<std::int64_t*>(counts->data);
    rate_ = reinterpret_cast<const double*>(rate->data);
    for (std::size_t k = 0; k < arrays.size(); ++k) add_leaf(arrays[k], k);
    std::sort(written_.begin(), written_.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (const int batch : batches_) batch_count_ = std::max(batch_count_, batch + 1);
  }

  // One step. None where something does not fit; nothing was written then. `flat`: the trees are
  // lists of leaves already.
  py::object step(const py::object& gradients, const py::object& hessian, bool flat) {
    if (busy_.exchange(true))
      throw std::runtime_error(
          "this optimizer is stepping in another thread: give each thread its own optimizer");
    const std::unique_ptr<Plan, void (*)(Plan*)> at_the_end(this, [](Plan* plan) {
      plan->refs_.clear();
      plan->busy_.store(false);
    });
    if (!read_tree(GRADIENT, gradients, flat) || !read_tree(HESSIAN, hessian, flat))
      return py::none();
    prepare();
    for (int batch = 0; batch < batch_count_; ++batch) {
      py::list members;
      for (const std::size_t k : active_)
        if (batches_[k] == batch) members.append(k);
      if (members.empty()) continue;
      run_phase(batch, 0);
      between_(batch, members);
      run_phase(batch, 1);
    }
    run_phase(-1, 0);
    for (const std::size_t k : active_) ++counts_[k + 1];
    return py::int_(++counts_[0]);
  }

 private:
  struct Own {
    const Proxy* parameter;
    char* data;  // where the parameter was when the plan was made
    std::size_t elements;
    int compute;
  };

  void add_leaf(const py::handle arrays, std::size_t k) {
    const Program& program = *programs_.at(static_cast<std::size_t>(groups_[k]));
    const auto list = arrays.cast<std::vector<py::object>>();
    if (static_cast<int>(list.size()) != program.arrays)
      throw py::value_error("plan: a leaf's arrays do not fit its program");
    const Proxy* const parameter = as_array(list[0].ptr());
    const int compute = parameter ? format_of(parameter) : -1;
    if (compute < 0 || compute >= COMPUTE_TYPES) throw py::value_error("plan: no such dtype");
    const std::size_t n = elements_of(parameter);
    operands_.resize(operands_.size() + MAX_OPERANDS);
    for (std::size_t j = 0; j < list.size(); ++j) {
      const Proxy* const a = as_array(list[j].ptr());
      if (!a || format_of(a) != compute || !is_target(a) ||
          !same_layout(a, SIZES[compute], parameter, SIZES[compute]))
        throw py::value_error("plan: an array does not fit its parameter");
      operands_[k * MAX_OPERANDS + PARAMETER + j] = {a->data, nullptr, SIZES[compute]};
      // Work space comes last, is nobody's business, and is shared between leaves.
      const bool work = batches_[k] >= 0 && j + 1 == list.size();
      if (n && !work) written_.push_back({a->data, a->data + n * SIZES[compute]});
      held_.push_back(list[j]);
    }
    own_.push_back({parameter, parameter->data, n, compute});
  }

  bool overlaps_written(const Operand& input, std::size_t n) const {
    const Range range{input.data, input.data + n * input.size};
    auto it = std::partition_point(written_.begin(), written_.end(),
                                   [&](const Range& w) { return w.begin < range.end; });
    return n && it != written_.begin() && overlap(*--it, range);
  }

  bool read_tree(Slot slot, const py::object& tree, bool flat) {
    if (slot == HESSIAN && tree.is_none()) {
      for (std::size_t k = 0; k < own_.size(); ++k) clear(operands_[k * MAX_OPERANDS + slot]);
      return true;
    }
    const Table& table = *level().table;
    std::size_t k = 0;
    const auto visit = [&](PyObject* o) {
      return k < own_.size() && (slot != GRADIENT || unmoved(own_[k])) &&
             read_leaf(slot, k++, o, table);
    };
    if (!flat) return walk(tree_, tree.ptr(), visit) && k == own_.size();
    for (const py::handle leaf : tree)
      if (!visit(leaf.ptr())) return false;
    return k == own_.size();
  }

  static bool unmoved(const Own& own) {
    const Proxy* const p = own.parameter;
    return is_target(p) && p->data == own.data && elements_of(p) == own.elements;
  }

  // Absent: no operation that needs it runs, and nothing is decoded.
  static void clear(Operand& operand) {
    operand.data = nullptr;
    operand.decode = nullptr;
  }

  bool read_leaf(Slot slot, std::size_t k, PyObject* o, const Table& table) {
    Operand& operand = operands_[k * MAX_OPERANDS + slot];
    const char* const passed = operand.data;
    const std::size_t passed_size = operand.size;
    clear(operand);
    if (o == Py_None) return true;
    refs_.push_back(py::reinterpret_borrow<py::object>(o));
    bool fits = (slot != HESSIAN || program(k).takes_hessian) &&
                read_input(o, own_[k].parameter, own_[k].compute, table, operand);
    // Memory that passed in the last step passes again.
    if (operand.data != passed || operand.size != passed_size)
      fits = fits && !overlaps_written(operand, own_[k].elements);
    if (!fits) clear(operand);
    return fits;
  }

  // Which leaves take part, and their scalars: once for each group, compute type and t.
  void prepare() {
    active_.clear();
    scalar_cache_.clear();
    leaf_scalars_.resize(own_.size());
    std::size_t last = own_.size();  // the leaf before this one that takes part
    for (std::size_t k = 0; k < own_.size(); ++k) {
      if (!operands_[k * MAX_OPERANDS + GRADIENT].data) continue;
      const bool alike = last < k && groups_[k] == groups_[last] &&
                         own_[k].compute == own_[last].compute &&
                         counts_[k + 1] == counts_[last + 1];
      leaf_scalars_[k] = alike ? leaf_scalars_[last] : &scalars_of(k);
      active_.push_back(k);
      last = k;
    }
  }

  const Scalars& scalars_of(std::size_t k) {
    const std::int64_t t = counts_[k + 1] + 1;
    const std::tuple<int, int, std::int64_t> key{groups_[k], own_[k].compute, t};
    auto found = scalar_cache_.find(key);
    if (found == scalar_cache_.end()) {
      const auto group = static_cast<std::size_t>(groups_[k]);
      Scalars fresh(program(k), folds_[group], t, rate_[group], own_[k].compute);
      found = scalar_cache_.emplace(key, std::move(fresh)).first;
    }
    return found->second;
  }

  void run_phase(int batch, int phase) {
    std::size_t most = 0;
    for (const Program* program : programs_) most = std::max(most, program->ops.size());
    steps_.clear();
    steps_.reserve(active_.size() * most);  // the leaves point into it
    leaves_.resize(active_.size());
    std::size_t count = 0, elements = 0;
    const Scalars* scalars = nullptr;
    bool refreshed = false;
    std::size_t first = 0;
    for (const std::size_t k : active_) {
      if (batches_[k] != batch) continue;
      const Operand* const operands = &operands_[k * MAX_OPERANDS];
      // Neighbours with the same scalars and inputs have the same steps.
      if (leaf_scalars_[k] != scalars || refreshed != (operands[HESSIAN].data != nullptr)) {
        scalars = leaf_scalars_[k];
        refreshed = operands[HESSIAN].data != nullptr;
        first = steps_.size();
        append_steps(program(k), phase, own_[k].compute, *scalars, operands, steps_);
      }
      // Field by field: a struct made beside its place and copied stalls on its own stores.
      Leaf& leaf = leaves_[count++];
      elements += leaf.elements = own_[k].elements;
      leaf.operands = operands;
      leaf.steps = steps_.data() + first;
      leaf.operand_count = INPUTS + program(k).arrays;
      leaf.step_count = static_cast<int>(steps_.size() - first);
    }
    leaves_.resize(count);
    const int limit = thread_count.load();
    const int threads = threads_ > 0 ? std::min(threads_, limit) : limit;
    run_unlocked(leaves_, elements, threads);  // refs_ and held_ keep every array alive
  }

  const Program& program(std::size_t k) const {
    return *programs_[static_cast<std::size_t>(groups_[k])];
  }

  Node tree_;
  std::vector<int> groups_, batches_;
  std::vector<py::tuple> folds_;
  py::object rates_, counters_, between_;
  const int threads_;
  int batch_count_ = 0;
  std::int64_t* counts_ = nullptr;
  const double* rate_ = nullptr;
  std::vector<py::object> held_;  // programs and arrays
  std::vector<const Program*> programs_;
  std::vector<Own> own_;
  std::vector<Operand> operands_;  // MAX_OPERANDS for each leaf
  std::vector<Range> written_;     // by address
  std::atomic<bool> busy_{false};
  // Of the step in progress; members so that their memory is kept.
  std::vector<py::object> refs_;
  std::vector<std::size_t> active_;
  std::map<std::tuple<int, int, std::int64_t>, Scalars> scalar_cache_;
  std::vector<const Scalars*> leaf_scalars_;
  std::vector<Step> steps_;
  std::vector<Leaf> leaves_;
};

}  // namespace

void bind_leaves(py::module_& module) {
  numpy();
  py::class_<Program>(module, "Program").def(py::init<const py::list&, double, double, double>());
  py::class_<Plan>(module, "Plan")
      .def(py::init<const py::object&, const py::list&, std::vector<int>, std::vector<int>,
                    const py::list&, std::vector<py::tuple>, py::object, py::object, py::object,
                    int>(),
           py::kw_only(), py::arg("tree"), py::arg("arrays"), py::arg("groups"), py::arg("batches"),
           py::arg("programs"), py::arg("folds"), py::arg("rates"), py::arg("counters"),
           py::arg("between"), py::arg("threads"))
      .def("step", &Plan::step);
  module.def("update", &update);
  module.def("set_threads", [](int n) { thread_count.store(n); });
  module.def("get_threads", [] { return thread_count.load(); });
}

}  // namespace fusedopt
