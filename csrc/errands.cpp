#include "errands.hpp"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "unlocked.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace py = pybind11;

namespace fusedopt {
namespace {

std::atomic<int> forks{0};  // how many forks lie between this process and the first

// The result of an errand, for the thread that waits for it.
class Outcome {
 public:
  void finish(py::object result, py::object error) {
    result_ = std::move(result);
    error_ = std::move(error);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    changed_.notify_all();
  }

  // Signals are not looked at: their handlers run, and may raise, when the work is done.
  py::object wait() {
    unlocked([this] {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return done_; });
    });
    const py::object result = std::move(result_), error = std::move(error_);
    if (error.is_none()) return result;
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
    throw py::error_already_set();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  py::object result_ = py::none(), error_ = py::none();
};

// keep: the helper is wanted again, and does not offer itself to others.
py::object send(const py::object& queue, const py::object& function, bool keep) {
  const auto outcome = std::make_shared<Outcome>();
  called(queue.attr("put"), py::make_tuple(py::make_tuple(function, py::cast(outcome), keep)));
  return outcome->wait();
}

// The queue of an idle helper; null where there is none.
py::object idle_helper(const py::list& idle) {
  try {
    return idle.attr("pop")();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_IndexError)) throw;
    return py::object();
  }
}

// Has a helper call the function, and gives what it returns or raises; NotImplemented where no
// helper is idle. No code in Python runs in this thread meanwhile, so that nothing can be raised
// here between the beginning and the end.
py::object hand_over(const py::list& idle, const py::object& function) {
  const py::object queue = idle_helper(idle);
  if (!queue) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  return send(queue, function, false);
}

// A context whose beginning and end are errands, of the same helper. For lack of one, `directly`
// calls them. ready: sees to it that one is idle; False where there is to be none.
class Context {
 public:
  Context(py::object enter, py::object leave, py::list idle, py::object ready, py::object directly)
      : enter_(std::move(enter)),
        leave_(std::move(leave)),
        idle_(std::move(idle)),
        ready_(std::move(ready)),
        directly_(std::move(directly)) {}

  py::object enter() {
    py::object queue;
    while (!queue && called(ready_, py::tuple()).cast<bool>()) queue = idle_helper(idle_);
    forks_ = forks.load();
    queue_ = queue;
    return queue ? send(queue, enter_, true) : called(directly_, py::make_tuple(enter_));
  }

  void leave(const py::args&) {
    const py::object queue = std::move(queue_);
    if (queue && forks_ == forks.load())
      send(queue, leave_, false);
    else
      called(directly_, py::make_tuple(leave_));
  }

 private:
  py::object enter_, leave_;
  py::list idle_;
  py::object ready_, directly_, queue_;
  int forks_ = 0;
};

}  // namespace

void bind_errands(py::module_& module) {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { ++forks; });
#endif
  py::class_<Outcome, std::shared_ptr<Outcome>>(module, "Outcome").def("finish", &Outcome::finish);
  py::class_<Context>(module, "Context")
      .def(py::init<py::object, py::object, py::list, py::object, py::object>())
      .def("__enter__", &Context::enter)
      .def("__exit__", &Context::leave);
  module.def("hand_over", &hand_over);
}

}  // namespace fusedopt
