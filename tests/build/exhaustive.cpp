// Compares codecs of two instruction sets over every input that there is, bit for bit, NaN
// included.
//
//   exhaustive CODEC LEVEL OTHER_LEVEL...      a line for each other level that differs
//
// Encoding: all 2^32 floats, 256 to a tile. In a tile of blocks the first element of each is the
// largest value that the format has at a scale of one, so that whatever is below it is rounded
// as it is. Decoding: all codes of 4, 8 and 16 bits, all 2^32 pairs.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu.hpp"

namespace {

using namespace fusedopt;

constexpr std::uint64_t ALL = std::uint64_t{1} << 32;

const Codec* find(const Table& table, const char* name) {
  for (int k = 0; k < table.codec_count; ++k)
    if (!std::strcmp(table.codecs[k].name, name)) return &table.codecs[k];
  return nullptr;
}

float float_of(std::uint64_t bits) {
  const std::uint32_t narrow = static_cast<std::uint32_t>(bits);
  float x;
  std::memcpy(&x, &narrow, sizeof x);
  return x;
}

struct Tile {
  alignas(64) unsigned char data[TILE * sizeof(double)];
  alignas(64) unsigned char aux[TILE * sizeof(float)];
  bool operator==(const Tile& other) const {
    return !std::memcmp(data, other.data, sizeof data) && !std::memcmp(aux, other.aux, sizeof aux);
  }
};

// Of a format whose blocks share a scale: what makes the scale one.
float largest(const char* name) {
  return std::strstr(name, "e4m3") ? 448.0f : std::strstr(name, "e5m3") ? 61440.0f : 1.0f;
}

// Any NaN is the same when decoded: only arithmetic sees it.
void one_nan(float* x) {
  for (std::size_t i = 0; i < TILE; ++i)
    if (std::isnan(x[i])) x[i] = std::nanf("");
}

class Comparison {
 public:
  Comparison(const char* name, const std::vector<const Level*>& levels) : name_(name) {
    for (const Level* level : levels) codecs_.push_back(find(*level->table, name));
    differs_ = std::vector<std::atomic<bool>>(levels.size());
  }

  // Of the floats [from, to).
  void encode(std::uint64_t from, std::uint64_t to) {
    const std::size_t block = codecs_[0]->block, lead = block > 1;
    alignas(64) float x[TILE];
    for (std::uint64_t bits = from; bits < to;) {
      for (std::size_t i = 0; i < TILE; ++i)
        x[i] = lead && i % block == 0 ? largest(name_) : float_of(bits++);
      Tile want = {};
      codecs_[0]->encode[F32](x, want.data, want.aux, TILE, bits);
      for (std::size_t k = 1; k < codecs_.size(); ++k) {
        Tile got = {};
        codecs_[k]->encode[F32](x, got.data, got.aux, TILE, bits);
        if (!(got == want)) differs_[k] = true;
        if (!codecs_[k]->copy[F32]) continue;
        // An array beside a parameter, and the elements beyond whole vectors.
        const std::size_t n = TILE - bits / TILE % 64;
        Tile copies[2] = {};
        codecs_[0]->copy[F32](x, copies[0].data, nullptr, n, 0);
        codecs_[k]->copy[F32](x, copies[1].data, nullptr, n, 0);
        if (!(copies[0] == copies[1])) differs_[k] = true;
      }
    }
  }

  // Of codes [from, to) of 16 bits, or of pairs of them, or of bytes at some scales.
  void decode(std::uint64_t from, std::uint64_t to) {
    const std::size_t bits = codecs_[0]->bits;
    for (std::uint64_t code = from; code < to; code += TILE) {
      Tile tile = {};
      for (std::size_t i = 0; i < TILE; ++i) {
        const std::uint16_t low = static_cast<std::uint16_t>(code + i);
        const std::uint16_t high = static_cast<std::uint16_t>((code + i) >> 16);
        if (bits == 16) std::memcpy(tile.data + 2 * i, codecs_[0]->aux ? &high : &low, 2);
        if (bits == 16) std::memcpy(tile.aux + 2 * i, &low, 2);
        if (bits < 16) tile.data[i] = static_cast<unsigned char>(i);
      }
      const float scale = std::ldexp(0.7f, static_cast<int>(code / TILE % 256) - 130);
      if (bits < 16)
        for (std::size_t k = 0; k < 2; ++k) std::memcpy(tile.aux + 4 * k, &scale, sizeof scale);
      // Bytes of nibbles make twice as many elements.
      for (std::size_t half = 0; half < (bits == 4 ? 2u : 1u); ++half) {
        const unsigned char* const data = tile.data + half * TILE / 2;
        const std::size_t n = TILE - code / TILE % 3 * 19;
        alignas(64) float want[TILE] = {}, got[TILE];
        codecs_[0]->decode[F32](data, tile.aux, want, n);
        one_nan(want);
        for (std::size_t k = 1; k < codecs_.size(); ++k) {
          std::memset(got, 0, sizeof got);
          codecs_[k]->decode[F32](data, tile.aux, got, n);
          one_nan(got);
          if (std::memcmp(got, want, sizeof got)) differs_[k] = true;
        }
      }
    }
  }

  template <class Act>
  void in_threads(std::uint64_t count, const Act& act) {
    const std::uint64_t parts = std::thread::hardware_concurrency() ? 2 : 1;
    std::vector<std::thread> threads;
    for (std::uint64_t part = 0; part < parts; ++part)
      threads.emplace_back([=] { act(count / parts * part, count / parts * (part + 1)); });
    for (std::thread& thread : threads) thread.join();
  }

  int report(const std::vector<const Level*>& levels) {
    int differing = 0;
    in_threads(ALL, [this](std::uint64_t a, std::uint64_t b) { encode(a, b); });
    for (std::size_t k = 1; k < levels.size(); ++k)
      if (differs_[k])
        ++differing, std::printf("%s: %s encodes otherwise\n", levels[k]->name, name_);
    for (std::atomic<bool>& one : differs_) one = false;
    in_threads(codecs_[0]->bits == 16 && codecs_[0]->aux ? ALL : 1 << 16,
               [this](std::uint64_t a, std::uint64_t b) { decode(a, b); });
    for (std::size_t k = 1; k < levels.size(); ++k)
      if (differs_[k])
        ++differing, std::printf("%s: %s decodes otherwise\n", levels[k]->name, name_);
    return differing;
  }

 private:
  const char* name_;
  std::vector<const Codec*> codecs_;
  std::vector<std::atomic<bool>> differs_;
};

}  // namespace

int main(int count, char** arguments) {
  std::vector<const Level*> chosen;
  for (int k = 2; k < count; ++k)
    for (const Level& level : levels())
      if (!std::strcmp(level.name, arguments[k])) chosen.push_back(&level);
  if (count < 3 || static_cast<int>(chosen.size()) != count - 2 ||
      !find(*chosen[0]->table, arguments[1])) {
    std::fprintf(stderr, "exhaustive CODEC LEVEL OTHER_LEVEL...\n");
    return 2;
  }
  return Comparison(arguments[1], chosen).report(chosen) ? 1 : 0;
}
