#include "windows.hpp"

#include <algorithm>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#endif

namespace fusedopt {
namespace {

// Linux maps the cached neighbours of a page that is read, within aligned blocks of this size: what
// is dropped must reach as far, or each part would leave something behind. No page is larger.
constexpr std::size_t AROUND = 1 << 16;

}  // namespace

std::size_t Mapped::parts(const std::vector<Leaf>& leaves, int threads) const {
  std::size_t elements = 0, most = 0;  // bits of an element
  for (const Leaf& leaf : leaves) {
    std::size_t bits = 0;
    for (int k = 0; k < leaf.operand_count; ++k) {
      const Operand& operand = leaf.operands[k];
      if (contains(operand.data)) bits += operand.bits;
      if (contains(operand.aux)) bits += (operand.aux_bytes * 8 + TILE - 1) / TILE;
    }
    // A row may lie alone in its pages, where not all are touched.
    if (leaf.rows && leaf.elements < leaf.rows->elements && bits)
      bits += 8 * AROUND / std::max<std::size_t>(1, leaf.rows->length);
    elements += leaf.elements;
    most = std::max(most, bits);
  }
  const std::size_t each = std::max<std::size_t>(1, window / static_cast<std::size_t>(threads));
  return elements / 8 * most / each + 1;
}

void Advisor::add(const Leaf& leaf, std::size_t from, std::size_t to) {
  if (!leaf.rows) return add_range(leaf, from, to);
  const std::size_t length = leaf.rows->length;
  for (std::size_t k = from / length; k < to / length; ++k) {
    const std::size_t row = static_cast<std::size_t>(leaf.rows->rows[k]);
    add_range(leaf, row * length, (row + 1) * length);
  }
}

void Advisor::add_range(const Leaf& leaf, std::size_t from, std::size_t to) {
  for (int k = 0; k < leaf.operand_count; ++k) {
    const Operand& operand = leaf.operands[k];
    if (!(leaf.used >> k & 1)) continue;
    add_bytes(operand.data, from * operand.bits / 8, (to * operand.bits + 7) / 8);
    add_bytes(operand.aux, from * operand.aux_bytes / TILE,
              (to * operand.aux_bytes + TILE - 1) / TILE);
  }
}

// Bytes [from, to) of an array, which need not be in the block.
void Advisor::add_bytes(const char* array, std::size_t from, std::size_t to) {
  if (!mapped_.contains(array) || from == to) return;
  const std::size_t start = static_cast<std::size_t>(array - mapped_.data);
  from = (start + from) / AROUND * AROUND;
  to = std::min((start + to + AROUND - 1) / AROUND * AROUND, mapped_.bytes);
  if (from < begin_ || from > end_) {
    send();
    begin_ = from;
  }
  end_ = std::max(end_, to);
}

// Advice that is not taken costs memory or time, never bits: results are not looked at.
void Advisor::send() {
#if defined(__linux__)
  char* const data = mapped_.data + begin_;
  const std::size_t bytes = end_ - begin_;
  if (bytes && advice_ == Advice::READ_AHEAD) {
    madvise(data, bytes, MADV_WILLNEED);
  } else if (bytes) {
    // Nothing is lost: the pages stay in the file's cache, from where they are written.
    madvise(data, bytes, MADV_DONTNEED);
    sync_file_range(mapped_.file, static_cast<off_t>(begin_), static_cast<off_t>(bytes),
                    SYNC_FILE_RANGE_WRITE);
  }
#endif
  begin_ = end_ = 0;
}

}  // namespace fusedopt
