// The parallel loop under stress: loops of several threads at once, forks, and threads that still
// loop when the others have been ended. Prints "fine", or what went wrong.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "parallel.hpp"

namespace {

void once(void* seen, std::size_t i) { ++static_cast<std::vector<int>*>(seen)->at(i); }

// Loops of 1 to 40 parts on 1 to 5 threads; a pause after some lets the threads fall asleep.
void loops(int count, int pause) {
  for (int k = 0; k < count; ++k) {
    std::vector<int> seen(static_cast<std::size_t>(1 + k % 40), 0);
    fusedopt::parallel_for(seen.size(), 1 + k % 5, once, &seen);
    for (const int times : seen)
      if (times != 1) {
        std::printf("a part ran %d times\n", times);
        std::abort();
      }
    if (pause && k % pause == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

bool child_is_fine() {
  const pid_t child = fork();
  if (child == 0) {
    loops(200, 0);
    fusedopt::end_threads();
    loops(50, 0);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0;
}

}  // namespace

int main() {
  fusedopt::guard_forks();
  std::vector<std::thread> callers;
  for (int k = 0; k < 3; ++k) callers.emplace_back(loops, 2000, 7 * k);
  for (std::thread& caller : callers) caller.join();
  for (int k = 0; k < 5; ++k) {
    if (!child_is_fine()) {
      std::puts("a forked child did not end well");
      return 1;
    }
    loops(100, 3);
  }
  std::thread late(loops, 2000, 5);
  fusedopt::end_threads();
  late.join();
  loops(100, 0);
  fusedopt::end_threads();
  std::puts("fine");
}
