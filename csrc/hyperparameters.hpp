// Python's rules, with other numbers.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fusedopt {

namespace py = pybind11;

// Names of attributes and hyperparameters; made once, since to make them takes as long as what they
// are asked for. Never destroyed: module teardown and interpreter exit race otherwise.
struct Names {
  py::str groups = made("groups"), current = made("current"), lr = made("lr"),
          decay = made("decay"), weight_decay = made("weight_decay"),
          decay_line = made("decay_line"), independent = made("independent"),
          scheduled = made("scheduled"), program = made("program"), like = made("_like"),
          check_together = made("check_together"), extras = made("extras"),
          extras_given = made("extras_given"), slow = made("slow"), at = made("at");

  static const Names& get() {
    static const Names* const names = new Names;
    return *names;
  }

 private:
  static py::str made(const char* name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
  }
};

// A rule with other numbers, made at a tenth of what its class takes in Python. Null where there is
// more to it: where a value is no float that fits, or where a number becomes zero or ceases to be,
// which may select other states or operations. Raises what the rule's `check_together` does.
//
// values: by name; numbers: fusedopt.rules.base.numbers_of, of the rule's class.
py::object renumbered(const py::object& rule, const py::dict& values, const py::tuple& numbers);

// The value that a schedule of Python's gives a step, or a tuple with schedules.
py::object value_in_step(const py::object& rule, const py::str& name, std::int64_t step);

}  // namespace fusedopt
