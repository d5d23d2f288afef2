// Python's lock, released and taken again, and calls into Python.
//
// While the interpreter shuts down, Python ends a daemon thread that asks for the lock, before 3.14
// by pthread_exit, which unwinds the stack: through destructors that would need the lock, and
// through pybind11's gil_scoped_release, whose destructor may not throw, so that the process
// aborted. Here such a thread sleeps instead until the process ends, as it does from 3.14 on.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace fusedopt {

// Runs a function of Python's own, which is C and throws nothing, and in which the thread may end.
template <class Function>
auto in_python(const Function& function) {
#if defined(__GLIBCXX__)
  try {
    return function();
  } catch (abi::__forced_unwind&) {
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }
#else
  return function();
#endif
}

inline pybind11::object called(const pybind11::object& function, const pybind11::tuple& arguments) {
  PyObject* const result =
      in_python([&] { return PyObject_CallObject(function.ptr(), arguments.ptr()); });
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// Runs `body` without the lock.
template <class Body>
void unlocked(const Body& body) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    in_python([&] { PyEval_RestoreThread(state); });
    throw;
  }
  in_python([&] { PyEval_RestoreThread(state); });
}

}  // namespace fusedopt
