// An optimizer's plan: arrays, programs and trees, checked once, and steps on them. Every check of
// a step answers yes or no; Python (fusedopt/arrays/checks.py) finds and explains the reason.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.hpp"
#include "driver.hpp"
#include "norms.hpp"
#include "programs.hpp"
#include "thread_choice.hpp"
#include "trees.hpp"
#include "windows.hpp"

namespace fusedopt {

namespace py = pybind11;

// Of an array's random bits: the key, and the array's first tile in the one that it is a part of.
using RandomKey = std::pair<std::uint64_t, std::uint64_t>;

// Everything about an optimizer that does not change from step to step.
class Plan {
 public:
  // description: fusedopt.backends.native.PlanDescription, which says what its fields are.
  explicit Plan(const py::object& description);

  // Keeps everything else from using this plan until `give`; refused where something does already.
  void take();
  void give();

  // Other scalars, weight decay and operations on the same arrays, by a caller who has taken the
  // plan. False where the programs would need other arrays; nothing has changed then.
  bool reprogram(const py::list& programs, std::vector<py::tuple> folds);

  // One step, by a caller who has taken the plan. None where something does not fit; nothing was
  // written then. `flat`: the trees are lists of leaves already.
  py::object step(const py::object& gradients, const py::object& hessian, bool flat);

  // The same with trees, by one who has not taken it: the whole of a simple optimizer's step.
  py::object step_alone(const py::object& gradients, const py::object& hessian);

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

  // None, or an object with the block, file and window of `Mapped`.
  void use_file(const py::object& file);
  void add_leaf(const std::vector<py::object>& arrays, const std::vector<py::object>& mirrors,
                const std::vector<RandomKey>& keys, std::size_t k);
  void change_level();
  bool unmoved() const;
  bool overlaps_written(const Range& range) const;
  // Each other, or an estimate.
  bool gradients_overlap();
  bool read_tree(Slot slot, const py::object& tree, bool flat);
  // checked: by Python, which alone makes tuples of rows; a caller's own could say anything.
  bool read_leaf(Slot slot, std::size_t k, PyObject* o, bool checked);
  // (rows, places, values): row rows[j] of the leaf has values[places[j]]; Python has checked the
  // indices, and that estimates have the gradient's.
  bool read_rows(Slot slot, std::size_t k, PyObject* o, Operand& operand);
  // Which leaves take part.
  void find_active();
  void measure_gradients();
  // The leaves' scalars: once for each group, compute type and t.
  void prepare();
  const Scalars& scalars_of(std::size_t k);
  void run_phase(int batch, int phase);
  void take_sums(int batch);
  int threads() const;
  std::size_t columns() const { return 3 + static_cast<std::size_t>(sums_); }

  const Program& program(std::size_t k) const {
    return *programs_[static_cast<std::size_t>(groups_[k])];
  }

  Node tree_;
  std::vector<int> groups_, batches_;
  std::vector<py::tuple> folds_;
  py::object rates_, factors_, counters_, before_, between_, results_, decide_;
  const bool zero_grads_;
  const int threads_;
  int batch_count_ = 0, sums_ = 0;  // sums_: of the program that has most
  std::size_t most_ = 0;            // operations, likewise
  std::int64_t* counts_ = nullptr;
  const double *rate_ = nullptr, *factor_ = nullptr;
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

void bind_plan(py::module_& module);

}  // namespace fusedopt
