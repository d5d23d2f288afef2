// What a step makes of its gradients' sums of squares: norms, and factors that clip.
#pragma once
#include <vector>

namespace fusedopt {

// Of one leaf: the sum of the squares of its elements times scale, and that scale; 0 for a leaf
// that does not count.
struct SquareSum {
  double sum, scale;
};

// The norm of all leaves, in whatever order they stand: as `combined` in fusedopt/step/clipping.py.
double combined(const std::vector<SquareSum>& leaves);

// min(1, limit / norm).
inline double clip_scale(double limit, double norm) { return norm > limit ? limit / norm : 1.0; }

}  // namespace fusedopt
