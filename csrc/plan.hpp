// An optimizer's plan: arrays, programs and trees, checked once, and steps on them. Every check of
// a step answers yes or no; Python (fusedopt/arrays/checks.py) finds and explains the reason.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "clipping.hpp"
#include "driver.hpp"
#include "means.hpp"
#include "norms.hpp"
#include "policy.hpp"
#include "programs.hpp"
#include "thread_choice.hpp"
#include "trees.hpp"
#include "windows.hpp"

namespace fusedopt {

namespace py = pybind11;

// The key of an array's random bits, and the array's first tile in the one that it is a part of.
using RandomKey = std::pair<std::uint64_t, std::uint64_t>;

// Everything about an optimizer that does not change from step to step.
class Plan {
 public:
  // description: fusedopt.backends.native.PlanDescription, which says what its fields are.
  explicit Plan(const py::object& description);

  // Keeps everything else from using this plan until `give` of the same token; refused where
  // something does already. A `give` too many, or of another token, does nothing: whoever may have
  // been interrupted anywhere can give once more to be sure.
  void take(const py::object& token) { seize(token.ptr()); }
  void give(const py::object& token) { release(token.ptr()); }
  bool held(const py::object& token) const { return holder_.load() == token.ptr(); }

  // Other scalars, weight decay and operations on the same arrays, by a caller who has taken the
  // plan. False where the programs would need other arrays; nothing has changed then.
  bool reprogram(const py::list& programs, const py::list& numbers);

  // Other numbers for the groups' rules, by name, from the next step on, by a caller who has not:
  // see `renumbered`. False, and nothing has changed, where there is more to it.
  bool renumber(const py::list& given);

  // One step, by a caller who has taken the plan. None where something does not fit; nothing was
  // written then. `flat`: the trees are lists of leaves already.
  py::object step(const py::object& gradients, const py::object& hessian, bool flat);

  // Sets what `whole_step` does from now on, by a caller who has taken the plan.
  void settle(const py::object& policy);

  // A step with trees and all that its policy says, by a caller who has not taken the plan: its
  // `StepInfo`. None where something is to be explained or done by Python first; nothing but
  // learning rates was written then. ask(step), if not None, sets the learning rates.
  py::object whole_step(const py::object& gradients, const py::object& hessian,
                        const py::object& grad_scale, const py::object& ask);

 private:
  struct Own {
    const Proxy* parameter;
    std::size_t elements, first_operand;
    int compute, operand_count;
    Rows rows;  // or columns: all, where each has sums of its own; otherwise none
  };
  // While there is one, this caller alone uses the plan, and what the step reads is held.
  class Use {
   public:
    explicit Use(Plan& plan) : plan_(plan) { plan.seize(&plan); }
    ~Use() {
      plan_.given_.clear();
      plan_.release(&plan_);
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    Plan& plan_;
  };
  // The part of a leaf that a step touches: all elements, or those of some rows.
  struct Touched {
    std::size_t elements, given[INPUTS];  // given: of its inputs, which may hold other rows too
    Rows rows;
    const Rows* some() const { return rows.rows ? &rows : nullptr; }
    void all(std::size_t n) {
      put(elements, n);
      for (std::size_t& each : given) put(each, n);
      put<const std::int64_t*>(rows.rows, nullptr);
    }
  };
  // An array of the caller's, which may be given other memory, another dtype or shape under the
  // plan's feet: what it was. target: is written itself, and not the memory of one that is.
  struct Watched {
    const Proxy* array;
    const char* data;
    PyObject* dtype;
    int nd;
    std::size_t layout;  // where its dimensions and strides begin among all
    bool target;
  };
  // What a slot of a leaf had in the last step. An array that is the same in all that was checked
  // has passed already.
  struct Input {
    enum { ABSENT, WHOLE, ROWS } kind = ABSENT;
    Watched array = {};  // of NumPy; otherwise null
    int flags = 0;
    Range passed = {};  // memory that was found apart from all that is written
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

  void seize(const void* token);
  void release(const void* token);
  // None, or an object with the block, file and window of `Mapped`.
  void use_file(const py::object& file);
  void add_leaf(const std::vector<py::object>& arrays, const std::vector<py::object>& mirrors,
                const std::vector<RandomKey>& keys, std::size_t k);
  // Lets `Own::rows` have the numbers of all rows, when all leaves have been added.
  void number_rows();
  void change_level();
  void watch(const Proxy* array, bool target);
  // given: of each group; null: what schedules give the next step. No code in Python runs between
  // the first change and the last, so that no interrupt comes between them.
  bool take_numbers(const py::list* given);
  bool find_rates(const py::object& ask);
  std::vector<double> norms(double factor) const;
  // Run no Python. Until they are taken back, operands describe the transformed gradients.
  void transform_gradients(double factor);
  void take_transforms_back(bool zero);
  // Runs no Python.
  void decide(double factor, Found& found);
  py::object stats_of(double factor);
  // The step itself, of what was collected; false where something does not fit.
  bool update(bool flat);
  bool unmoved() const;
  bool unchanged(const Watched& w) const;
  bool is_known(const Input& input, PyObject* o) const;
  bool overlaps_written(const Range& range) const;
  // Each other, or an estimate.
  bool gradients_overlap();
  // Takes hold of the trees' leaves: may run Python.
  bool collect(const py::object& gradients, const py::object& hessian, bool flat);
  bool collect_tree(Slot slot, const py::object& tree, bool flat);
  // Reads what was collected, and checks it and all that will be written: runs no Python.
  //
  // Whatever Python runs (comparisons of keys, finalisers, other threads, the rules' own functions)
  // may give any array other memory: this comes after the last of it, and before what looks.
  bool read(bool checked);
  // checked: by Python, which alone makes tuples of rows; a caller's own could say anything.
  bool read_leaf(Slot slot, std::size_t k, bool checked);
  bool read_anew(Slot slot, std::size_t k, bool checked, Input& input);
  void remember(Input& input, const Proxy* array);
  void forget_inputs();
  // Its arrays have the elements of the parameter in memory order, as whoever made it has seen to.
  bool read_mean(std::size_t k, Mean& mean, Operand& operand) const;
  // (rows, places, values): row rows[j] of the leaf has values[places[j]]; Python has checked that
  // rows come once each and that estimates have the gradient's.
  bool read_rows(Slot slot, std::size_t k, PyObject* o, Operand& operand);
  // Which leaves take part.
  void find_active();
  void begin_results();
  // Runs no Python.
  void measure_gradients();
  // The leaves' scalars: once for each group, compute type and t. Runs Python.
  void prepare();
  // Runs no Python; false where one is too large for its compute type.
  bool use_factors();
  const Scalars& scalars_of(std::size_t k);
  // The leaves of a batch, or of none (-1), that take part.
  std::vector<std::size_t> active_of(int batch) const;
  void count();
  // Runs no Python: given_ and held_ keep every array alive. phase: -1 for the last of each leaf's
  // own, where the members are all that are in no batch. choice: of the members together.
  void run_phase(const std::vector<std::size_t>& members, int phase, ThreadChoice* choice);
  void lay_out(const std::vector<std::size_t>& members, int phase);
  // All phases of a batch of matrices. It may raise, and has written by then.
  void run_batch(int batch, bool flat, bool& begun);
  void take_sums(const std::vector<std::size_t>& members);
  // Whether a leaf that takes part has a rule that reads sums.
  bool active_measure() const;
  // These sums, and the scalars that come from them; runs Python.
  void take_measures();
  // Takes pairs of a place and a number that is to be kept there.
  void take_kept(py::object pairs);
  // Stores these numbers; runs no Python.
  void store_kept();
  int threads() const;
  std::size_t columns() const { return Policy::FIRST_SUM + static_cast<std::size_t>(sums_); }

  Operand* operands(std::size_t k) { return operands_.data() + own_[k].first_operand; }

  const Program& program(std::size_t k) const {
    return *programs_[static_cast<std::size_t>(groups_[k])];
  }

  Node tree_;
  std::vector<int> groups_, batches_;
  std::vector<Numbers> numbers_;
  py::object rates_, factors_, counters_, combine_, after_kept_, before_, between_, results_,
      decide_;
  const bool sided_;  // leaves have side states
  const bool zero_grads_;
  const int threads_;
  int batch_count_ = 0, sums_ = 0;  // sums_: of the program that has most
  std::size_t most_ = 0;            // operations, likewise
  std::int64_t* counts_ = nullptr;
  double *rate_ = nullptr, *factor_ = nullptr;
  double* result_ = nullptr;
  const Table* table_ = nullptr;
  std::vector<py::object> held_;  // arrays
  py::object program_objects_;    // keeps `programs_` alive
  Mapped mapped_;
  std::unique_ptr<Policy> policy_;
  ThreadChoice choice_, norm_choice_, measure_choice_;  // of the last pass, the norm, the sums
  std::vector<const Program*> programs_;
  std::vector<Own> own_;
  std::vector<std::int64_t> row_numbers_;  // 0, 1, ...: of `Own::rows`
  std::vector<Operand> operands_;          // of one leaf after the other, without gaps
  std::vector<Touched> touched_;
  std::vector<Coded> coded_;
  std::vector<Random> random_;
  std::vector<Watched> watched_;
  std::vector<py::ssize_t> layouts_;  // of these
  std::vector<Range> written_;        // by address
  std::vector<Input> inputs_;         // INPUTS for each leaf
  std::atomic<const void*> holder_{nullptr};
  // Of the step in progress; members so that their memory is kept.
  std::vector<Given> given_;  // the gradients, then the estimates
  std::vector<Range> ranges_;
  std::vector<std::size_t> active_;
  std::size_t elements_ = 0;  // that are touched
  bool measured_ = false;
  bool estimates_ = false;       // whether there are any
  bool read_estimates_ = false;  // or were, and have not been cleared since
  // Each counts changes from step to step: of the inputs; of the leaves that take part, which of
  // their elements do, and their operations.
  std::uint64_t read_ = 1, layout_ = 1;
  // Those for which `gradients_overlap` was asked, and `measured_leaves_`, `elements_` and
  // `leaves_` were made.
  std::uint64_t apart_ = 0, measured_read_ = 0, counted_ = 0, laid_out_ = 0;
  // By group, compute type and t, their places among all.
  std::map<std::tuple<int, int, std::int64_t>, std::size_t> scalar_places_;
  std::deque<Scalars> scalars_;
  std::vector<const Scalars*> leaf_scalars_;
  std::deque<Scalars> measured_scalars_;  // of leaves that have their own
  // Numbers that are stored when all else of a step has been written, and their places.
  struct Kept {
    char* place;
    const char* value;
    std::size_t size;
  };
  std::vector<Kept> kept_;
  py::object kept_arrays_;  // of these
  std::vector<Step> steps_;
  std::vector<Leaf> leaves_;
  Partials partials_;  // of `leaves_`
  std::vector<Measured> measured_leaves_;
  SquareSums square_sums_;
};

void bind_plan(py::module_& module);

}  // namespace fusedopt
