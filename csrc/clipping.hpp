// Norms, and factors that clip, from the sums of squares of a step's gradients.
#pragma once
#include <vector>

namespace fusedopt {

// The sum of the squares of a leaf's elements times scale, and that scale; 0 for a leaf
// that does not count.
struct SquareSum {
  double sum, scale;
};

// The norm of all leaves, in whatever order they stand: as `combined` in fusedopt/step/clipping.py.
double combined(const std::vector<SquareSum>& leaves);

// min(1, limit / norm).
inline double clip_scale(double limit, double norm) { return norm > limit ? limit / norm : 1.0; }

}  // namespace fusedopt
