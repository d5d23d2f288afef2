// The limit of an elementwise step: a sweep with its reads and writes and next to no arithmetic.
#include <omp.h>

#include <cstddef>
#include <utility>

namespace {

constexpr int MOST_READ = 2, MOST_WRITTEN = 5;

template <class T, std::size_t>
using Each = T;

// Arrays that are only read, then arrays that are read and written. With c = 0, unknown to the
// compiler, every array keeps its values, so that other contenders can go on with them.
template <class T, class Read, class Written>
struct Sweep;
template <class T, std::size_t... R, std::size_t... W>
struct Sweep<T, std::index_sequence<R...>, std::index_sequence<W...>> {
  static void loop(std::size_t n, T c, const Each<T, R>* __restrict... read,
                   Each<T, W>* __restrict... written) {
    for (std::size_t i = 0; i < n; ++i) {
      const T sum = c * ((read[i] + ... + T(0)) + (written[i] + ...));
      ((written[i] += sum), ...);
    }
  }
  static void block(void* const* arrays, std::size_t n, double c) {
    loop(n, static_cast<T>(c), static_cast<const T*>(arrays[R])...,
         static_cast<T*>(arrays[sizeof...(R) + W])...);
  }
};

using Block = void (*)(void* const*, std::size_t, double);

template <class T, std::size_t R, std::size_t... W>
Block with_written(std::size_t written, std::index_sequence<W...>) {
  Block found = nullptr;
  ((written == W + 1
        ? void(found =
                   Sweep<T, std::make_index_sequence<R>, std::make_index_sequence<W + 1>>::block)
        : void()),
   ...);
  return found;
}

template <class T, std::size_t... R>
Block find(std::size_t read, std::size_t written, std::index_sequence<R...>) {
  Block found = nullptr;
  ((read == R ? void(found = with_written<T, R>(written, std::make_index_sequence<MOST_WRITTEN>()))
              : void()),
   ...);
  return found;
}

template <class T>
Block find(std::size_t read, std::size_t written) {
  return find<T>(read, written, std::make_index_sequence<MOST_READ + 1>());
}

}  // namespace

// arrays: for each block its `read + written` pointers; sizes: elements of each block. Returns 0,
// or 1 where there is no sweep over so many arrays of such elements.
extern "C" int sweep(std::size_t itemsize, std::size_t read, std::size_t written,
                     std::ptrdiff_t blocks, void* const* arrays, const std::size_t* sizes, double c,
                     int threads) {
  const Block run = itemsize == sizeof(float)    ? find<float>(read, written)
                    : itemsize == sizeof(double) ? find<double>(read, written)
                                                 : nullptr;
  if (!run) return 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
  for (std::ptrdiff_t k = 0; k < blocks; ++k)
    run(arrays + static_cast<std::size_t>(k) * (read + written), sizes[k], c);
  return 0;
}

// The same for arrays of several element sizes: bytes that are read, updated or only written, tile
// by tile. streams: for each block pointer, bytes of a tile and kind (0 read, 1 updated, 2 written)
// of each; tiles: of each block.
extern "C" void sweep_streams(std::ptrdiff_t blocks, std::size_t streams, char* const* pointers,
                              const std::size_t* bytes, const int* kinds, const std::size_t* tiles,
                              unsigned c, int threads, unsigned* seen) {
  unsigned total = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : total)
  for (std::ptrdiff_t k = 0; k < blocks; ++k)
    for (std::size_t t = 0; t < tiles[k]; ++t)
      for (std::size_t s = 0; s < streams; ++s) {
        const std::size_t words = bytes[s] / sizeof(unsigned);
        unsigned* const word = reinterpret_cast<unsigned*>(
            pointers[static_cast<std::size_t>(k) * streams + s] + t * bytes[s]);
        unsigned sum = 0;
        if (kinds[s] == 0)
          for (std::size_t i = 0; i < words; ++i) sum += word[i];
        else if (kinds[s] == 1)
          for (std::size_t i = 0; i < words; ++i) word[i] += c;
        else
          for (std::size_t i = 0; i < words; ++i) word[i] = c;
        total += sum;
      }
  *seen = total;
}
