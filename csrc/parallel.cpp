#include "parallel.hpp"

#include <algorithm>
#include <atomic>

#include "floating_point.hpp"

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
namespace {

struct Loop {
  std::size_t count;
  void (*body)(void*, std::size_t);
  void* context;
  std::atomic<std::size_t> next{0};
};

// One thread's share of a loop, in the environment that results are defined in.
void take_part(Loop& loop) {
  const DefaultControl control;
  for (std::size_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.count;)
    loop.body(loop.context, i);
}

}  // namespace

#if defined(FUSEDOPT_OPENMP)

namespace {
// A forked child inherits the pool's records but not its threads, and would wait for them for
// ever: it stays serial where the pool could not be dissolved before the fork.
std::atomic<bool> serial_after_fork{false};
}  // namespace

const char* parallel_name() { return "openmp"; }

int parallel_limit() { return serial_after_fork.load() ? 1 : omp_get_max_threads(); }

std::vector<int> bound_processors() {
  std::vector<int> all;
#if _OPENMP >= 201511
  if (omp_get_proc_bind() == omp_proc_bind_false) return all;
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> own(static_cast<std::size_t>(omp_get_place_num_procs(place)));
    omp_get_place_proc_ids(place, own.data());
    all.insert(all.end(), own.begin(), own.end());
  }
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
#endif
  return all;
}

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
  Loop loop{count, body, context};
  const int team = static_cast<int>(std::min<std::size_t>(count, threads));
  if (team <= 1) return take_part(loop);
#pragma omp parallel num_threads(team)
  take_part(loop);
}

#elif defined(FUSEDOPT_THREADS)

namespace {

// Never destroyed: a thread that still steps at exit must find it.
std::atomic<Pool*> pool{new Pool};

void help(void* loop, int) { take_part(*static_cast<Loop*>(loop)); }

}  // namespace

const char* parallel_name() { return "threads"; }

int parallel_limit() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

std::vector<int> bound_processors() { return {}; }

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
  for (Worker* helper : helpers) helper->start(help, &loop, ++member);
  take_part(loop);
  for (Worker* helper : helpers) helper->wait();
  if (!helpers.empty()) from.give_back(helpers);
}

#else

const char* parallel_name() { return "serial"; }

int parallel_limit() { return 1; }

std::vector<int> bound_processors() { return {}; }

void guard_forks() {}

void end_threads() {}

void parallel_for(std::size_t count, int, void (*body)(void*, std::size_t), void* context) {
  Loop loop{count, body, context};
  take_part(loop);
}

#endif

}  // namespace fusedopt
