#include "placement.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "driver.hpp"
#include "parallel.hpp"
#include "thread_choice.hpp"
#include "unlocked.hpp"

#if defined(__linux__)
#include <sched.h>
#endif

namespace fusedopt {
namespace py = pybind11;
namespace {

#if defined(__linux__)
std::vector<int> own_processors() {
  cpu_set_t set;
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return found;
  for (int k = 0; k < CPU_SETSIZE; ++k)
    if (CPU_ISSET(k, &set)) found.push_back(k);
  return found;
}
#else
std::vector<int> own_processors() { return {}; }
#endif

// The processors on which each thread of a loop may run; empty where the system does not tell.
std::vector<std::vector<int>> thread_processors(int threads) {
  threads = std::max(1, std::min(threads, parallel_limit()));
  std::vector<std::vector<int>> found(static_cast<std::size_t>(threads));
  const auto look = [](void* of, std::size_t member) {
    (*static_cast<std::vector<std::vector<int>>*>(of))[member] = own_processors();
  };
  unlocked([&] { parallel_for(found.size(), threads, look, &found); });
  return found;
}

// Writes a zero into each page of arrays of zeros, on the thread that will have work there in a
// step of all leaves: a page lies in the memory of the thread that writes to it first. leaves:
// (elements, arrays), each array with its bytes in the order of the leaf's elements.
void first_touch(const py::list& leaves, int threads) {
  std::vector<Extent> extents;
  std::size_t start = 0;
  for (const py::handle leaf : leaves) {
    const auto [elements, arrays] = py::cast<std::pair<std::size_t, py::list>>(leaf);
    for (const py::handle o : arrays) {
      if (!py::isinstance<py::array>(o)) throw py::type_error("first_touch: expected arrays");
      auto array = py::reinterpret_borrow<py::array>(o);
      extents.push_back({start, elements, static_cast<char*>(array.mutable_data()),
                         static_cast<std::size_t>(array.nbytes())});
    }
    start += elements;
  }
  unlocked([&] { touch(extents, start, threads); });
}

}  // namespace

void bind_placement(py::module_& module) {
  module.def("thread_processors", &thread_processors);
  module.def("first_touch", &first_touch);
  py::class_<ThreadChoice>(module, "ThreadChoice")
      .def(py::init<>())
      .def("all", &ThreadChoice::all)
      .def("tell", &ThreadChoice::tell);
  module.attr("THREAD_TRIALS") = ThreadChoice::EVERY;
}

}  // namespace fusedopt
