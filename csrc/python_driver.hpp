// The driver, run by a caller who holds Python's lock.
#pragma once
#include <pybind11/pybind11.h>

#include <atomic>
#include <vector>

#include "driver.hpp"
#include "unlocked.hpp"

namespace fusedopt {

// The number of threads that a step without a limit of its own may use.
inline std::atomic<int> thread_count{1};

// Runs the leaves, for long ones without Python's lock; whoever holds the arrays alive is the
// caller's affair. Handing the lock over costs 0.07 us, as much as 350 elements.
inline void run_unlocked(std::vector<Leaf>& leaves, std::size_t elements, int threads,
                         const Mapped* mapped = nullptr, ThreadChoice* choice = nullptr) {
  constexpr std::size_t SHORT = 1 << 13;
  if (elements < SHORT) {
    run(leaves, threads, mapped, choice);
  } else {
    unlocked([&] { run(leaves, threads, mapped, choice); });
  }
}

}  // namespace fusedopt
