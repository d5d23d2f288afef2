// Newton-Schulz iterations in bfloat16, compiled once for each kind of matrix unit; exports one
// table. README.md here says what holds for it, as for kernels.cpp.
//
// x and what is made of it are rounded to bfloat16 once in each product; sums are of float32, in an
// order that depends on nothing but the sizes.
#include "matrix_units.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the undefined values that its own header passes on.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

namespace {

using namespace fusedopt;

using Bits = std::uint16_t;
constexpr std::size_t TILE_ROWS = 16, TILE_SIZE = TILE_ROWS * SQUARE;
// The number of squares of a sum that are added up before the next: their right factor, 16 KiB,
// stays in the first-level cache.
constexpr std::size_t DEPTH = 8;

#if defined(__AMX_BF16__)

struct Unit {
  // Eight tiles of sixteen rows of 64 bytes.
  Unit() {
    alignas(64) std::uint8_t config[64] = {1};
    for (int k = 0; k < 8; ++k) config[16 + 2 * k] = 64, config[48 + k] = 16;
    _tile_loadconfig(config);
  }
  ~Unit() { _tile_release(); }  // the processor need not save them when it switches threads
};

// sums (of a square, by rows) := left right, of `depth` squares each, or that much more.
inline void accumulate(const Bits* left, const Bits* right, std::size_t depth, bool more,
                       float* sums) {
  constexpr std::size_t stride = SQUARE * sizeof(float), half = 16 * SQUARE;
  if (more) {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + 16, stride);
    _tile_loadd(2, sums + half, stride);
    _tile_loadd(3, sums + half + 16, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::size_t k = 0; k < depth; ++k, left += SQUARE_SIZE, right += SQUARE_SIZE) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + TILE_SIZE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + TILE_SIZE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16, stride);
  _tile_stored(2, sums + half, stride);
  _tile_stored(3, sums + half + 16, stride);
}

#else

struct Unit {
  Unit() {}
};

inline __m512bh pairs_at(const Bits* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}

inline void accumulate(const Bits* left, const Bits* right, std::size_t depth, bool more,
                       float* sums) {
  constexpr std::size_t HEIGHT = 8;
  for (std::size_t top = 0; top < SQUARE; top += HEIGHT) {
    __m512 sum[HEIGHT][2];
    for (std::size_t r = 0; r < HEIGHT; ++r)
      for (std::size_t c = 0; c < 2; ++c)
        sum[r][c] =
            more ? _mm512_loadu_ps(sums + (top + r) * SQUARE + 16 * c) : _mm512_setzero_ps();
    const Bits *a = left + top * SQUARE, *b = right;
    for (std::size_t k = 0; k < depth; ++k, a += SQUARE_SIZE, b += SQUARE_SIZE)
      for (std::size_t pair = 0; pair < 16; ++pair) {
        const __m512bh columns[] = {pairs_at(b + pair * SQUARE),
                                    pairs_at(b + TILE_SIZE + pair * SQUARE)};
        for (std::size_t r = 0; r < HEIGHT; ++r) {
          int both;
          __builtin_memcpy(&both, a + r * SQUARE + 2 * pair, sizeof both);
          const __m512bh rows = reinterpret_cast<__m512bh>(_mm512_set1_epi32(both));
          for (std::size_t c = 0; c < 2; ++c)
            sum[r][c] = _mm512_dpbf16_ps(sum[r][c], columns[c], rows);
        }
      }
    for (std::size_t r = 0; r < HEIGHT; ++r)
      for (std::size_t c = 0; c < 2; ++c)
        _mm512_storeu_ps(sums + (top + r) * SQUARE + 16 * c, sum[r][c]);
  }
}

#endif

// ------------------------------------------------------------------------- squares

using Words = __m512i;

inline Words rounded(__m512 low, __m512 high) {
  return reinterpret_cast<Words>(_mm512_cvtne2ps_pbh(high, low));
}

// Sixteen numbers of bfloat16.
inline __m512 widened(const Bits* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The transpose of 16 x 16 words.
inline void transpose(Words (&row)[16]) {
  Words t[16];
  for (int k = 0; k < 16; k += 2) {
    t[k] = _mm512_unpacklo_epi32(row[k], row[k + 1]);
    t[k + 1] = _mm512_unpackhi_epi32(row[k], row[k + 1]);
  }
  for (int k = 0; k < 16; k += 4) {
    row[k] = _mm512_unpacklo_epi64(t[k], t[k + 2]);
    row[k + 1] = _mm512_unpackhi_epi64(t[k], t[k + 2]);
    row[k + 2] = _mm512_unpacklo_epi64(t[k + 1], t[k + 3]);
    row[k + 3] = _mm512_unpackhi_epi64(t[k + 1], t[k + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    const Words low = _mm512_shuffle_i32x4(row[k], row[k + 4], 0x88),
                high = _mm512_shuffle_i32x4(row[k], row[k + 4], 0xdd),
                low_2 = _mm512_shuffle_i32x4(row[k + 8], row[k + 12], 0x88),
                high_2 = _mm512_shuffle_i32x4(row[k + 8], row[k + 12], 0xdd);
    t[k] = _mm512_shuffle_i32x4(low, low_2, 0x88);
    t[k + 8] = _mm512_shuffle_i32x4(low, low_2, 0xdd);
    t[k + 4] = _mm512_shuffle_i32x4(high, high_2, 0x88);
    t[k + 12] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
  }
  for (int k = 0; k < 16; ++k) row[k] = t[k];
}

inline void store_tile(const Words (&row)[16], Bits* to) {
  for (int k = 0; k < 16; ++k) _mm512_storeu_si512(to + k * SQUARE, row[k]);
}

// Stores a square of float32 as a left factor and, if there is room for it, its transpose as a
// right factor; then the square itself as a right factor and its transpose as a left one.
inline void store_as_left(const float* square, Bits* left, Bits* transposed_right) {
  for (std::size_t tile = 0; tile < 2; ++tile) {
    Words row[16];
    for (std::size_t k = 0; k < 16; ++k) {
      const float* from = square + (16 * tile + k) * SQUARE;
      row[k] = rounded(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16));
    }
    store_tile(row, left + tile * TILE_SIZE);
    if (!transposed_right) continue;
    transpose(row);
    store_tile(row, transposed_right + tile * TILE_SIZE);
  }
}

inline void store_as_right(const float* square, Bits* right, Bits* transposed_left) {
  const Words interleave =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (std::size_t tile = 0; tile < 2; ++tile) {
    Words row[16];
    for (std::size_t k = 0; k < 16; ++k) {
      const float* from = square + 2 * k * SQUARE + 16 * tile;
      row[k] = _mm512_permutexvar_epi16(
          interleave, rounded(_mm512_loadu_ps(from), _mm512_loadu_ps(from + SQUARE)));
    }
    if (right) store_tile(row, right + tile * TILE_SIZE);
    if (!transposed_left) continue;
    transpose(row);
    store_tile(row, transposed_left + tile * TILE_SIZE);
  }
}

inline void transpose_square(float* square) {
  Words part[2][2][16];
  for (std::size_t i = 0; i < 2; ++i)
    for (std::size_t j = 0; j < 2; ++j) {
      for (std::size_t k = 0; k < 16; ++k)
        part[i][j][k] = _mm512_loadu_si512(square + (16 * i + k) * SQUARE + 16 * j);
      transpose(part[i][j]);
    }
  for (std::size_t i = 0; i < 2; ++i)
    for (std::size_t j = 0; j < 2; ++j)
      for (std::size_t k = 0; k < 16; ++k)
        _mm512_storeu_si512(square + (16 * i + k) * SQUARE + 16 * j, part[j][i][k]);
}

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// The part of the matrix that square (i, j) of x is, along the rows of the matrix.
struct Window {
  float* at;
  std::size_t rows, columns, stride;
  bool transposed;
};

inline Window window(const Iterate& x, std::size_t i, std::size_t j) {
  float* const at = x.matrix + i * SQUARE * x.down + j * SQUARE * x.right;
  const std::size_t rows = least(SQUARE, x.rows - i * SQUARE),
                    columns = least(SQUARE, x.columns - j * SQUARE);
  if (x.right == 1) return {at, rows, columns, x.down, false};
  return {at, columns, rows, x.right, true};
}

inline __mmask16 first(std::size_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1);
}

inline void read(const Window& w, float* square) {
  for (std::size_t r = 0; r < SQUARE; ++r)
    for (std::size_t c = 0; c < SQUARE; c += 16) {
      const __mmask16 there = r < w.rows && c < w.columns ? first(w.columns - c) : first(0);
      const float* from = there ? w.at + r * w.stride + c : w.at;
      _mm512_storeu_ps(square + r * SQUARE + c, _mm512_maskz_loadu_ps(there, from));
    }
  if (w.transposed) transpose_square(square);
}

inline void write(const Window& w, float* square) {
  if (w.transposed) transpose_square(square);
  for (std::size_t r = 0; r < w.rows; ++r)
    for (std::size_t c = 0; c < w.columns; c += 16)
      _mm512_mask_storeu_ps(w.at + r * w.stride + c, first(w.columns - c),
                            _mm512_loadu_ps(square + r * SQUARE + c));
}

// ------------------------------------------------------------------------- phases

void squares(const Iterate& x, std::size_t part) {
  const std::size_t begin = part * SUMMED, end = least(begin + SUMMED, x.rows * x.columns);
  constexpr std::size_t LANES = 16;
  double lanes[LANES] = {};
  std::size_t i = begin;
  for (; i + LANES <= end; i += LANES)
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      const double value = x.matrix[i + lane];
      lanes[lane] += value * value;
    }
  for (std::size_t lane = 0; i + lane < end; ++lane) {
    const double value = x.matrix[i + lane];
    lanes[lane] += value * value;
  }
  for (std::size_t width = LANES / 2; width; width /= 2)
    for (std::size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  x.sums[part] = lanes[0];
}

void load(const Iterate& x, std::size_t i) {
  alignas(64) float square[SQUARE_SIZE];
  for (std::size_t j = 0; j < x.wide; ++j) {
    read(window(x, i, j), square);
    for (std::size_t r = 0; r < SQUARE; ++r)
      for (std::size_t c = 0; c < SQUARE; ++c)
        square[r * SQUARE + c] =
            static_cast<float>(square[r * SQUARE + c] * x.scale[i * SQUARE + r]);
    const std::size_t at = (i * x.wide + j) * SQUARE_SIZE;
    store_as_left(square, x.x_left + at, x.x_transposed + at);
    store_as_right(square, x.x_right + (j * x.high + i) * SQUARE_SIZE, nullptr);
  }
}

void row_sums(const Iterate& x, std::size_t i) {
  for (std::size_t r = 0; r < SQUARE; ++r) {
    const Bits* from = x.gram_left + i * x.high * SQUARE_SIZE + r * SQUARE;
    __m512 sum = _mm512_setzero_ps();
    for (std::size_t k = 0; k < x.high; ++k, from += SQUARE_SIZE) {
      sum = _mm512_add_ps(sum, _mm512_abs_ps(widened(from)));
      sum = _mm512_add_ps(sum, _mm512_abs_ps(widened(from + 16)));
    }
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, sum);
    double all = 0;
    for (const float lane : lanes) all += lane;
    x.sums[i * SQUARE + r] = all;
  }
}

// A range between two numbers of squares.
struct Range {
  std::size_t begin, end;
};

inline Range patch_range(std::size_t patch, std::size_t side, std::size_t squares) {
  return {patch * side, least((patch + 1) * side, squares)};
}

// The squares (i, j) of a patch of left right, or those with i <= j: done(i, j, square) for each.
// depth: squares of the sums.
template <class Done>
inline void product(const Bits* left, const Bits* right, std::size_t depth, const Range& rows,
                    const Range& columns, bool upper, float* patch, const Done& done) {
  const Unit unit;
  for (std::size_t k = 0; k < depth; k += DEPTH) {
    const std::size_t part = least(DEPTH, depth - k);
    for (std::size_t j = columns.begin; j < columns.end; ++j)
      for (std::size_t i = rows.begin; i < rows.end && (!upper || i <= j); ++i) {
        float* const square =
            patch + ((j - columns.begin) * PATCH + (i - rows.begin)) * SQUARE_SIZE;
        accumulate(left + (i * depth + k) * SQUARE_SIZE, right + (j * depth + k) * SQUARE_SIZE,
                   part, k > 0, square);
        if (k + part == depth) done(i, j, square);
      }
  }
}

// The same of a symmetric product: of the patches, only those that reach its upper triangle count.
template <class Done>
inline void symmetric(const Bits* left, const Bits* right, std::size_t depth, std::size_t squares,
                      std::size_t side, std::size_t part, float* patch, const Done& done) {
  std::size_t column = 0;
  while (part > column) part -= ++column;
  product(left, right, depth, patch_range(part, side, squares), patch_range(column, side, squares),
          true, patch, done);
}

void gram(const Iterate& x, std::size_t part, float* patch) {
  symmetric(x.x_left, x.x_transposed, x.wide, x.high, x.side, part, patch,
            [&](std::size_t i, std::size_t j, const float* square) {
              const std::size_t n = x.high, at = (i * n + j) * SQUARE_SIZE,
                                mirrored = (j * n + i) * SQUARE_SIZE;
              const bool below = i != j;
              store_as_left(square, x.gram_left + at, below ? x.gram_right + at : nullptr);
              store_as_right(square, x.gram_right + mirrored,
                             below ? x.gram_left + mirrored : nullptr);
            });
}

void polynomial(const Iterate& x, float a, float b, float c, std::size_t part, float* patch) {
  symmetric(x.gram_left, x.gram_right, x.high, x.high, x.side, part, patch,
            [&](std::size_t i, std::size_t j, float* square) {
              const std::size_t n = x.high, at = (i * n + j) * SQUARE_SIZE;
              const __m512 linear = _mm512_set1_ps(b), quadratic = _mm512_set1_ps(c);
              for (std::size_t k = 0; k < SQUARE_SIZE; k += 16) {
                const __m512 sum = _mm512_mul_ps(quadratic, _mm512_loadu_ps(square + k)),
                             term = _mm512_mul_ps(linear, widened(x.gram_left + at + k));
                _mm512_storeu_ps(square + k, _mm512_add_ps(sum, term));
              }
              if (i == j)
                for (std::size_t r = 0; r < SQUARE; ++r) {
                  float& own = square[r * SQUARE + r];
                  x.diagonal[i * SQUARE + r] = a + own;
                  own = 0;
                }
              store_as_left(square, x.q + at, nullptr);
              if (i != j) store_as_right(square, nullptr, x.q + (j * n + i) * SQUARE_SIZE);
            });
}

// done(i, j, square) for the squares of factor (q + diagonal) x.
template <class Done>
inline void multiplied(const Iterate& x, float factor, std::size_t part, float* patch,
                       const Done& done) {
  const std::size_t patches = (x.high + x.side - 1) / x.side;
  product(x.q, x.x_right, x.high, patch_range(part % patches, x.side, x.high),
          patch_range(part / patches, x.side, x.wide), false, patch,
          [&](std::size_t i, std::size_t j, float* square) {
            const Bits* old = x.x_left + (i * x.wide + j) * SQUARE_SIZE;
            for (std::size_t r = 0; r < SQUARE; ++r) {
              const __m512 each = _mm512_set1_ps(x.diagonal[i * SQUARE + r]);
              for (std::size_t c = 0; c < SQUARE; c += 16) {
                float* const at = square + r * SQUARE + c;
                const __m512 term = _mm512_mul_ps(each, widened(old + r * SQUARE + c));
                _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_set1_ps(factor),
                                                   _mm512_add_ps(term, _mm512_loadu_ps(at))));
              }
            }
            done(i, j, square);
          });
}

void multiply(const Iterate& x, std::size_t part, float* patch) {
  multiplied(x, 1.0f, part, patch, [&](std::size_t i, std::size_t j, const float* square) {
    const std::size_t at = (i * x.wide + j) * SQUARE_SIZE;
    store_as_left(square, x.x_left + at, x.x_transposed + at);
    store_as_right(square, x.next_right + (j * x.high + i) * SQUARE_SIZE, nullptr);
  });
}

void finish(const Iterate& x, float factor, std::size_t part, float* patch) {
  multiplied(x, factor, part, patch,
             [&](std::size_t i, std::size_t j, float* square) { write(window(x, i, j), square); });
}

}  // namespace

namespace fusedopt {
extern const MatrixUnits FUSEDOPT_TABLE;
const MatrixUnits FUSEDOPT_TABLE = {FUSEDOPT_UNITS, squares,    load,     row_sums,
                                    gram,           polynomial, multiply, finish};
}  // namespace fusedopt
