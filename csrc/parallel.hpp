// One parallel loop, in the form that the build chose: OpenMP, std::thread or serial.
#pragma once
#include <cstddef>
#include <vector>

namespace fusedopt {

// Calls body(context, i) once for each i in [0, count), on at most `threads` threads. Each thread
// has a share, the same in every loop of that count, and takes from the shares of others only when
// its own is done: so a thread meets the memory that it met in the step before, which on a machine
// with several memory nodes is near to it. It does so in the
// floating-point environment of floating_point.hpp. The body must not throw, and its result must
// not depend on which thread runs it.
void parallel_for(std::size_t count, int threads, void (*body)(void*, std::size_t), void* context);

// Where the share of a member of a team begins; that of the member behind the last is `count`.
inline std::size_t share_begin(std::size_t count, std::size_t team, std::size_t member) {
  return count / team * member + (member < count % team ? member : count % team);
}

// "openmp", "threads" or "serial".
const char* parallel_name();

// The number of threads that the runtime allows now (threadpoolctl and omp_set_num_threads lower
// it).
int parallel_limit();

// The processors to which the runtime binds its threads (OMP_PROC_BIND), the calling one too, whose
// own affinity says no more what the process was granted; none where it does not.
std::vector<int> bound_processors();

// Makes a fork safe; called once at import.
void guard_forks();

// Ends the threads that loops have left behind; called at exit. Later loops are serial.
void end_threads();

}  // namespace fusedopt
