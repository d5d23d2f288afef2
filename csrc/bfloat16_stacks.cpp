#include "bfloat16_stacks.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "matrix_units.h"
#include "parallel.hpp"
#include "unlocked.hpp"

namespace py = pybind11;

namespace fusedopt {

#if FUSEDOPT_X86_LEVELS > 3
extern const MatrixUnits units_amx, units_avx512_bf16;
#endif

namespace {

// The instructions for products of bfloat16 that this build and machine have, the fastest first.
const std::vector<const MatrixUnits*>& matrix_units() {
  static const std::vector<const MatrixUnits*> here = [] {
    std::vector<const MatrixUnits*> units;
#if FUSEDOPT_X86_LEVELS > 3
    if (levels().back().name == std::string("x86_v4_bf16")) {
      if (has_amx()) units.push_back(&units_amx);
      units.push_back(&units_avx512_bf16);
    }
#endif
    return units;
  }();
  return here;
}

std::size_t ceiling(std::size_t n, std::size_t part) { return (n + part - 1) / part; }

// Products of fewer squares than this are not worth waking a thread for, which takes 10 to 50 us:
// 512^3 operations take 100 us. Such matrices have one thread each.
constexpr std::size_t SERIAL_SQUARES = 4096;
// Patches have half the squares in each direction where there would be fewer of them.
constexpr std::size_t FEW_PATCHES = 32;

struct MatrixSize {
  std::size_t rows, columns, high, wide;
  MatrixSize(std::size_t r, std::size_t c)
      : rows(std::min(r, c)),
        columns(std::max(r, c)),
        high(ceiling(rows, SQUARE)),
        wide(ceiling(columns, SQUARE)) {}
  bool serial() const { return high * high * wide < SERIAL_SQUARES; }
  std::size_t doubles() const {
    return high * SQUARE + std::max(high * SQUARE, ceiling(rows * columns, SUMMED));
  }
  // Bytes of the buffers of an Iterate, each of which begins on a boundary of 64.
  std::size_t bytes() const {
    const std::size_t square = SQUARE_SIZE * sizeof(std::uint16_t);
    return ceiling(doubles() * sizeof(double), 64) * 64 + (4 * wide + 3 * high) * high * square +
           high * SQUARE * sizeof(float);
  }
};

struct Iteration {
  const MatrixUnits& unit;
  const std::vector<double>& coefficients;
  double prescale, eps, factor;
  bool by_row;
};

// body(part, patch) for each part, by threads that have a patch each.
template <class Body>
void in_parts(std::size_t count, char* patches, int threads, const Body& body) {
  struct Loop {
    const Body& body;
    std::size_t count;
    char* patches;
    std::atomic<std::size_t> next{0};
  } loop{body, count, patches};
  const auto work = [](void* context, std::size_t thread) {
    Loop& l = *static_cast<Loop*>(context);
    float* const patch = reinterpret_cast<float*>(l.patches + thread * PATCH_SIZE * sizeof(float));
    for (std::size_t part; (part = l.next++) < l.count;) l.body(part, patch);
  };
  const std::size_t teams = std::min(count, static_cast<std::size_t>(threads));
  if (teams == 1)
    work(&loop, 0);
  else
    parallel_for(teams, static_cast<int>(teams), work, &loop);
}

void iterate(const Iteration& how, const MatrixSize& size, Iterate& x, char* patches, int threads) {
  const auto phase = [&](std::size_t count, const auto& body) {
    in_parts(count, patches, threads, body);
  };
  const std::size_t sums = ceiling(x.rows * x.columns, SUMMED);
  phase(sums, [&](std::size_t part, float*) { how.unit.squares(x, part); });
  double all = 0;
  for (std::size_t k = 0; k < sums; ++k) all += x.sums[k];
  const double norm = std::sqrt(all);
  // A matrix of zeros stays one; an infinity or NaN is everywhere at once.
  const auto inverse = [&](double size_of_row, double unit_size) {
    if (!(size_of_row <= std::numeric_limits<double>::max()))
      return std::numeric_limits<double>::quiet_NaN();
    return size_of_row > 0 ? 1 / (how.prescale * size_of_row * unit_size + how.eps) : 0.0;
  };
  const auto load = [&] {
    phase(size.high, [&](std::size_t part, float*) { how.unit.load(x, part); });
  };
  const std::size_t rows = ceiling(size.high, x.side), columns = ceiling(size.wide, x.side);
  const auto gram = [&] {
    phase(rows * (rows + 1) / 2,
          [&](std::size_t part, float* patch) { how.unit.gram(x, part, patch); });
  };
  if (how.by_row) {
    // Divides the matrix by its norm first, or squares could leave the range of float32.
    std::fill_n(x.scale, size.high * SQUARE, norm > 0 ? 1 / norm : 0.0);
    load();
    gram();
    phase(size.high, [&](std::size_t part, float*) { how.unit.row_sums(x, part); });
    for (std::size_t i = 0; i < size.high * SQUARE; ++i)
      x.scale[i] = inverse(std::sqrt(x.sums[i]), norm);
  } else {
    std::fill_n(x.scale, size.high * SQUARE, inverse(norm, 1));
  }
  load();
  const std::size_t steps = how.coefficients.size() / 3;
  for (std::size_t k = 0; k < steps; ++k) {
    const double* const row = how.coefficients.data() + 3 * k;
    const float a = static_cast<float>(row[0]), b = static_cast<float>(row[1]),
                c = static_cast<float>(row[2]);
    gram();
    phase(rows * (rows + 1) / 2,
          [&](std::size_t part, float* patch) { how.unit.polynomial(x, a, b, c, part, patch); });
    const bool last = k + 1 == steps;
    phase(rows * columns, [&](std::size_t part, float* patch) {
      last ? how.unit.finish(x, static_cast<float>(how.factor), part, patch)
           : how.unit.multiply(x, part, patch);
    });
    std::swap(x.x_right, x.next_right);
  }
}

void one(const Iteration& how, float* matrix, std::size_t rows, std::size_t columns, char* space,
         char* patches, int threads) {
  const MatrixSize size(rows, columns);
  const bool tall = rows > columns;
  Iterate x{};
  x.matrix = matrix;
  x.rows = size.rows, x.columns = size.columns;
  x.down = tall ? 1 : columns, x.right = tall ? columns : 1;
  x.high = size.high, x.wide = size.wide;
  const std::size_t patches_here = ceiling(size.high, PATCH) * ceiling(size.wide, PATCH);
  x.side = patches_here < FEW_PATCHES ? PATCH / 2 : PATCH;
  x.scale = reinterpret_cast<double*>(space);
  x.sums = x.scale + size.high * SQUARE;
  char* at = space + ceiling(size.doubles() * sizeof(double), 64) * 64;
  const auto take = [&at](std::size_t squares) {
    std::uint16_t* const taken = reinterpret_cast<std::uint16_t*>(at);
    at += squares * SQUARE_SIZE * sizeof(std::uint16_t);
    return taken;
  };
  for (std::uint16_t** part : {&x.x_left, &x.x_right, &x.next_right, &x.x_transposed})
    *part = take(size.high * size.wide);
  for (std::uint16_t** part : {&x.gram_left, &x.gram_right, &x.q})
    *part = take(size.high * size.high);
  x.diagonal = reinterpret_cast<float*>(at);
  iterate(how, size, x, patches, threads);
}

// The number of matrices that have buffers at a time, and of threads that have a patch.
struct Room {
  std::size_t slots, threads;
  Room(const MatrixSize& size, std::size_t count, std::size_t most) {
    threads = std::max<std::size_t>(1, most);
    slots = size.serial() ? std::min(count, threads) : 1;
    if (size.serial()) threads = slots;
  }
  std::size_t bytes(const MatrixSize& size) const {
    return 64 + slots * ceiling(size.bytes(), 64) * 64 + threads * PATCH_SIZE * sizeof(float);
  }
};

std::size_t space_for(std::size_t count, std::size_t rows, std::size_t columns, int threads) {
  const MatrixSize size(rows, columns);
  return Room(size, count, static_cast<std::size_t>(std::max(1, threads))).bytes(size);
}

const MatrixUnits& unit_called(const std::string& name) {
  for (const MatrixUnits* unit : matrix_units())
    if (name == unit->name) return *unit;
  throw py::value_error("orthogonalize_bfloat16: this processor has no '" + name + "'");
}

// Replaces each matrix of a stack (count, rows, columns) of float32, in C order, by factor times
// its iterate, with products of bfloat16. coefficients: a, b, c of each step. space: bytes, at
// least `orthogonalize_bfloat16_space` of them. unit: one of `matrix_units`.
void orthogonalize_bfloat16(py::array stack, py::array space,
                            const std::vector<double>& coefficients, double prescale, double eps,
                            double factor, bool by_row, int threads, const std::string& unit) {
  if (!stack.dtype().is(py::dtype::of<float>()) || stack.ndim() != 3 ||
      !space.dtype().is(py::dtype::of<std::uint8_t>()) ||
      !(stack.flags() & space.flags() & py::array::c_style))
    throw py::type_error(
        "orthogonalize_bfloat16: expected a stack of float32 and space of bytes, in C order");
  const auto extent = [&](int k) { return static_cast<std::size_t>(stack.shape(k)); };
  const std::size_t count = extent(0), rows = extent(1), columns = extent(2);
  const Iteration how{unit_called(unit), coefficients, prescale, eps, factor, by_row};
  if (!stack.size()) return;
  const MatrixSize size(rows, columns);
  const Room room(size, count, static_cast<std::size_t>(std::max(1, threads)));
  if (static_cast<std::size_t>(space.nbytes()) < room.bytes(size))
    throw py::value_error("orthogonalize_bfloat16: too little space");
  float* const matrices = static_cast<float*>(stack.mutable_data());
  char* begin = static_cast<char*>(space.mutable_data());
  begin += (64 - reinterpret_cast<std::uintptr_t>(begin) % 64) % 64;
  const std::size_t each = ceiling(size.bytes(), 64) * 64;
  char* const patches = begin + room.slots * each;
  const int most = std::min(static_cast<int>(room.threads), parallel_limit());
  unlocked([&] {
    if (!size.serial()) {
      for (std::size_t k = 0; k < count; ++k)
        one(how, matrices + k * rows * columns, rows, columns, begin, patches, most);
      return;
    }
    // A matrix in each part, whose buffers are those of its patch.
    in_parts(count, patches, most, [&](std::size_t k, float* patch) {
      char* const own = reinterpret_cast<char*>(patch);
      const std::size_t slot =
          static_cast<std::size_t>(own - patches) / (PATCH_SIZE * sizeof(float));
      one(how, matrices + k * rows * columns, rows, columns, begin + slot * each, own, 1);
    });
  });
}

}  // namespace

void bind_bfloat16_stacks(py::module_& module) {
  module.def("orthogonalize_bfloat16", &orthogonalize_bfloat16);
  module.def("orthogonalize_bfloat16_space", &space_for);
  // Matrix units belong to the highest level: where a lower one is in use, there are none.
  module.def("matrix_units", [] {
    py::list names;
    if (&level() != &levels().back()) return names;
    for (const MatrixUnits* unit : matrix_units()) names.append(unit->name);
    return names;
  });
}

}  // namespace fusedopt
