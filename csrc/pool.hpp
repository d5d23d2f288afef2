// Threads that stay from one parallel loop to the next, for builds without OpenMP.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fusedopt {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  asm volatile("yield");
#endif
}

// The time that a thread looks before it sleeps: about as long as waking it takes, and as OpenMP's
// threads do here. With 300 us steps were no faster, and what a trainer does next waits for the
// processor.
constexpr std::chrono::microseconds SPIN{50};

// Looks again and again, and says whether it came true.
template <class Condition>
bool spin(const Condition& condition) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point end = Clock::now() + SPIN;
  do {
    for (int k = 0; k < 64; ++k) {
      if (condition()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return condition();
}

// A thread that runs what it is given, one thing after another, and sleeps in between. The two
// sides of `task` are ordered by it alone: whoever is about to sleep says so before its last look,
// and whoever changes `task` looks for sleepers after it.
class Worker {
 public:
  using Task = void (*)(void* context, int member);

  Worker() : thread_([this] { live(); }) {}

  void start(Task task, void* context, int member) {
    context_ = context;
    member_ = member;
    change(task);
  }

  // Until the task that was started last is done.
  void wait() {
    await([this] { return task_.load() == nullptr; });
  }

  // Ends the thread, which must have no task.
  void end() {
    change([](void*, int) {});
    thread_.join();
  }

 private:
  void change(Task task) {
    task_.store(task);
    if (sleepers_.load() == 0) return;
    {
      const std::lock_guard<std::mutex> before_or_after_the_look(mutex_);
    }
    changed_.notify_all();
  }

  template <class Condition>
  void await(const Condition& condition) {
    if (spin(condition)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleepers_;
    changed_.wait(lock, condition);
    --sleepers_;
  }

  void live() {
    while (true) {
      await([this] { return task_.load() != nullptr; });
      const Task task = task_.load();
      if (!context_) return;  // the end
      task(context_, member_);
      context_ = nullptr;
      change(nullptr);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int> sleepers_{0};
  std::atomic<Task> task_{nullptr};
  void* context_ = nullptr;
  int member_ = 0;
  std::thread thread_;  // last: it uses the others
};

// Workers are lent to one loop at a time, the first idle ones first, so that a loop meets the same
// ones in each step; loops of several threads at once have workers of their own.
class Pool {
 public:
  // Lends up to `wanted` workers; fewer where the system gives no more threads or the process ends.
  std::vector<Worker*> borrow(int wanted) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Worker*> team;
    for (Lent& lent : workers_) {
      if (static_cast<int>(team.size()) >= wanted) break;
      if (!lent.out) take(lent, team);
    }
    try {
      while (!closed_ && static_cast<int>(team.size()) < wanted) {
        workers_.push_back({std::make_unique<Worker>(), false});
        take(workers_.back(), team);
      }
    } catch (const std::system_error&) {
      // Those that there are do the work.
    }
    return team;
  }

  void give_back(const std::vector<Worker*>& team) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Worker* worker : team)
      for (Lent& lent : workers_)
        if (lent.worker.get() == worker) lent.out = false;
    if (closed_) end_idle();
  }

  // Ends the threads that are not in use; later loops make new ones.
  void rest() {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_idle();
  }

  // Ends all threads, those in use when they come back; later loops are serial.
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    end_idle();
  }

 private:
  struct Lent {
    std::unique_ptr<Worker> worker;
    bool out;
  };

  static void take(Lent& lent, std::vector<Worker*>& team) {
    lent.out = true;
    team.push_back(lent.worker.get());
  }

  void end_idle() {
    for (auto lent = workers_.begin(); lent != workers_.end();) {
      if (!lent->out) lent->worker->end();
      lent = lent->out ? lent + 1 : workers_.erase(lent);
    }
  }

  std::mutex mutex_;
  bool closed_ = false;
  std::vector<Lent> workers_;
};

}  // namespace
}  // namespace fusedopt
