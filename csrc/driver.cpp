#include "driver.hpp"

#include <algorithm>

#include "parallel.hpp"
#include "windows.hpp"

namespace fusedopt {
namespace {

// There are several parts for each thread, so that a thread that was held up is waited for less.
constexpr std::size_t PARTS_PER_THREAD = 16;

void run_step(const Step& step, void* const* data, std::size_t n) {
  void* operands[MAX_OPERANDS];
  for (int k = 0; k < step.operand_count; ++k) operands[k] = data[step.operands[k]];
  step.run(operands, step.scalars, n);
}

// Elements [from, to) of a leaf's arrays; its inputs have them `ahead` further on.
struct Span {
  std::size_t from, to;
  std::ptrdiff_t ahead;
};

char* element(const Operand& operand, std::size_t at, const Span& span) {
  if (operand.role == Role::INPUT) at += static_cast<std::size_t>(span.ahead);
  return operand.data + at * operand.bits / 8;
}

// What the codec stores beside an element that begins a block.
char* beside(const Operand& operand, std::size_t at) {
  return operand.aux + at * operand.aux_bytes / TILE;
}

using Lanes = double[LANES];

// Tile by tile: decode, the program, encode. `from` is the start of a tile, or of a row.
void run_tiles(const Leaf& leaf, const Span& span, Lanes* lanes) {
  alignas(64) char scratch[MAX_OPERANDS][TILE * sizeof(double)];
  void* tile[MAX_OPERANDS];
  for (std::size_t at = span.from; at < span.to; at += TILE) {
    const std::size_t n = std::min(TILE, span.to - at);
    Lanes* next = lanes;
    for (int k = 0; k < leaf.operand_count; ++k) {
      const Operand& operand = leaf.operands[k];
      if (!(leaf.used >> k & 1)) continue;
      if (operand.role == Role::SCRATCH) {
        tile[k] = scratch[k];
      } else if (operand.role == Role::SUMS) {
        tile[k] = next++;
      } else if (operand.source >= 0) {
        tile[k] = tile[operand.source];
      } else if (operand.decode) {
        tile[k] = scratch[k];
        operand.decode(element(operand, at, span), beside(operand, at), tile[k], n);
      } else {
        tile[k] = element(operand, at, span);
      }
    }
    for (int s = 0; s < leaf.step_count; ++s) run_step(leaf.steps[s], tile, n);
    for (int k = 0; k < leaf.operand_count; ++k) {
      const Operand& operand = leaf.operands[k];
      if ((leaf.written >> k & 1) && operand.encode)
        operand.encode(tile[k], element(operand, at, span), beside(operand, at), n,
                       subkey(operand.key, at / TILE));
    }
  }
}

void run_span(const Leaf& leaf, const Span& span, Lanes* lanes) {
  void* data[MAX_OPERANDS];
  bool in_place = leaf.step_count == 1;
  for (int k = 0; k < leaf.operand_count && in_place; ++k) {
    const Operand& operand = leaf.operands[k];
    if (!(leaf.used >> k & 1)) continue;
    data[k] = element(operand, span.from, span);
    if (operand.role == Role::SUMS) data[k] = lanes[0];
    in_place = !operand.decode && !operand.encode;
  }
  // With nothing to decode or encode and nothing to keep in cache between operations, a tile may be
  // long.
  if (in_place)
    run_step(leaf.steps[0], data, span.to - span.from);
  else
    run_tiles(leaf, span, lanes);
}

// The sums of one segment after the other.
class Summing {
 public:
  explicit Summing(const Leaf& leaf) : leaf_(leaf) {}
  ~Summing() { finish(); }

  // Spans come in ascending order.
  void add(Span span) {
    for (const std::size_t end = span.to; span.from < end; span.from = span.to) {
      const std::size_t segment = span.from / SEGMENT;
      if (segment != segment_) finish();
      segment_ = segment;
      span.to = std::min(end, (segment + 1) * SEGMENT);
      // A tile's first element goes to the first lane, whichever is the turn of that element.
      turn(span.from % LANES);
      run_span(leaf_, span, lanes_);
      turn(LANES - span.from % LANES);
    }
  }

 private:
  void turn(std::size_t by) {
    if (by % LANES)
      for (Lanes& lanes : lanes_) std::rotate(lanes, lanes + by, lanes + LANES);
  }

  void finish() {
    int next = 0;
    for (int k = 0; k < leaf_.operand_count && segment_ != NONE; ++k) {
      if (!(leaf_.summed >> k & 1)) continue;
      double* const sums = lanes_[next++];
      for (std::size_t half = LANES / 2; half; half /= 2)
        for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
      reinterpret_cast<double*>(leaf_.operands[k].data)[segment_] = sums[0];
      std::fill_n(sums, LANES, 0.0);
    }
  }

  static constexpr std::size_t NONE = ~std::size_t(0);
  const Leaf& leaf_;
  std::size_t segment_ = NONE;
  alignas(64) Lanes lanes_[MAX_OPERANDS] = {};
};

// The row that is the k-th to be touched.
Span row_span(const Rows& rows, std::size_t k) {
  const std::size_t from = static_cast<std::size_t>(rows.rows[k]) * rows.length;
  return {from, from + rows.length,
          (rows.from[k] - rows.rows[k]) * static_cast<std::ptrdiff_t>(rows.length)};
}

void run_leaf(const Leaf& leaf, std::size_t from, std::size_t to) {
  if (!leaf.rows && !leaf.summed) return run_span(leaf, {from, to, 0}, nullptr);
  if (!leaf.rows) return Summing(leaf).add({from, to, 0});
  const std::size_t first = from / leaf.rows->length, last = to / leaf.rows->length;
  if (!leaf.summed) {
    for (std::size_t k = first; k < last; ++k) run_span(leaf, row_span(*leaf.rows, k), nullptr);
  } else {
    Summing summing(leaf);
    for (std::size_t k = first; k < last; ++k) summing.add(row_span(*leaf.rows, k));
  }
}

struct Work {
  const std::vector<Leaf>& leaves;
  std::size_t elements;  // of all leaves
  std::size_t parts;
  const Mapped* mapped;
  std::size_t threads;
};

// Cuts fall on tiles of their leaf, so that no tile is shared between two threads; or on rows, or
// on segments that are summed.
std::size_t cut(const Leaf& leaf, std::size_t position) {
  if (position <= leaf.start) return 0;
  if (position >= leaf.start + leaf.elements) return leaf.elements;
  const std::size_t at = position - leaf.start;
  if (!leaf.rows) return leaf.summed ? at / SEGMENT * SEGMENT : at / TILE * TILE;
  const Rows& rows = *leaf.rows;
  std::size_t k = at / rows.length;
  const auto shared = [&rows](std::size_t next) {
    return row_span(rows, next).from / SEGMENT == (row_span(rows, next - 1).to - 1) / SEGMENT;
  };
  if (leaf.summed && k)
    while (k * rows.length < leaf.elements && shared(k)) ++k;
  return k * rows.length;
}

// Calls visit(leaf, low, high) for all that is in a part.
template <class Visit>
void visit_part(const Work& work, std::size_t part, const Visit& visit) {
  // Two divisions instead of part * elements / parts: that product could overflow.
  const std::size_t each = work.elements / work.parts, rest = work.elements % work.parts;
  const std::size_t from = part * each + std::min(part, rest);
  const std::size_t to = from + each + (part < rest);
  auto leaf = std::partition_point(work.leaves.begin(), work.leaves.end(),
                                   [from](const Leaf& l) { return l.start + l.elements <= from; });
  for (; leaf != work.leaves.end() && leaf->start < to; ++leaf) {
    const std::size_t low = cut(*leaf, from), high = cut(*leaf, to);
    if (low < high) visit(*leaf, low, high);
  }
}

void advise(const Work& work, std::size_t part, Advice advice) {
  Advisor advisor(*work.mapped, advice);
  visit_part(work, part, [&](const Leaf& leaf, std::size_t low, std::size_t high) {
    advisor.add(leaf, low, high);
  });
}

void run_part(void* context, std::size_t part) {
  const Work& work = *static_cast<const Work*>(context);
  // Parts are handed out in order: the one that this thread will get next is about so far ahead.
  if (work.mapped && part + work.threads < work.parts)
    advise(work, part + work.threads, Advice::READ_AHEAD);
  visit_part(work, part, run_leaf);
  if (work.mapped) advise(work, part, Advice::WRITE_AND_DROP);
}

}  // namespace

void run(std::vector<Leaf>& leaves, int threads, const Mapped* mapped) {
  std::size_t elements = 0;
  for (Leaf& leaf : leaves) {
    leaf.start = elements;
    elements += leaf.elements;
  }
  threads = std::max(1, std::min(threads, parallel_limit()));
  if (elements < SERIAL) threads = 1;
  if (threads == 1 && !mapped) {
    for (const Leaf& leaf : leaves)
      if (leaf.elements) run_leaf(leaf, 0, leaf.elements);
    return;
  }
  Work work{leaves, elements, 1, mapped, static_cast<std::size_t>(threads)};
  if (threads > 1)
    work.parts = std::max<std::size_t>(
        1, std::min<std::size_t>(elements / SMALLEST_PART, threads * PARTS_PER_THREAD));
  if (mapped) work.parts = std::max(work.parts, mapped->parts(leaves, threads));
  parallel_for(work.parts, threads, run_part, &work);
}

}  // namespace fusedopt
