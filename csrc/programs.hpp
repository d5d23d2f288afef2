// A rule's operations and scalars, as Python declares them, turned into steps for the driver.
#pragma once
#include <pybind11/pybind11.h>

#include <deque>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.hpp"
#include "driver.hpp"
#include "numpy_names.hpp"

namespace fusedopt {

namespace py = pybind11;

// Operand slots of a program: what comes anew with each step, then the leaf's own arrays
// (parameter, states, work space), scratch, and sums.
enum Slot { GRADIENT, HESSIAN, INPUTS, PARAMETER = INPUTS };

// The operation of that name; KeyError where the table has none.
const Operation& operation_named(const Table& table, const std::string& name);

// Whose sums are measured: those of a leaf, or of each of its rows or columns.
enum class Over { LEAF, ROW, COLUMN };

// One rule's operations, by their place in the table, or in the program itself.
struct Program {
  struct Op {
    int index;                         // of a foreign one ~(its place)
    int mode, phase, input, measured;  // measured: the last scalars, which sums give
    std::vector<std::uint8_t> operands;
    std::uint32_t used, written, summed, maxima;  // slots, as bits
  };
  std::vector<Op> ops;
  std::deque<std::pair<std::string, Operation>> foreign;  // with their names, which do not move
  int scalar_count = 0, phases = 1, arrays, works, scratch, sums;
  Over over;
  bool takes_hessian = false, filtered = false, measures = false;

  // Rows: (name, mode, phase, input that it needs or -1, measured, operand slots, foreign), the
  // last of them None, or for a rule that is not in the table (sums that it adds to, how many of
  // these, the last ones, are maxima, scalars, addresses of its tile function in that mode, for
  // each compute type); whoever passes these keeps the functions alive. arrays, scratch, sums: how
  // many slots each of these have; works: how many of the arrays, the last ones, are work space;
  // over: an `Over`. A program that measures has two phases.
  Program(const py::list& rows, int arrays, int works, int scratch, int sums, int over);

  // The operation of the instruction set in use, where it is in the table.
  const Operation& operation(int index) const {
    return index < 0 ? foreign[static_cast<std::size_t>(~index)].second
                     : level().table->operations[index];
  }

  int first_sum() const { return INPUTS + arrays + scratch; }
  // The number of sums that the rule itself reads, which come last.
  int first_measured() const { return first_sum() + sums - measured_sums; }
  int measured_sums = 0;

 private:
  using Outside = std::tuple<int, int, int, std::vector<std::uintptr_t>>;

  // A rule compiled elsewhere, which writes all of its states, or its measurement.
  int adopt(const std::string& name, int mode, int operands, const Outside& outside);
};

// The part of a program that depends on numbers, as Python describes it: (folds, (factor,
// base, slope)).
struct Numbers {
  // For each operation Python's function from (t, lr) to its own scalars, a tuple; behind these,
  // where the program measures, that from (t, lr, sums) to the scalars that sums give: from a tuple
  // to a tuple, or by row from an array to an array, with a column for each row.
  py::tuple folds;
  double factor, base, slope;  // what a rule's begin with: that on the gradient, base + slope lr

  explicit Numbers(const py::handle& description);

  // The same of another rule of the class, and of other extras: folds that are methods of the old
  // become methods of the new.
  Numbers of(const py::handle& rule, const py::handle& extras) const;
};

// The scalars of a program, folded in float64 and cast once to the compute type.
class Scalars {
 public:
  // The numbers' folds give zero for what sums will give. factor: see `use_factor`. Those of the
  // same program stay where they are.
  void fold(const Program& program, const Numbers& numbers, std::int64_t t, double lr,
            double factor, int compute);

  // Takes another factor on the gradient, beside the numbers' own: whether it stays finite.
  bool use_factor(const Program& program, const Numbers& numbers, double factor);

  // The same for one leaf, with what its sums give; or for each of its `rows`. sums: the
  // first one of each row, then the second.
  Scalars with(const Program& program, const Numbers& numbers, std::int64_t t, double lr,
               const std::vector<double>& sums, std::size_t rows) const;

  const void* at(int index) const {
    return reinterpret_cast<const char*>(storage_.data()) + SIZES[compute_] * index;
  }
  // The bytes from the scalars of one row to those of the next; 0: all have the same.
  std::size_t each() const { return each_; }

 private:
  void put(int index, double value);
  bool is_finite(int index) const;
  // All numbers of a tuple of this length, from an index on.
  void put_all(int index, const py::object& numbers, int length, const char* name);
  // Of each row, all of its column.
  void put_rows(int index, const py::object& numbers, int length, std::size_t rows,
                const char* name);
  // Raises where one from `from` to `to` is infinite in the compute type: nothing has been written.
  void check(int from, int to, const py::handle& fold, const char* name, std::int64_t t,
             double lr) const;

  std::vector<double> storage_;  // raw, and aligned for either type
  std::size_t each_ = 0;
  int compute_ = F32;
};

// The steps of one phase for one leaf, and the operands that they use and write, as bits.
struct Phase {
  std::size_t first = 0;
  int count = 0;
  std::uint32_t used = 0, written = 0, summed = 0, maxima = 0;
};

// Appends them to `steps`; what needs an input that is not there is left out.
Phase append_phase(const Program& program, int phase, int compute, const Scalars& scalars,
                   const Operand* operands, std::vector<Step>& steps);

}  // namespace fusedopt
