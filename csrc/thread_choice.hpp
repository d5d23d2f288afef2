// One thread or all of them, for steps in which either may be the faster.
#pragma once
#include <algorithm>

namespace fusedopt {

// Right after a NumPy product, whose threads still spin, a second thread may cost more time than it
// saves; after a pause, or after nothing, it saves a third and more. What it is cannot be known, so
// both are timed: the better one takes the steps, and the other one step in EVERY. Bits do not
// depend on it.
class ThreadChoice {
 public:
  static constexpr unsigned EVERY = 32;

  // Whether the next step is to take all threads.
  bool all() const {
    if (!seconds_[1]) return true;
    if (!seconds_[0]) return false;
    const bool better = seconds_[1] <= seconds_[0];
    return steps_ % EVERY ? better : !better;
  }

  // Takes the time of the step that was asked for with `all`. The very first meets untouched memory
  // and is not counted, and nothing counts for more than twice the mean, so that one step in which
  // something else held the processor does not decide.
  void tell(bool all, double seconds) {
    if (steps_++ == 0) return;
    double& mean = seconds_[all];
    mean = mean ? mean + (std::min(seconds, 2 * mean) - mean) / 4 : seconds;
  }

 private:
  double seconds_[2] = {0, 0};  // means: of one thread, of all
  unsigned steps_ = 0;
};

}  // namespace fusedopt
