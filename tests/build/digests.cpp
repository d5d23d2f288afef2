// Prints a digest of what each operation and codec makes of fixed inputs, of tiles and of whole
// leaves, for an instruction set: equal lines on every machine, or bits differ. Every array lies in
// memory of exactly its size, so that a sanitizer or valgrind sees each byte read beyond it.
//
//   digests [INSTRUCTION SET ...]      all that the machine has, if none is named
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu.hpp"
#include "driver.hpp"

namespace {

using namespace fusedopt;

class Numbers {
 public:
  std::uint64_t bits() { return mixed(state_ += 0x9e3779b97f4a7c15u); }
  double fraction() { return 0.0625 + static_cast<double>(bits() >> 11) * 0x1p-54; }
  // Of many magnitudes; now and then a special one, more rarely one that makes a whole block NaN.
  template <class T>
  T value() {
    using Limits = std::numeric_limits<T>;
    constexpr T special[] = {T(0),          Limits::denorm_min(), Limits::min(),
                             Limits::max(), Limits::infinity(),   Limits::quiet_NaN()};
    const std::uint64_t drawn = bits(), lot = drawn >> 16 & 4095;
    const T sign = drawn & 1 ? T(-1) : T(1);
    if (lot < 128) return sign * special[lot < 126 ? lot % 3 : lot % 3 + 3];
    return sign * static_cast<T>(std::ldexp(fraction(), static_cast<int>(drawn >> 8 & 31) - 24));
  }

 private:
  std::uint64_t state_ = 0;
};

class Digest {
 public:
  template <class T>
  void add(const T* x, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) {
      const T one = x[i] == x[i] ? x[i] : std::numeric_limits<T>::quiet_NaN();  // any NaN is one
      std::uint64_t bits = 0;
      std::memcpy(&bits, &one, sizeof one);
      state_ = mixed(state_ ^ bits) + 1;
    }
  }
  std::uint64_t state() const { return state_; }

 private:
  std::uint64_t state_ = 0;
};

const char* const TYPES[] = {"float32", "float64"};

template <class T>
struct Compute;
template <>
struct Compute<float> {
  static constexpr int index = F32;
};
template <>
struct Compute<double> {
  static constexpr int index = F64;
};

template <class T>
std::unique_ptr<T[]> drawn(Numbers& numbers, std::size_t n) {
  std::unique_ptr<T[]> array(new T[n]);
  for (std::size_t i = 0; i < n; ++i) array[i] = numbers.value<T>();
  return array;
}

template <class T>
std::vector<T> scalars_of(const Operation& operation, Numbers& numbers) {
  std::vector<T> scalars;
  for (int k = 0; k < operation.scalars; ++k) scalars.push_back(static_cast<T>(numbers.fraction()));
  return scalars;
}

constexpr std::size_t LENGTHS[] = {1, 2, 7, 16, 31, 130, 255, 256};

template <class T>
std::uint64_t operation_digest(const Operation& operation) {
  Numbers numbers;
  Digest digest;
  for (int mode = 0; mode < MODES; ++mode) {
    const TileFunction run = operation.compute[Compute<T>::index].mode[mode];
    if (!run) continue;
    for (const std::size_t n : LENGTHS) {
      const std::vector<T> scalars = scalars_of<T>(operation, numbers);
      std::vector<std::unique_ptr<T[]>> arrays;
      std::vector<void*> operands;
      for (int k = 0; k < operation.operands + (mode >= PEEK); ++k) {
        arrays.push_back(drawn<T>(numbers, n));
        operands.push_back(arrays.back().get());
      }
      double lanes[MAX_OPERANDS][LANES] = {};
      const int sums = operation.kind == SUM       ? 1
                       : operation.kind == MEASURE ? operation.written
                                                   : 0;
      for (int k = 0; k < sums; ++k) operands[k] = lanes[k];
      run(operands.data(), scalars.data(), n);
      for (const auto& array : arrays) digest.add(array.get(), n);
      for (int k = 0; k < std::max(sums, 1); ++k) digest.add(lanes[k], LANES);
    }
  }
  return digest.state();
}

// An array as a codec stores it.
template <class T>
class Stored {
 public:
  Stored(const Codec& codec, std::size_t n, Numbers& numbers)
      : codec_(codec),
        n_(n),
        data_(new char[(n * codec.bits + 7) / 8]()),
        aux_(new char[codec.aux ? (n + codec.block - 1) / codec.block * codec.aux : 0]()) {
    for (std::size_t at = 0; at < n; at += TILE) {
      const auto tile = drawn<T>(numbers, length(at));
      const Encode encode = codec.encode[Compute<T>::index];
      if (encode)
        encode(tile.get(), data(at), aux(at), length(at), numbers.bits());
      else
        std::memcpy(data(at), tile.get(), length(at) * sizeof(T));
    }
  }

  void digest(Digest& digest) const {
    for (std::size_t at = 0; at < n_; at += TILE) {
      const std::unique_ptr<T[]> tile(new T[length(at)]);
      const Decode decode = codec_.decode[Compute<T>::index];
      if (decode)
        decode(data(at), aux(at), tile.get(), length(at));
      else
        std::memcpy(tile.get(), data(at), length(at) * sizeof(T));
      digest.add(tile.get(), length(at));
    }
  }

  Operand operand(Role role, std::uint64_t key) const {
    Operand operand;
    operand.role = role;
    operand.data = data(0);
    operand.aux = aux(0);
    operand.decode = codec_.decode[Compute<T>::index];
    operand.encode = codec_.encode[Compute<T>::index];
    operand.bits = static_cast<std::uint32_t>(codec_.bits);
    operand.aux_bytes = static_cast<std::uint32_t>(TILE / codec_.block * codec_.aux);
    operand.random = codec_.random ? sizeof(T) : 0;
    operand.key = key;
    return operand;
  }

 private:
  std::size_t length(std::size_t at) const { return n_ - at < TILE ? n_ - at : TILE; }
  char* data(std::size_t at) const { return data_.get() + at * codec_.bits / 8; }
  char* aux(std::size_t at) const { return aux_.get() + at / codec_.block * codec_.aux; }

  const Codec& codec_;
  std::size_t n_;
  std::unique_ptr<char[]> data_, aux_;
};

template <class T>
std::uint64_t codec_digest(const Codec& codec) {
  Numbers numbers;
  Digest digest;
  for (const std::size_t n : LENGTHS) Stored<T>(codec, n, numbers).digest(digest);
  return digest.state();
}

// A rule over leaves of several sizes, the states of each in another codec, with a sum of squares.
template <class T>
std::uint64_t leaves_digest(const Table& table, const Operation& rule, int threads) {
  Numbers numbers;
  const std::vector<T> scalars = scalars_of<T>(rule, numbers);
  const Operation* squares = table.operations;
  while (std::string(squares->name) != "squares") ++squares;
  const T one = 1;
  const std::uint8_t order[] = {0, 1, 2, 3, 4, 5, 6, 7}, sum_order[] = {7, 1};
  const Step steps[] = {
      {squares->compute[Compute<T>::index].mode[PLAIN], &one, sum_order, 2},
      {rule.compute[Compute<T>::index].mode[DECOUPLED], scalars.data(), order, rule.operands}};
  std::vector<Stored<T>> arrays;
  std::vector<Operand> operands;
  std::vector<Leaf> leaves;
  std::vector<std::vector<double>> sums;
  constexpr std::size_t sizes[] = {1, 300, 40000, 5000, 90001};
  operands.reserve(8 * std::size(sizes));
  int codec = 0;
  for (const std::size_t n : sizes) {
    Operand* const own = operands.data() + operands.size();
    operands.resize(operands.size() + 8);
    for (int k = 0; k < rule.operands; ++k) {
      // Gradients and parameters are stored plainly.
      arrays.emplace_back(table.codecs[k < 2 ? codec % FORMATS : codec % table.codec_count], n,
                          numbers);
      ++codec;
      own[k] = arrays.back().operand(k == 1 ? Role::INPUT : Role::ARRAY, numbers.bits());
    }
    const auto used = ((1u << rule.operands) - 1) | 1u << 7;
    const auto written = ((1u << (2 + rule.written)) - 1) & ~2u;
    Leaf leaf{n, own, steps, 8, 2, used, written, 1u << 7, nullptr, 0};
    sums.emplace_back(sums_of(leaf));
    own[7].role = Role::SUMS;
    own[7].data = reinterpret_cast<char*>(sums.back().data());
    leaves.push_back(leaf);
  }
  run(leaves, threads);
  Digest digest;
  for (const Stored<T>& array : arrays) array.digest(digest);
  for (const std::vector<double>& sum : sums) digest.add(sum.data(), sum.size());
  return digest.state();
}

// Matrices of several shapes, tall and wide.
template <class T>
std::uint64_t orthogonalize_digest(const Table& table) {
  const double triples[] = {4.0848, -6.8946, 2.9270, 3.9505, -6.3029, 2.6377};
  constexpr std::size_t shapes[][2] = {{1, 1}, {5, 3}, {16, 40}, {33, 17}, {70, 130}};
  Numbers numbers;
  Digest digest;
  for (const auto& [rows, columns] : shapes)
    for (const bool by_row : {false, true}) {
      const std::size_t size = rows * columns;
      const std::unique_ptr<T[]> matrix(new T[size]);
      for (std::size_t i = 0; i < size; ++i) matrix[i] = static_cast<T>(numbers.fraction() - 0.5);
      const std::unique_ptr<T[]> space(new T[table.orthogonalize_space(rows, columns)]);
      const NewtonSchulz how{rows, columns, triples, 2, 1.0, 1e-30, 0.5, by_row};
      table.orthogonalize[Compute<T>::index](how, matrix.get(), space.get());
      digest.add(matrix.get(), size);
    }
  return digest.state();
}

void line(const char* what, const char* name, const char* type, std::uint64_t digest) {
  std::printf("%s %s %s %016llx\n", what, name, type, static_cast<unsigned long long>(digest));
}

template <class T>
bool print(const Table& table) {
  const char* const type = TYPES[Compute<T>::index];
  bool same = true;
  for (int k = 0; k < table.operation_count; ++k) {
    const Operation& operation = table.operations[k];
    line("operation", operation.name, type, operation_digest<T>(operation));
    if (operation.kind != RULE) continue;
    const std::uint64_t digest = leaves_digest<T>(table, operation, 1);
    line("leaves", operation.name, type, digest);
    for (const int threads : {2, 5})
      same = same && leaves_digest<T>(table, operation, threads) == digest;
  }
  for (int k = 0; k < table.codec_count; ++k)
    line("codec", table.codecs[k].name, type, codec_digest<T>(table.codecs[k]));
  line("orthogonalize", "stacks", type, orthogonalize_digest<T>(table));
  return same;
}

}  // namespace

int main(int count, char** names) {
  std::vector<std::string> wanted(names + 1, names + count);
  if (wanted.empty())
    for (const Level& l : levels()) wanted.push_back(l.name);
  for (const std::string& name : wanted) {
    if (!force_level(name)) return std::fprintf(stderr, "no %s here\n", name.c_str()), 1;
    std::printf("# %s\n", name.c_str());
    const bool narrow = print<float>(*level().table), wide = print<double>(*level().table);
    if (!narrow || !wide)
      return std::fprintf(stderr, "%s: bits depend on threads\n", name.c_str()), 1;
  }
}
