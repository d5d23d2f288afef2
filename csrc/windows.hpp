// States in a file: of a mapped block, a step has a window in memory at a time.
#pragma once
#include <cstddef>
#include <vector>

#include "driver.hpp"

namespace fusedopt {

// A block of memory that is mapped, shared, from a file, from its first byte on.
struct Mapped {
  char* data = nullptr;
  std::size_t bytes = 0;
  int file = -1;
  std::size_t window = 0;  // bytes that may be in memory at a time

  bool contains(const char* p) const { return p >= data && p < data + bytes; }
  // The number of parts into which all elements are cut, if each thread has one in memory.
  std::size_t parts(const std::vector<Leaf>& leaves, int threads) const;
};

enum class Advice { READ_AHEAD, WRITE_AND_DROP };

// Advises the system on what is mapped of parts of leaves. Neighbouring ranges are joined, so that
// many small leaves are few calls; what is pending goes out at the end.
class Advisor {
 public:
  Advisor(const Mapped& mapped, Advice advice) : mapped_(mapped), advice_(advice) {}
  ~Advisor() { send(); }
  Advisor(const Advisor&) = delete;
  Advisor& operator=(const Advisor&) = delete;

  // Notes that elements [from, to) of a leaf are touched.
  void add(const Leaf& leaf, std::size_t from, std::size_t to);

 private:
  void add_range(const Leaf& leaf, std::size_t from, std::size_t to);
  void add_bytes(const char* array, std::size_t from, std::size_t to);
  void send();

  const Mapped& mapped_;
  const Advice advice_;
  std::size_t begin_ = 0, end_ = 0;  // bytes of the block
};

}  // namespace fusedopt
