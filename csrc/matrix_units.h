// Products of matrices in bfloat16, by the instructions that some processors have for them: what
// crosses the border between the code of one of these and the rest. Plain structs, nothing inline.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fusedopt {

// Matrices are cut into squares of SQUARE x SQUARE elements, filled up with zeros.
constexpr std::size_t SQUARE = 32;
constexpr std::size_t SQUARE_SIZE = SQUARE * SQUARE;
// The number of squares of a product, in each direction, that one thread computes one by one.
constexpr std::size_t PATCH = 8;
constexpr std::size_t PATCH_SIZE = PATCH * PATCH * SQUARE_SIZE;
// The number of elements of a matrix that have a sum of squares of their own.
constexpr std::size_t SUMMED = 1 << 16;

// A matrix between two iterations. x is the matrix or its transpose, with no more rows than
// columns. Squares lie one behind the other: those of a left factor by rows of squares, those of a
// right factor by columns of squares. A square is two tiles of sixteen rows of sixteen pairs:
// - of a left factor, rows 0 to 15 and rows 16 to 31; a pair is two neighbours in a row;
// - of a right factor, columns 0 to 15 and columns 16 to 31; a pair is two neighbours in a column,
//   and row k of a tile holds pair k of each column.
struct Iterate {
  float* matrix;  // rows x columns of x; element (i, j) at i * down + j * right
  std::size_t rows, columns, down, right;
  std::size_t high, wide;  // squares of x: rows and columns
  std::size_t side;        // squares of a patch, in each direction
  std::uint16_t* x_left;
  std::uint16_t* x_right;
  std::uint16_t* next_right;    // becomes x_right
  std::uint16_t* x_transposed;  // x^T as a right factor
  std::uint16_t* gram_left;     // x x^T
  std::uint16_t* gram_right;
  std::uint16_t* q;  // b gram + c gram^2 as a left factor, with zeros for its diagonal
  float* diagonal;   // that, and a
  double* scale;     // x := scale * matrix, for each row of x
  double* sums;      // sums of squares, or those of magnitudes of each row of the gram
};

// One part of the work of a phase; the parts may be done in any order.
using Part = void (*)(const Iterate&, std::size_t part, float* patch);

struct MatrixUnits {
  const char* name;
  void (*squares)(const Iterate&, std::size_t part);   // of SUMMED elements
  void (*load)(const Iterate&, std::size_t part);      // one row of squares of x
  void (*row_sums)(const Iterate&, std::size_t part);  // one row of squares of the gram
  // One patch each; patch: room for PATCH_SIZE numbers.
  void (*gram)(const Iterate&, std::size_t part, float* patch);
  void (*polynomial)(const Iterate&, float a, float b, float c, std::size_t part, float* patch);
  void (*multiply)(const Iterate&, std::size_t part, float* patch);              // into x
  void (*finish)(const Iterate&, float factor, std::size_t part, float* patch);  // into matrix
};

}  // namespace fusedopt
