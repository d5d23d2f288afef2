#include "parallel.hpp"

#include <algorithm>
#include <atomic>

#if defined(FUSEDOPT_OPENMP)
#include <omp.h>
#elif defined(FUSEDOPT_THREADS)
#include <system_error>
#include <thread>
#include <vector>
#endif
#if defined(FUSEDOPT_OPENMP) && !defined(_WIN32)
#include <pthread.h>
#pragma weak omp_pause_resource_all  // some runtimes lack it
#endif

namespace fusedopt {

#if defined(FUSEDOPT_OPENMP)

namespace {
// A forked child inherits the pool's records but not its threads, and would wait for them for
// ever: it stays serial where the pool could not be dissolved before the fork.
std::atomic<bool> serial_after_fork{false};
}  // namespace

const char* parallel_name() { return "openmp"; }

int parallel_limit() { return serial_after_fork.load() ? 1 : omp_get_max_threads(); }

void guard_forks() {
#if !defined(_WIN32)
  pthread_atfork(
      [] {
        if (omp_pause_resource_all) omp_pause_resource_all(omp_pause_soft);
      },
      nullptr,
      [] {
        if (!omp_pause_resource_all) serial_after_fork.store(true);
      });
#endif
}

void parallel_for(std::size_t count, int threads, void (*body)(void*, std::size_t), void* context) {
  const int team = static_cast<int>(std::min<std::size_t>(count, threads));
  if (team <= 1) {
    for (std::size_t i = 0; i < count; ++i) body(context, i);
    return;
  }
  std::atomic<std::size_t> next{0};
#pragma omp parallel num_threads(team)
  for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i);
}

#elif defined(FUSEDOPT_THREADS)

const char* parallel_name() { return "threads"; }

int parallel_limit() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

// Nothing outlives a call, so there is nothing that a fork could lose.
void guard_forks() {}

void parallel_for(std::size_t count, int threads, void (*body)(void*, std::size_t), void* context) {
  const int team = static_cast<int>(std::min<std::size_t>(count, threads));
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
      body(context, i);
  };
  std::vector<std::thread> helpers;
  try {
    for (int k = 1; k < team; ++k) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

#else

const char* parallel_name() { return "serial"; }

int parallel_limit() { return 1; }

void guard_forks() {}

void parallel_for(std::size_t count, int, void (*body)(void*, std::size_t), void* context) {
  for (std::size_t i = 0; i < count; ++i) body(context, i);
}

#endif

}  // namespace fusedopt
