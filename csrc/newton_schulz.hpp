// Newton-Schulz iterations of matrices that fit into a core's cache. What is computed, and why in
// this order, fusedopt/linalg/newton_schulz.py says; larger matrices are multiplied by NumPy's
// BLAS.
//
// A matrix is held tall, z of m x n with n <= m, so that every product reads whole rows of its
// second factor. All lie with their rows and columns filled up with zeros to a multiple of GRAIN,
// so that there is no remainder; what products make of the filling is never read. The order of each
// sum depends on nothing but its length, so the bits are the same on every instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "rules.hpp"
#include "table.h"

namespace {

using fusedopt::NewtonSchulz;

constexpr std::size_t GRAIN = 16;
constexpr std::size_t filled(std::size_t n) { return (n + GRAIN - 1) / GRAIN * GRAIN; }

// Bytes of a register, and how many of them hold a row of a block of sums, which has HEIGHT rows.
#if defined(__AVX512F__)
constexpr std::size_t WIDTH = 64, SPAN = 4;
#elif defined(__AVX__)
constexpr std::size_t WIDTH = 32, SPAN = 2;
#elif defined(__aarch64__)
constexpr std::size_t WIDTH = 16, SPAN = 4;
#else
constexpr std::size_t WIDTH = 16, SPAN = 2;
#endif
constexpr std::size_t HEIGHT = 4;
// The same where blocks below the diagonal are left out: narrow ones leave out more.
constexpr std::size_t UPPER_SPAN = 64 / WIDTH < SPAN ? 64 / WIDTH : SPAN;

template <class T>
struct Register {
#if defined(__GNUC__)
  typedef T Type __attribute__((vector_size(WIDTH)));
#else
  using Type = T;
#endif
};
template <class T>
using Vector = typename Register<T>::Type;
template <class T>
constexpr std::size_t lanes = sizeof(Vector<T>) / sizeof(T);

template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
struct Square {  // n x n
  T* data;
  std::size_t n, ld;
  T* row(std::size_t i) const { return data + i * ld; }
};

// Where element (i, p) of a product's first factor stands.
template <class T>
struct Left {
  const T* data;
  std::size_t down, right;
};

// The number of terms of a sum that are added up apart: that rounds less than one long sum, and b's
// rows stay in the first-level cache.
constexpr std::size_t PART = 64;

// store(i, j, sums) for a block of a b from (i, j) on; each element is a sum of `terms` products.
template <class T, std::size_t span, class Store>
inline void block(const Left<T>& a, const T* b, std::size_t ld, std::size_t i, std::size_t j,
                  std::size_t terms, const Store& store) {
  Vector<T> sums[HEIGHT][span] = {};
  const T* left = a.data + i * a.down;
  for (std::size_t p = 0; p < terms; ++p, left += a.right) {
    Vector<T> row[span];
    for (std::size_t c = 0; c < span; ++c) row[c] = load(b + p * ld + j + c * lanes<T>);
    for (std::size_t r = 0; r < HEIGHT; ++r)
      for (std::size_t c = 0; c < span; ++c) sums[r][c] += left[r * a.down] * row[c];
  }
  for (std::size_t r = 0; r < HEIGHT; ++r)
    for (std::size_t c = 0; c < span; ++c) store(i + r, j + c * lanes<T>, sums[r][c]);
}

template <std::size_t n>
struct Count {
  static constexpr std::size_t value = n;
};

template <class T, class Store>
inline void blocks(const Left<T>& a, const T* b, std::size_t ld, std::size_t rows,
                   std::size_t terms, bool upper, const Store& store) {
  std::size_t j = 0;
  const auto panels = [&](auto span) {
    constexpr std::size_t wide = span.value * lanes<T>;
    for (; j + wide <= ld; j += wide)
      for (std::size_t i = 0; i < rows && (!upper || i < j + wide); i += HEIGHT)
        block<T, span.value>(a, b, ld, i, j, terms, store);
  };
  if (!upper) panels(Count<SPAN>());
  panels(Count<UPPER_SPAN>());
  panels(Count<1>());
}

// out := finish(i, j, a b) for `rows` rows, or only the blocks that reach the upper triangle.
// inner: of a's columns.
template <class T, class Finish>
inline void product(Left<T> a, const T* b, T* out, std::size_t ld, std::size_t rows,
                    std::size_t inner, bool upper, const Finish& finish) {
  for (std::size_t done = 0; done < inner; done += PART) {
    const std::size_t terms = inner - done < PART ? inner - done : PART;
    const bool first = done == 0, last = done + terms == inner;
    blocks(a, b, ld, rows, terms, upper, [=](std::size_t i, std::size_t j, Vector<T> v) {
      T* const at = out + i * ld + j;
      if (!first) v += load(at);
      if (last) v = finish(i, j, v);
      std::memcpy(at, &v, sizeof v);
    });
    a.data += terms * a.right;
    b += terms * ld;
  }
}

template <class T>
void mirror(const Square<T>& s) {
  for (std::size_t i = 1; i < s.n; ++i)
    for (std::size_t j = 0; j < i; ++j) s.row(i)[j] = s.row(j)[i];
}

// out := z (s + diagonal) for `rows` rows.
template <class T>
void multiply(const T* z, std::size_t rows, const Square<T>& s, const T* diagonal, T* out) {
  product<T>({z, s.ld, 1}, s.data, out, s.ld, rows, s.n, false,
             [=](std::size_t i, std::size_t j, Vector<T> v) {
               return v + load(diagonal + j) * load(z + i * s.ld + j);
             });
}

// out := z^T z, of m x n.
template <class T>
void gram_of(const T* z, std::size_t m, const Square<T>& out) {
  product<T>({z, 1, out.ld}, z, out.data, out.ld, out.ld, m, true,
             [](std::size_t, std::size_t, Vector<T> v) { return v; });
  mirror(out);
}

// out := b s + c s^2 of a symmetric matrix, with zeros for the diagonal, which is apart, a added to
// it. It is much larger than the other elements where z has a low rank, and a product's rounding is
// half as large without it.
template <class T>
void polynomial(const double* row, const Square<T>& s, const Square<T>& out, T* diagonal) {
  const T a = static_cast<T>(row[0]), b = static_cast<T>(row[1]), c = static_cast<T>(row[2]);
  product<T>(
      {s.data, s.ld, 1}, s.data, out.data, s.ld, s.ld, s.n, true,
      [=](std::size_t i, std::size_t j, Vector<T> v) { return c * v + b * load(s.row(i) + j); });
  mirror(out);
  for (std::size_t i = 0; i < s.n; ++i) {
    diagonal[i] = out.row(i)[i] + a;
    out.row(i)[i] = T(0);
  }
}

template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr double smallest = 0x1p-126, largest = 0x1.fffffep127, epsilon = 0x1p-23;
};
template <>
struct Range<double> {
  static constexpr double smallest = 0x1p-1022, largest = 0x1.fffffffffffffp1023, epsilon = 0x1p-52;
};

// 2^exponent, which is in the range of normal numbers.
inline double power_of_two(int exponent) {
  const std::uint64_t bits = static_cast<std::uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The exponent by which a matrix is multiplied that its largest element be about 1; 0 if it has
// none.
template <class T>
int shift_of(const T* z, std::size_t size) {
  double largest = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const double magnitude = z[i] < T(0) ? -z[i] : z[i];
    largest = magnitude > largest ? magnitude : largest;
  }
  if (!(largest > 0 && largest <= Range<double>::largest)) return 0;
  std::uint64_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52) - 1023;
  return exponent < -1022 ? 1022 : -exponent;
}

template <class T>
double trace(const Square<T>& s) {
  double sum = 0;
  for (std::size_t i = 0; i < s.n; ++i) sum += s.row(i)[i];
  return sum;
}

// Turns z's Gram matrix into that of the normalised matrix, which is z times scale, by columns.
template <class T>
void normalize(const NewtonSchulz& how, T* z, std::size_t m, const Square<T>& gram, T* scale) {
  using R = Range<T>;
  double eps = how.eps;
  const double squares = trace(gram);
  // Squares that may have left the range are taken again, of a multiple by a power of two.
  if (!(squares >= R::smallest / (R::epsilon * R::epsilon) && squares <= R::largest * R::epsilon)) {
    const std::size_t size = m * gram.ld;
    const int shift = shift_of(z, size);
    // In two steps, each of which has a normal factor.
    const double halves[] = {power_of_two(shift / 2), power_of_two(shift - shift / 2)};
    for (const double half : halves) {
      for (std::size_t i = 0; i < size; ++i) z[i] *= static_cast<T>(half);
      eps *= half;
    }
    gram_of(z, m, gram);
  }
  const double all = trace(gram);
  for (std::size_t i = 0; i < gram.n; ++i) {
    double sum = all;
    if (how.by_row) {
      sum = 0;
      for (std::size_t j = 0; j < gram.n; ++j)
        sum += gram.row(i)[j] < T(0) ? -gram.row(i)[j] : gram.row(i)[j];
    }
    scale[i] = sum == 0 ? T(0) : static_cast<T>(1 / (how.prescale * root(sum) + eps));
  }
  for (std::size_t i = 0; i < gram.n; ++i)
    for (std::size_t j = 0; j < gram.n; ++j) gram.row(i)[j] = gram.row(i)[j] * scale[i] * scale[j];
}

// Elements that `orthogonalize` wants of space beside a matrix: two tall ones, two square ones, two
// rows, and one grain to begin on a boundary.
std::size_t orthogonalize_space(std::size_t rows, std::size_t columns) {
  const std::size_t m = filled(rows > columns ? rows : columns);
  const std::size_t n = filled(rows > columns ? columns : rows);
  return 2 * m * n + 2 * n * n + 2 * n + GRAIN;
}

// body(i, j) for all elements, by squares of a few cache lines: rows of a matrix that is transposed
// can all fall on the same few places of the cache.
template <class Body>
inline void by_squares(std::size_t rows, std::size_t columns, const Body& body) {
  for (std::size_t i = 0; i < rows; i += GRAIN)
    for (std::size_t j = 0; j < columns; j += GRAIN)
      for (std::size_t k = i; k < i + GRAIN && k < rows; ++k)
        for (std::size_t l = j; l < j + GRAIN && l < columns; ++l) body(k, l);
}

template <class T>
void orthogonalize(const NewtonSchulz& how, void* matrix, void* space) {
  T* const u = static_cast<T*>(matrix);
  // Rows have norms of their own where they are the fewer; else a square needs no transposing.
  const bool tall = how.by_row ? how.rows > how.columns : how.rows >= how.columns;
  const std::size_t m = tall ? how.rows : how.columns, n = tall ? how.columns : how.rows;
  const std::size_t ld = filled(n), down = tall ? n : 1, right = tall ? 1 : m;
  std::memset(space, 0, orthogonalize_space(m, n) * sizeof(T));
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(space), boundary = 64;
  T* at = static_cast<T*>(space) + ((boundary - begin % boundary) % boundary) / sizeof(T);
  const auto take = [&at](std::size_t size) {
    T* const taken = at;
    at += size;
    return taken;
  };
  T* z = take(filled(m) * ld);
  T* next = take(filled(m) * ld);
  const Square<T> gram{take(ld * ld), n, ld}, q{take(ld * ld), n, ld};
  T* const scale = take(ld);
  T* const diagonal = take(ld);

  by_squares(m, n, [=](std::size_t i, std::size_t j) { z[i * ld + j] = u[i * down + j * right]; });
  for (int k = 0; k < how.steps; ++k) {
    gram_of(z, m, gram);
    if (k == 0) normalize(how, z, m, gram, scale);
    polynomial(how.coefficients + 3 * k, gram, q, diagonal);
    // z itself is never divided: that would be one more pass.
    const T factor = k == how.steps - 1 ? static_cast<T>(how.factor) : T(1);
    for (std::size_t i = 0; i < n; ++i) {
      const T each = k == 0 ? scale[i] * factor : factor;
      for (std::size_t j = 0; j < n; ++j) q.row(i)[j] *= each;
      diagonal[i] *= each;
    }
    multiply(z, filled(m), q, diagonal, next);
    T* const old = z;
    z = next;
    next = old;
  }
  by_squares(m, n, [=](std::size_t i, std::size_t j) { u[i * down + j * right] = z[i * ld + j]; });
}

}  // namespace
