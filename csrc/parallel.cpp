#include "parallel.hpp"

#include <algorithm>
#include <atomic>

#if defined(FUSEDOPT_OPENMP)
#include <omp.h>
#elif defined(FUSEDOPT_THREADS)
#include "pool.hpp"
#endif
#if (defined(FUSEDOPT_OPENMP) || defined(FUSEDOPT_THREADS)) && !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(FUSEDOPT_OPENMP) && !defined(_WIN32)
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

// The runtime ends its own.
void end_threads() {}

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

namespace {

// Never destroyed: a thread that still steps at exit must find it.
std::atomic<Pool*> pool{new Pool};

struct Loop {
  std::size_t count;
  void (*body)(void*, std::size_t);
  void* context;
  std::atomic<std::size_t> next{0};
};

void take_part(void* of, int) {
  Loop& loop = *static_cast<Loop*>(of);
  for (std::size_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;)
    loop.body(loop.context, i);
}

}  // namespace

const char* parallel_name() { return "threads"; }

int parallel_limit() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

void guard_forks() {
#if !defined(_WIN32)
  // A forked child has none of the threads: those that are idle end before the fork, and of those
  // that other threads of Python use just then the child forgets the records.
  pthread_atfork([] { pool.load()->rest(); }, nullptr, [] { pool.store(new Pool); });
#endif
}

void end_threads() { pool.load()->close(); }

void parallel_for(std::size_t count, int threads, void (*body)(void*, std::size_t), void* context) {
  Loop loop{count, body, context};
  const int team = static_cast<int>(std::min<std::size_t>(count, threads));
  Pool& from = *pool.load();
  const std::vector<Worker*> helpers = team > 1 ? from.borrow(team - 1) : std::vector<Worker*>();
  int member = 0;
  for (Worker* helper : helpers) helper->start(take_part, &loop, ++member);
  take_part(&loop, 0);
  for (Worker* helper : helpers) helper->wait();
  if (!helpers.empty()) from.give_back(helpers);
}

#else

const char* parallel_name() { return "serial"; }

int parallel_limit() { return 1; }

void guard_forks() {}

void end_threads() {}

void parallel_for(std::size_t count, int, void (*body)(void*, std::size_t), void* context) {
  for (std::size_t i = 0; i < count; ++i) body(context, i);
}

#endif

}  // namespace fusedopt
