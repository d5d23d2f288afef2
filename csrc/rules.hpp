// Every update rule, simplest first. A rule is a struct of per-step scalars with one call operator
// that takes one element's parameter, gradient and states, updates the states and returns the
// delta: what is subtracted from the parameter. `states` is their number; where only the first few
// of them are written, `written` says how many. A rule of `Measured` reads sums over its leaf:
// `measure` says what an element adds to each of its `sums`, always in float64, before anything is
// written, and the last `measured` scalars come from them. Weight decay, the sign for `maximize`,
// clipping and storage formats are the business of the loop around it. Python folds the scalars in
// float64 (fusedopt/rules/*.py, same names) and they are cast once.
//
// Only + - * / sqrt, comparison and selection: that is what makes the bits the same everywhere.
#pragma once
#include <math.h>

namespace {

inline float root(float x) {
#if defined(__GNUC__)
  return __builtin_sqrtf(x);
#else
  return sqrtf(x);
#endif
}
inline double root(double x) {
#if defined(__GNUC__)
  return __builtin_sqrt(x);
#else
  return sqrt(x);
#endif
}

// No step, rather than NaN, where nothing was ever accumulated and eps is zero.
template <class T>
inline T ratio(T numerator, T denominator) {
  const T quotient = numerator / denominator;
  return denominator == T(0) ? T(0) : quotient;
}

// A NaN in either operand stays visible.
template <class T>
inline T maximum(T a, T b) {
  return (b > a || b != b) ? b : a;
}

template <class T>
inline T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// The size with the sign of x: nothing where x is zero, NaN where it is NaN.
template <class T>
inline T signed_like(T size, T x) {
  return x > T(0) ? size : (x < T(0) ? -size : x);
}

// Whether one is positive and the other negative.
template <class T>
inline bool opposed(T x, T y) {
  return ((x > T(0)) & (y < T(0))) | ((x < T(0)) & (y > T(0)));
}

template <class T>
struct SGD {
  static constexpr const char* name = "sgd";
  static constexpr int states = 0;
  T lr;
  T operator()(T, T g) const { return lr * g; }
};

// Every form of momentum: (a, b) are (1 - mu, lr), (lr, 1) or (1 - dampening, lr).
template <class T>
struct Momentum {
  static constexpr const char* name = "momentum";
  static constexpr int states = 1;
  T mu, a, b;
  T operator()(T, T g, T& v) const {
    v = mu * v + a * g;
    return b * v;
  }
};

template <class T>
struct Nesterov {
  static constexpr const char* name = "nesterov";
  static constexpr int states = 1;
  T mu, a, b, c;
  T operator()(T, T g, T& v) const {
    v = mu * v + a * g;
    return b * g + c * v;
  }
};

template <class T>
struct AdaGrad {
  static constexpr const char* name = "adagrad";
  static constexpr int states = 1;
  T lr, eps_root, eps;
  T operator()(T, T g, T& G) const {
    G = G + g * g;
    return ratio(lr * g, root(G + eps_root) + eps);
  }
};

template <class T>
struct RMSProp {
  static constexpr const char* name = "rmsprop";
  static constexpr int states = 1;
  T rho, one_rho, lr, eps_root, eps;
  T operator()(T, T g, T& v) const {
    v = rho * v + one_rho * (g * g);
    return ratio(lr * g, root(v + eps_root) + eps);
  }
};

// The variance about the mean; cancellation can make it negative, hence the clamp. k is 1, or
// 1 / (1 - rho^t) where the means are bias-corrected.
template <class T>
struct CenteredRMSProp {
  static constexpr const char* name = "rmsprop_centered";
  static constexpr int states = 2;
  T rho, one_rho, lr, eps_root, eps, k;
  T operator()(T, T g, T& v, T& a) const {
    v = rho * v + one_rho * (g * g);
    a = rho * a + one_rho * g;
    const T w = v - k * (a * a);
    return ratio(lr * g, root((w < T(0) ? T(0) : w) + eps_root) + eps);
  }
};

// A momentum buffer over the delta u of a normalising rule: x u + y b covers plain and Nesterov
// momentum, with the learning rate inside or outside of the buffer.
template <class T, template <class> class Inner>
struct Buffered : Inner<T> {
  static constexpr int states = Inner<T>::states + 1;
  T mu, x, y;
  template <class... S>
  T operator()(T p, T g, T& b, S&... inner) const {
    const T u = Inner<T>::operator()(p, g, inner...);
    b = mu * b + u;
    return x * u + y * b;
  }
};
template <class T>
struct BufferedRMSProp : Buffered<T, RMSProp> {
  static constexpr const char* name = "rmsprop_momentum";
};
template <class T>
struct BufferedCenteredRMSProp : Buffered<T, CenteredRMSProp> {
  static constexpr const char* name = "rmsprop_centered_momentum";
};

// step = lr sqrt(c2) / c1, and both eps are scaled to match: sqrt(v/c2 + r) + e is
// (sqrt(v + r c2) + e sqrt(c2)) / sqrt(c2).
template <class T>
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr int states = 2;
  T b1, one_b1, b2, one_b2, step, eps_root, eps;
  T operator()(T, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    return ratio(step * m, root(v + eps_root) + eps);
  }
};

// The first moment looks one step ahead: step m + step_g g.
template <class T>
struct NesterovAdam {
  static constexpr const char* name = "adam_nesterov";
  static constexpr int states = 2;
  T b1, one_b1, b2, one_b2, step, eps_root, eps, step_g;
  T operator()(T, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    return ratio(step * m + step_g * g, root(v + eps_root) + eps);
  }
};

// The largest second moment so far divides: raw (k = 1) or bias-corrected (k = 1/c2).
template <class T>
struct AMSGrad {
  static constexpr const char* name = "adam_amsgrad";
  static constexpr int states = 3;
  T b1, one_b1, b2, one_b2, step, eps_root, eps, k;
  T operator()(T, T g, T& m, T& v, T& x) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    x = maximum(x, k * v);
    return ratio(step * m, root(x + eps_root) + eps);
  }
};

template <class T>
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr int states = 1;
  T b1, one_b1, b2, one_b2, lr;
  T operator()(T, T g, T& m) const {
    const T c = b1 * m + one_b1 * g;
    m = b2 * m + one_b2 * g;
    return signed_like(lr, c);
  }
};

// The largest gradient so far, forgotten slowly. One eps beside the gradient, one in the quotient.
template <class T>
struct AdaMax {
  static constexpr const char* name = "adamax";
  static constexpr int states = 2;
  T b1, one_b1, b2, step, eps_inside, eps;
  T operator()(T, T g, T& m, T& u) const {
    m = b1 * m + one_b1 * g;
    u = maximum(b2 * u, magnitude(g) + eps_inside);
    return ratio(step * m, u + eps);
  }
};

// Steps in the parameter's own unit: what was moved over what was pulled.
template <class T>
struct Adadelta {
  static constexpr const char* name = "adadelta";
  static constexpr int states = 2;
  T rho, one_rho, lr, eps;
  T operator()(T, T g, T& v, T& d) const {
    v = rho * v + one_rho * (g * g);
    const T moved = ratio(root(d + eps) * g, root(v + eps));
    d = rho * d + one_rho * (moved * moved);
    return lr * moved;
  }
};

// `plain` is the denominator of the first steps, in which v tells too little to divide by; then 0.
template <class T>
struct RAdam {
  static constexpr const char* name = "radam";
  static constexpr int states = 2;
  T b1, one_b1, b2, one_b2, step, eps_root, eps, plain;
  T operator()(T, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    const T adaptive = root(v + eps_root) + eps;
    return ratio(step * m, plain == T(0) ? adaptive : plain);
  }
};

// Only signs of gradients count, and none is multiplied: a product of two could underflow.
template <class T>
struct Rprop {
  static constexpr const char* name = "rprop";
  static constexpr int states = 2;
  T down, up, low, high;
  T operator()(T, T g, T& prev, T& s) const {
    const bool agree = ((prev > T(0)) & (g > T(0))) | ((prev < T(0)) & (g < T(0)));
    const bool turned = opposed(prev, g);
    T by = agree ? up : T(1);
    by = turned ? down : by;
    s = s * by;
    s = s < low ? low : s;
    s = s > high ? high : s;
    prev = turned ? T(0) : g;
    return signed_like(s, prev);
  }
};

template <class T>
inline T clamp(T x, T limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// The variance about the mean; eps_root gathers in it.
template <class T>
struct AdaBelief {
  static constexpr const char* name = "adabelief";
  static constexpr int states = 2;
  T b1, one_b1, b2, one_b2, step, eps_root, eps;
  T operator()(T, T g, T& m, T& s) const {
    m = b1 * m + one_b1 * g;
    const T off = g - m;
    s = b2 * s + one_b2 * (off * off) + eps_root;
    return ratio(step * m, root(s) + eps);
  }
};

// v divides before it takes the gradient in.
template <class T>
struct ADOPT {
  static constexpr const char* name = "adopt";
  static constexpr int states = 2;
  T b1, one_b1, b2, one_b2, lr, eps, limit;
  T operator()(T, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * clamp(ratio(g, maximum(root(v), eps)), limit);
    v = b2 * v + one_b2 * (g * g);
    return lr * m;
  }
};

template <class T>
struct AdEMAMix {
  static constexpr const char* name = "ademamix";
  static constexpr int states = 3;
  T b1, one_b1, b3, one_b3, b2, one_b2, step, slow_step, eps;
  T operator()(T, T g, T& m, T& slow, T& v) const {
    m = b1 * m + one_b1 * g;
    slow = b3 * slow + one_b3 * g;
    v = b2 * v + one_b2 * (g * g);
    return ratio(step * m + slow_step * slow, root(v) + eps);
  }
};

// Adam's step size, the gradient's direction.
template <class T>
struct Grams {
  static constexpr const char* name = "grams";
  static constexpr int states = 2;
  T b1, one_b1, b2, one_b2, step, eps;
  T operator()(T, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    return signed_like(magnitude(ratio(step * m, root(v) + eps)), g);
  }
};

// gain = (1 - b1) sqrt(c2): momentum of what was divided.
template <class T>
struct LaProp {
  static constexpr const char* name = "laprop";
  static constexpr int states = 2;
  T b1, gain, b2, one_b2, step, eps;
  T operator()(T, T g, T& m, T& v) const {
    v = b2 * v + one_b2 * (g * g);
    m = b1 * m + ratio(gain * g, root(v) + eps);
    return step * m;
  }
};

// `later` is 0 in the first step, which has no gradient before it, and 1 after.
template <class T>
struct Adan {
  static constexpr const char* name = "adan";
  static constexpr int states = 4;
  T b1, one_b1, b2, one_b2, b3, one_b3, later, k, step, step_d, eps_root, eps;
  T operator()(T, T g, T& m, T& d, T& n, T& prev) const {
    const T e = later * (g - prev);
    const T ahead = g + k * e;
    m = b1 * m + one_b1 * g;
    d = b2 * d + one_b2 * e;
    n = b3 * n + one_b3 * (ahead * ahead);
    prev = g;
    return ratio(step * m + step_d * d, root(n + eps_root) + eps);
  }
};

// The official code's denominator; k = 1, or 1/c1 where the first moment is bias-corrected.
template <class T>
struct Sophia {
  static constexpr const char* name = "sophia";
  static constexpr int states = 2, written = 1;
  T b1, one_b1, lr, gamma, eps, clip, k;
  T operator()(T, T g, T& m, T& h) const {
    m = b1 * m + one_b1 * g;
    return lr * clamp(k * m / (gamma * h + eps), clip);
  }
};

// The paper's denominator: safe where the curvature is negative.
template <class T>
struct PaperSophia {
  static constexpr const char* name = "sophia_paper";
  static constexpr int states = 2, written = 1;
  T b1, one_b1, lr, gamma, eps, clip, k;
  T operator()(T, T g, T& m, T& h) const {
    m = b1 * m + one_b1 * g;
    return lr * clamp(k * m / maximum(eps, gamma * h), clip);
  }
};

// The second half of Muon: `o` holds the orthogonalised direction, which a Momentum or Nesterov
// rule wrote in a PEEK mode and Python's matrix products then replaced.
template <class T>
struct Muon {
  static constexpr const char* name = "muon";
  static constexpr int states = 2, written = 1;
  T mu, a, lr;
  T operator()(T, T g, T& m, T& o) const {
    m = mu * m + a * g;
    return lr * o;
  }
};

// The parameter, as a decay before the step makes it.
template <class T>
struct Decayed {
  static constexpr const char* name = "decayed";
  static constexpr int states = 0;
  T factor;
  T operator()(T p, T) const { return factor * p; }
};

// What was made of the gradient between two phases.
template <class T>
struct Apply {
  static constexpr const char* name = "apply";
  static constexpr int states = 1, written = 0;
  T lr;
  T operator()(T, T, T& o) const { return lr * o; }
};

// Momentum of gradients whose size is that of the parameter; x and y as in Buffered. rate: the
// learning rate of the leaf, from both norms.
template <class T>
struct LARS {
  static constexpr const char *name = "lars", *measure_name = "lars_measure";
  static constexpr int states = 1, sums = 2, measured = 1;
  T mu, x, y, rate;
  void measure(T* sums, T p, T g, T) const {
    sums[0] = p * p;
    sums[1] = g * g;
  }
  T operator()(T, T g, T& v) const {
    const T u = rate * g;
    v = mu * v + u;
    return x * u + y * v;
  }
};

// Adam's direction, weight decay included, in steps of the parameter's size.
template <class T>
struct LAMB {
  static constexpr const char *name = "lamb", *measure_name = "lamb_measure";
  static constexpr int states = 2, sums = 2, measured = 1;
  T b1, one_b1, b2, one_b2, step, eps_root, eps, decay, rate;
  void measure(T* sums, T p, T g, T m, T v) const {
    const T u = direction(p, g, m, v);
    sums[0] = p * p;
    sums[1] = u * u;
  }
  T operator()(T p, T g, T& m, T& v) const { return rate * direction(p, g, m, v); }
  T direction(T p, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    return ratio(step * m, root(v + eps_root) + eps) + decay * p;
  }
};

// 1 where both have one sign, else 0.
template <class T>
inline T agree(T x, T g) {
  return (x > T(0) && g > T(0)) || (x < T(0) && g < T(0)) ? T(1) : T(0);
}

// Where the gradient agrees with the step, and NaN where that is; rate: over the share of those.
template <class T>
inline T cautious(T step, T direction, T g) {
  return agree(direction, g) > T(0) ? step : step - step;
}

template <class T>
struct CautiousAdamW {
  static constexpr const char *name = "cautiousadamw", *measure_name = "cautiousadamw_measure";
  static constexpr int states = 2, sums = 2, measured = 1;
  T b1, one_b1, b2, one_b2, step, eps_root, eps, rate;
  void measure(T* sums, T, T g, T m, T) const {
    sums[0] = agree(b1 * m + one_b1 * g, g);
    sums[1] = T(1);
  }
  T operator()(T, T g, T& m, T& v) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    return cautious(rate * ratio(step * m, root(v + eps_root) + eps), m, g);
  }
};

template <class T>
struct CautiousLion {
  static constexpr const char *name = "cautiouslion", *measure_name = "cautiouslion_measure";
  static constexpr int states = 1, sums = 2, measured = 1;
  T b1, one_b1, b2, one_b2, rate;
  void measure(T* sums, T, T g, T m) const {
    sums[0] = agree(b1 * m + one_b1 * g, g);
    sums[1] = T(1);
  }
  T operator()(T, T g, T& m) const {
    const T c = b1 * m + one_b1 * g;
    m = b2 * m + one_b2 * g;
    return cautious(signed_like(rate, c), c, g);
  }
};

// rate: the learning rate times the root mean square of the leaf.
template <class T>
struct Tiger {
  static constexpr const char *name = "tiger", *measure_name = "tiger_measure";
  static constexpr int states = 1, sums = 2, measured = 1;
  T beta, one_beta, decay, rate;
  void measure(T* sums, T p, T, T) const {
    sums[0] = p * p;
    sums[1] = T(1);
  }
  T operator()(T p, T g, T& m) const {
    m = beta * m + one_beta * g;
    return signed_like(rate, m) + rate * (decay * p);
  }
};

// k: 1 over the norm of the corrected gradient of the leaf where that is above 1.
template <class T>
struct MARS {
  static constexpr const char *name = "mars", *measure_name = "mars_measure";
  static constexpr int states = 3, sums = 1, measured = 1;
  T b1, one_b1, b2, one_b2, gain, step, eps, k;
  void measure(T* sums, T, T g, T, T, T prev) const {
    const T c = g + gain * (g - prev);
    sums[0] = c * c;
  }
  T operator()(T, T g, T& m, T& v, T& prev) const {
    const T c = k * (g + gain * (g - prev));
    m = b1 * m + one_b1 * c;
    v = b2 * v + one_b2 * (c * c);
    prev = g;
    return ratio(step * m, root(v) + eps);
  }
};

// m, s and the root of v are in units of the estimate d; u: the way that the parameter has come; w:
// the learning rate, k: that, or 1. eps and the shrinking of the states when d grows come from the
// sums, over the whole optimizer.
template <class T>
struct Prodigy {
  static constexpr const char *name = "prodigy", *measure_name = "prodigy_measure";
  static constexpr int states = 4, sums = 2, measured = 3;
  T b1, one_b1, b2, one_b2, b3, w, k, decay, step, eps, shrink, shrink2;
  void measure(T* sums, T, T g, T, T, T s, T u) const {
    sums[0] = w * (g * u);
    sums[1] = magnitude(b3 * s + k * g);
  }
  T operator()(T p, T g, T& m, T& v, T& s, T& u) const {
    m = b1 * m + one_b1 * g;
    v = b2 * v + one_b2 * (g * g);
    const T delta = ratio(step * m, root(v) + eps) + decay * p;
    m = shrink * m;
    v = shrink2 * v;
    s = shrink2 * (b3 * s + k * g);
    u = u + delta;
    return delta;
  }
};

// m and s are in units of d; w: the learning rate, k: the share of it in s.
template <class T>
struct DAdaptAdam {
  static constexpr const char *name = "dadaptadam", *measure_name = "dadaptadam_measure";
  static constexpr int states = 3, sums = 2, measured = 1;
  T b1, gain, b2, one_b2, b3, w, k, eps, decay, d, shrink;
  void measure(T* sums, T, T g, T, T v, T s) const {
    sums[0] = w * (g * ratio(s, root(v) + eps));
    sums[1] = magnitude(b3 * s + k * g);
  }
  T operator()(T p, T g, T& m, T& v, T& s) const {
    m = b1 * m + gain * g;
    v = b2 * v + one_b2 * (g * g);
    const T delta = ratio(d * m, root(v) + eps) + decay * p;
    m = shrink * m;
    s = shrink * (b3 * s + k * g);
    return delta;
  }
};

// s and v are in units of d; k: 1 over the norm of the first gradient.
template <class T>
struct DAdaptSGD {
  static constexpr const char *name = "dadaptsgd", *measure_name = "dadaptsgd_measure";
  static constexpr int states = 2, sums = 4, measured = 2;
  T lr, mu, one_mu, d, k, shrink;
  void measure(T* sums, T, T g, T s, T) const {
    const T x = lr * g;
    sums[0] = g * g;
    sums[1] = x * s;
    sums[2] = s * s;
    sums[3] = x * x;
  }
  T operator()(T, T g, T& s, T& v) const {
    const T x = k * (lr * g);
    v = v + x;
    const T delta = one_mu * (d * v);
    s = shrink * (s + x);
    v = shrink * (mu * v);
    return delta;
  }
};

// d is z - y, where y is the parameter; c: the share of z in the new average, k = 1 - c.
template <class T>
struct ScheduleFreeSGD {
  static constexpr const char* name = "schedulefreesgd";
  static constexpr int states = 1;
  T a, c, k, b;
  T operator()(T, T u, T& d) const {
    const T delta = a * u - c * d;
    d = k * d - b * u;
    return delta;
  }
};

template <class T>
struct ScheduleFreeAdamW {
  static constexpr const char* name = "schedulefreeadamw";
  static constexpr int states = 2;
  T a, c, k, b, b2, one_b2, scale, eps, decay;
  T operator()(T p, T g, T& d, T& v) const {
    v = b2 * v + one_b2 * (g * g);
    const T u = ratio(scale * g, root(v) + eps) + decay * p;
    const T delta = a * u - c * d;
    d = k * d - b * u;
    return delta;
  }
};

template <template <class> class...>
struct List {};

using Rules = List<SGD, Momentum, Nesterov, AdaGrad, RMSProp, CenteredRMSProp, BufferedRMSProp,
                   BufferedCenteredRMSProp, Adam, NesterovAdam, AMSGrad, AdaMax, Adadelta, RAdam,
                   Rprop, AdaBelief, ADOPT, AdEMAMix, Grams, LaProp, Adan, Lion, Sophia,
                   PaperSophia, Muon, Decayed, Apply, LARS, LAMB, CautiousAdamW, CautiousLion,
                   Tiger, MARS, Prodigy, DAdaptAdam, DAdaptSGD, ScheduleFreeSGD, ScheduleFreeAdamW>;

using Measured =
    List<LARS, LAMB, CautiousAdamW, CautiousLion, Tiger, MARS, Prodigy, DAdaptAdam, DAdaptSGD>;

// Those with loops over arrays as they are stored (direct.hpp): for all rules these would take half
// as long to compile again as everything else does.
using DirectRules = List<SGD, Momentum, Nesterov, Adam, Lion>;

// Operations that are no rule, on a target and a source. `state`: the target is stored as states
// are, without denormals; `filter`: the target is the gradient that the rule will see, and the
// first scalar the factor on it.

// Sophia's refresh from a gradient at sampled labels (Gauss-Newton-Bartlett) ...
template <class T>
struct SquareRefresh {
  static constexpr const char* name = "sophia_refresh_square";
  static constexpr bool state = true, filter = false;
  T b2, k;
  void operator()(T& h, T e) const { h = b2 * h + k * (e * e); }
};

// ... and from a product with the Hessian (Hutchinson).
template <class T>
struct Average {
  static constexpr const char* name = "average";
  static constexpr bool state = true, filter = false;
  T keep, gain;
  void operator()(T& average, T x) const { average = keep * average + gain * x; }
};

// An average of weights. In this form the average of what does not move stays exactly as it is:
// rounded to float32, keep and gain do not add up to 1.
template <class T>
struct Lerp {
  static constexpr const char* name = "lerp";
  static constexpr bool state = true, filter = false;
  T gain;
  void operator()(T& average, T x) const { average = average + gain * (x - average); }
};

// Nesterov's look-ahead: the point at which the gradient is wanted.
template <class T>
struct LookAhead {
  static constexpr const char* name = "lookahead";
  static constexpr bool state = false, filter = false;
  T mu;
  void operator()(T& p, T v) const { p = p - mu * v; }
};

// Gradients of micro-batches: the first (keep = 0) takes the place of whatever was there.
template <class T>
struct Accumulate {
  static constexpr const char* name = "accumulate";
  static constexpr bool state = false, filter = false;
  T keep;
  void operator()(T& sum, T g) const { sum = keep == T(0) ? g : sum + g; }
};

// The parameter as it was, for sums that compare.
template <class T>
struct Keep {
  static constexpr const char* name = "keep";
  static constexpr bool state = false, filter = false;
  void operator()(T& kept, T p) const { kept = p; }
};

// NaN stays NaN.
template <class T>
struct ClipValue {
  static constexpr const char* name = "clip_value";
  static constexpr bool state = false, filter = true;
  T factor, limit;
  void operator()(T& clipped, T g) const { clipped = clamp(factor * g, limit); }
};

// A direction over the root of a mean of squares, which k corrects for its bias.
template <class T>
struct Normalize {
  static constexpr const char* name = "normalize";
  static constexpr bool state = false, filter = false;
  T k, eps;
  void operator()(T& o, T v) const { o = ratio(o, root(k * v) + eps); }
};

using Others =
    List<SquareRefresh, Average, Lerp, LookAhead, Accumulate, Keep, ClipValue, Normalize>;

// Sums over a leaf: what one element adds, in float64.

// The scale keeps float64's squares in range; of float32's none leaves it, and their scale is one.
template <class T>
struct Squares {
  static constexpr const char* name = "squares";
  static constexpr int operands = 1;
  T scale;
  double operator()(T x) const {
    const double scaled = static_cast<double>(sizeof(T) == sizeof(float) ? x : scale * x);
    return scaled * scaled;
  }
};

template <class T>
struct SquaredDifferences {
  static constexpr const char* name = "squared_differences";
  static constexpr int operands = 2;
  double operator()(T x, T y) const {
    const double difference = static_cast<double>(x) - static_cast<double>(y);
    return difference * difference;
  }
};

// Sophia's win rate: elements that move by less than the clip; both denominators.
template <class T>
struct SophiaWins {
  static constexpr const char* name = "sophia_wins";
  static constexpr int operands = 2;
  T gamma, eps, clip, k;
  double operator()(T m, T h) const {
    const T r = k * m / (gamma * h + eps);
    return r < clip && r > -clip ? 1.0 : 0.0;
  }
};
template <class T>
struct PaperSophiaWins {
  static constexpr const char* name = "sophia_paper_wins";
  static constexpr int operands = 2;
  T gamma, eps, clip, k;
  double operator()(T m, T h) const {
    const T r = k * m / maximum(eps, gamma * h);
    return r < clip && r > -clip ? 1.0 : 0.0;
  }
};

using Sums = List<Squares, SquaredDifferences, SophiaWins, PaperSophiaWins>;

}  // namespace
