#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

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

void in_order(std::size_t count, void (*body)(void*, std::size_t), void* context) {
  const DefaultControl control;
  for (std::size_t i = 0; i < count; ++i) body(context, i);
}

}  // namespace

#if defined(FUSEDOPT_OPENMP) || defined(FUSEDOPT_THREADS)
namespace {

// The rest of the share of one thread, on a cache line of its own.
struct alignas(64) Share {
  std::atomic<std::size_t> next{0};
  std::size_t end = 0;
};

struct Loop {
  void (*body)(void*, std::size_t);
  void* context;
  std::vector<Share> shares;

  Loop(std::size_t count, int team, void (*body)(void*, std::size_t), void* context)
      : body(body), context(context), shares(static_cast<std::size_t>(team)) {
    for (std::size_t k = 0; k < shares.size(); ++k) {
      shares[k].next.store(share_begin(count, shares.size(), k), std::memory_order_relaxed);
      shares[k].end = share_begin(count, shares.size(), k + 1);
    }
  }
};

// In the environment that results are defined in: the share of a member of the team, and then what
// others have not begun. A share whose member never came, since the system gave fewer threads, is
// done so too.
void take_part(void* of, int member) {
  const DefaultControl control;
  Loop& loop = *static_cast<Loop*>(of);
  const std::size_t team = loop.shares.size();
  for (std::size_t k = 0; k < team; ++k) {
    Share& share = loop.shares[(static_cast<std::size_t>(member) + k) % team];
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const std::size_t i = share.next.fetch_add(1, std::memory_order_relaxed);
      if (i < share.end) loop.body(loop.context, i);
    }
  }
}

// The number of threads that a loop of `count` parts takes.
int team_of(std::size_t count, int threads) {
  return static_cast<int>(std::min<std::size_t>(count, static_cast<std::size_t>(threads)));
}

}  // namespace
#endif

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
  const int team = team_of(count, threads);
  if (team <= 1) return in_order(count, body, context);
  Loop loop(count, team, body, context);
#pragma omp parallel num_threads(team)
  take_part(&loop, omp_get_thread_num());
}

#elif defined(FUSEDOPT_THREADS)

namespace {

// Never destroyed: a thread that still steps at exit must find it.
std::atomic<Pool*> pool{new Pool};

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
  const int team = team_of(count, threads);
  if (team <= 1) return in_order(count, body, context);
  Loop loop(count, team, body, context);
  Pool& from = *pool.load();
  const std::vector<Worker*> helpers = from.borrow(team - 1);
  int member = 0;
  for (Worker* helper : helpers) helper->start(take_part, &loop, ++member);
  take_part(&loop, 0);
  for (Worker* helper : helpers) helper->wait();
  from.give_back(helpers);
}

#else

const char* parallel_name() { return "serial"; }

int parallel_limit() { return 1; }

std::vector<int> bound_processors() { return {}; }

void guard_forks() {}

void end_threads() {}

void parallel_for(std::size_t count, int, void (*body)(void*, std::size_t), void* context) {
  in_order(count, body, context);
}

#endif

}  // namespace fusedopt
