// Python's lock, released and taken again.
#pragma once
#include <Python.h>

#include <chrono>
#include <thread>

namespace fusedopt {

// Takes it, for a thread that had it before.
//
// While the interpreter shuts down, Python ends a daemon thread that asks for the lock, before 3.14
// by pthread_exit, which unwinds the stack: through destructors that would need the lock, and
// through pybind11's gil_scoped_release, whose destructor may not throw, so that the process
// aborted. Such a thread sleeps here instead, as from 3.14 on, until the process ends.
inline void lock_again(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {  // it is C, and throws nothing: this is the unwinding
    while (true) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Runs `body` without the lock.
template <class Body>
void unlocked(const Body& body) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    lock_again(state);
    throw;
  }
  lock_again(state);
}

}  // namespace fusedopt
