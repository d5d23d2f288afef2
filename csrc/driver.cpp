#include "driver.hpp"

#include <algorithm>
#include <chrono>

#include "floating_point.hpp"
#include "parallel.hpp"
#include "thread_choice.hpp"
#include "windows.hpp"

namespace fusedopt {
namespace {

// All threads take a step of this many elements or more; for fewer see ThreadChoice.
constexpr std::size_t PLENTY = 1 << 21;
// There are several parts for each thread, so that a thread that was held up is waited for less.
constexpr std::size_t PARTS_PER_THREAD = 16;
// The bytes of the next leaf's arrays that are prefetched while a leaf is worked on.
constexpr std::size_t FETCHED = 256, LINE = 64;

inline void prefetch(const char* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 1);
#else
  (void)p;
#endif
}

// Elements [from, to) of a leaf's arrays; its inputs have them `ahead` further on. row: the number
// of their row among those that are touched.
struct Span {
  std::size_t from, to;
  std::ptrdiff_t ahead;
  std::size_t row = 0;
};

const void* scalars(const Step& step, const Span& span) {
  return static_cast<const char*>(step.scalars) + span.row * step.each;
}

void run_step(const Step& step, const Span& span, void* const* data, std::size_t n) {
  void* operands[MAX_OPERANDS];
  for (int k = 0; k < step.operand_count; ++k) operands[k] = data[step.operands[k]];
  step.run(operands, scalars(step, span), n);
}

char* element(const Operand& operand, std::size_t at, const Span& span) {
  if (operand.role == Role::INPUT) at += static_cast<std::size_t>(span.ahead);
  return operand.data + at * operand.bits / 8;
}

// The address of what the codec stores beside an element that begins a block.
char* beside(const Operand& operand, std::size_t at) {
  return operand.aux + at * operand.aux_bytes / TILE;
}

using Lanes = double[LANES];

// Several tiles go through a program at once, so that the scales of several blocks are found at
// once; in float32 an operand's are 4 KiB.
constexpr std::size_t BATCH = 4 * TILE;
// A rule's own loop, in float32, has fewer arrays in cache: 1 % less time with states in eight
// bits.
constexpr std::size_t DIRECT_BATCH = BATCH * sizeof(double) / sizeof(float);

// Decoded tiles. Not on the stack: 32 KiB are all that a thread may have there (OMP_STACKSIZE,
// threading.stack_size).
alignas(64) thread_local char decoded[MAX_OPERANDS][BATCH * sizeof(double)];

// Encodes elements [at, at + n) of an operand; random bits have a key for each tile.
void encode(const Operand& operand, const Span& span, const void* tiles, std::size_t at,
            std::size_t n) {
  const std::size_t each = operand.random ? TILE : n;
  const char* from = static_cast<const char*>(tiles);
  for (const std::size_t end = at + n; at < end; at += each, from += each * operand.random)
    operand.encode(from, element(operand, at, span), beside(operand, at), std::min(each, end - at),
                   subkey(operand.key, at / TILE));
}

// A batch at a time: decode, the program, encode. `from` is the start of a tile, or of a row.
void run_tiles(const Leaf& leaf, const Span& span, Lanes* lanes) {
  char (*const scratch)[BATCH * sizeof(double)] = decoded;
  void* tile[MAX_OPERANDS];
  for (std::size_t at = span.from; at < span.to; at += BATCH) {
    const std::size_t n = std::min(BATCH, span.to - at);
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
    for (int s = 0; s < leaf.step_count; ++s) run_step(leaf.steps[s], span, tile, n);
    for (int k = 0; k < leaf.operand_count; ++k) {
      const Operand& operand = leaf.operands[k];
      if ((leaf.written >> k & 1) && operand.encode) encode(operand, span, tile[k], at, n);
    }
  }
}

// A rule's loop over a leaf's arrays as they are stored. copy: of the parameter, or null.
struct Direct {
  DirectFunction run = nullptr;
  const Combination* formats = nullptr;
  const Operand* copy = nullptr;

  // Of operand k of the rule.
  const Conversion& format(int k) const {
    return k == 0 ? formats->parameter : formats->state[k > 2];
  }
};

// None where the program is more than a rule, or has no loop for these formats.
Direct direct(const Leaf& leaf) {
  const Step& step = leaf.steps[0];
  Direct result;
  const auto own = [&](int k) -> const Operand& { return leaf.operands[step.operands[k]]; };
  // For small leaves it takes as long to look through all combinations as to take the step.
  if (leaf.step_count != 1 || !step.direct || own(1).encode) return result;
  std::uint32_t rest = leaf.used;
  for (int k = 0; k < step.operand_count; ++k) rest &= ~(1u << step.operands[k]);
  for (int k = 0; k < leaf.operand_count; ++k) {
    if (!(rest >> k & 1)) continue;
    if (result.copy || leaf.operands[k].source != step.operands[0]) return result;
    result.copy = &leaf.operands[k];
  }
  for (int c = 0; c < COMBINATIONS; ++c) {
    const Combination& formats = *(result.formats = &step.combinations[c]);
    bool fits = step.direct[c] && own(1).decode == formats.gradient &&
                (result.copy ? result.copy->encode : nullptr) == formats.copy;
    for (int k = 0; k < step.operand_count; ++k) {
      const Conversion& format = result.format(k);
      fits = fits && (k == 1 || (own(k).decode == format.decode &&
                                 (format.tiled || own(k).encode == format.encode)));
    }
    if (fits) {
      result.run = step.direct[c];
      break;
    }
  }
  return result;
}

// Whole chunks, or whole tiles; returns where they end.
std::size_t run_direct(const Leaf& leaf, const Span& span, const Direct& direct) {
  const Step& step = leaf.steps[0];
  char (*const scratch)[BATCH * sizeof(double)] = decoded;
  const auto tiled = [&](int k) { return k != 1 && direct.format(k).tiled; };
  bool tiles = false;
  for (int k = 0; k < step.operand_count; ++k) tiles = tiles || tiled(k);
  const std::size_t unit = tiles ? TILE : CHUNK;
  const std::size_t end = span.from + (span.to - span.from) / unit * unit;
  Place places[MAX_OPERANDS + 1];
  for (std::size_t at = span.from, n; at < end; at += n) {
    n = tiles ? std::min(DIRECT_BATCH, end - at) : end - at;
    for (int k = 0; k < step.operand_count; ++k) {
      const Operand& operand = leaf.operands[step.operands[k]];
      places[k] = {element(operand, at, span), operand.aux ? beside(operand, at) : nullptr,
                   scratch[k]};
    }
    if (direct.copy)
      places[step.operand_count] = {element(*direct.copy, at, span), nullptr, nullptr};
    direct.run(places, scalars(step, span), n);
    for (int k = 0; k < step.operand_count; ++k)
      if (tiled(k)) encode(leaf.operands[step.operands[k]], span, scratch[k], at, n);
  }
  return end;
}

void run_span(const Leaf& leaf, const Span& span, Lanes* lanes) {
  void* data[MAX_OPERANDS];
  bool in_place = leaf.step_count == 1;
  Lanes* next = lanes;
  for (int k = 0; k < leaf.operand_count && in_place; ++k) {
    const Operand& operand = leaf.operands[k];
    if (!(leaf.used >> k & 1)) continue;
    data[k] = element(operand, span.from, span);
    if (operand.role == Role::SUMS) data[k] = next++;
    in_place = !operand.decode && !operand.encode;
  }
  // With nothing to decode or encode and nothing to keep in cache between operations, a tile may be
  // long.
  if (in_place) return run_step(leaf.steps[0], span, data, span.to - span.from);
  if (const Direct loop = direct(leaf); loop.run)
    run_tiles(leaf, {run_direct(leaf, span, loop), span.to, span.ahead, span.row}, lanes);
  else
    run_tiles(leaf, span, lanes);
}

// The sums of one segment after the other.
class Summing {
 public:
  explicit Summing(const Leaf& leaf) : leaf_(leaf) {
    for (int k = 0; k < leaf.operand_count; ++k)
      if (leaf.summed >> k & 1) {
        maximum_[count_] = leaf.maxima >> k & 1;
        sums_[count_++] = reinterpret_cast<double*>(leaf.operands[k].data);
      }
  }
  ~Summing() { finish(); }

  // Spans come in ascending order; those of a row that has its own sums are whole rows.
  void add(Span span) {
    const std::size_t origin = leaf_.by_row ? span.from : 0;
    const std::size_t first = leaf_.by_row ? span.row * segments(leaf_.rows->length) : 0;
    for (const std::size_t end = span.to; span.from < end; span.from = span.to) {
      const std::size_t at = span.from - origin, segment = first + at / SEGMENT;
      if (segment != segment_) {
        finish();
        for (int k = 0; k < count_; ++k) std::fill_n(lanes_[k], LANES, of_nothing(maximum_[k]));
        segment_ = segment;
      }
      span.to = std::min(end, origin + (at / SEGMENT + 1) * SEGMENT);
      // A tile's first element goes to the first lane, whichever is the turn of that element.
      turn(at % LANES);
      run_span(leaf_, span, lanes_);
      turn(LANES - at % LANES);
    }
  }

 private:
  void turn(std::size_t by) {
    if (by % LANES)
      for (int k = 0; k < count_; ++k) std::rotate(lanes_[k], lanes_[k] + by, lanes_[k] + LANES);
  }

  // All lanes, pairwise: in registers, since for small leaves the way through memory took longer
  // than what is added up.
  template <bool maximum, std::size_t count>
  static double fold(const double (&lanes)[count]) {
    if constexpr (count == 1) {
      return lanes[0];
    } else {
      double half[count / 2];
      for (std::size_t lane = 0; lane < count / 2; ++lane)
        half[lane] = of_both(maximum, lanes[lane], lanes[lane + count / 2]);
      return fold<maximum>(half);
    }
  }

  void finish() {
    if (segment_ == NONE) return;
    for (int k = 0; k < count_; ++k)
      sums_[k][segment_] = maximum_[k] ? fold<true>(lanes_[k]) : fold<false>(lanes_[k]);
  }

  static constexpr std::size_t NONE = ~std::size_t(0);
  const Leaf& leaf_;
  std::size_t segment_ = NONE;
  int count_ = 0;
  double* sums_[MAX_OPERANDS];
  bool maximum_[MAX_OPERANDS];
  alignas(64) Lanes lanes_[MAX_OPERANDS];  // the first `count_`: small leaves have no time for all
};

// The row that is the k-th to be touched.
Span row_span(const Rows& rows, std::size_t k) {
  const std::size_t from = static_cast<std::size_t>(rows.rows[k]) * rows.length;
  return {from, from + rows.length,
          (rows.from[k] - rows.rows[k]) * static_cast<std::ptrdiff_t>(rows.length), k};
}

// Whether a leaf's program is a single sum over arrays in the compute type.
bool sums_alone(const Leaf& leaf) {
  const Step& step = leaf.steps[0];
  if (leaf.step_count != 1 || !step.segment || leaf.rows) return false;
  for (int k = 1; k < step.operand_count; ++k)
    if (leaf.operands[step.operands[k]].decode) return false;
  return true;
}

// Small leaves have no time for lanes in memory.
void sum_segments(const Leaf& leaf, std::size_t from, std::size_t to) {
  const Step& step = leaf.steps[0];
  double* const sums = reinterpret_cast<double*>(leaf.operands[step.operands[0]].data);
  for (; from < to; from += SEGMENT) {
    void* data[MAX_OPERANDS];
    data[0] = sums + from / SEGMENT;
    for (int k = 1; k < step.operand_count; ++k)
      data[k] = element(leaf.operands[step.operands[k]], from, {from, to, 0});
    step.segment(data, step.scalars, std::min(SEGMENT, to - from));
  }
}

void run_leaf(const Leaf& leaf, std::size_t from, std::size_t to) {
  if (!leaf.rows && !leaf.summed) return run_span(leaf, {from, to, 0}, nullptr);
  if (sums_alone(leaf)) return sum_segments(leaf, from, to);
  if (!leaf.rows) return Summing(leaf).add({from, to, 0});
  const std::size_t first = from / leaf.rows->length, last = to / leaf.rows->length;
  if (!leaf.summed) {
    for (std::size_t k = first; k < last; ++k) run_span(leaf, row_span(*leaf.rows, k), nullptr);
  } else {
    Summing summing(leaf);
    for (std::size_t k = first; k < last; ++k) summing.add(row_span(*leaf.rows, k));
  }
}

// Prefetches the beginnings of a leaf's arrays while another is worked on: the processor's own
// prefetching begins anew with each array.
void fetch(const Leaf& leaf) {
  if (leaf.rows) return;
  for (int k = 0; k < leaf.operand_count; ++k) {
    const Operand& operand = leaf.operands[k];
    if (!(leaf.used >> k & 1) || !operand.data || operand.role == Role::SUMS) continue;
    const std::size_t bytes = std::min(FETCHED, leaf.elements * operand.bits / 8);
    for (std::size_t at = 0; at < bytes; at += LINE) prefetch(operand.data + at);
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
  if (leaf.summed && !leaf.by_row && k)
    while (k * rows.length < leaf.elements && shared(k)) ++k;
  return k * rows.length;
}

// The number of threads that a step over `elements` takes, of those that it may use.
int threads_for(std::size_t elements, int threads) {
  return elements < SERIAL ? 1 : std::max(1, std::min(threads, parallel_limit()));
}

std::size_t parts_for(std::size_t elements, int threads) {
  if (threads == 1) return 1;
  return std::max<std::size_t>(
      1, std::min<std::size_t>(elements / SMALLEST_PART, threads * PARTS_PER_THREAD));
}

// Calls visit(leaf, low, high) for all that is in a part.
template <class Visit>
void visit_part(const Work& work, std::size_t part, const Visit& visit) {
  const std::size_t from = share_begin(work.elements, work.parts, part);
  const std::size_t to = share_begin(work.elements, work.parts, part + 1);
  auto leaf = std::partition_point(work.leaves.begin(), work.leaves.end(),
                                   [from](const Leaf& l) { return l.start + l.elements <= from; });
  for (; leaf != work.leaves.end() && leaf->start < to; ++leaf) {
    if (leaf + 1 != work.leaves.end()) fetch(leaf[1]);
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

// Whether a part is no thread's next one.
bool begins_share(const Work& work, std::size_t part) {
  for (std::size_t k = 1; k <= work.threads; ++k)
    if (part == share_begin(work.parts, work.threads, k)) return true;
  return false;
}

void run_part(void* context, std::size_t part) {
  const Work& work = *static_cast<const Work*>(context);
  if (work.mapped && !begins_share(work, part + 1)) advise(work, part + 1, Advice::READ_AHEAD);
  visit_part(work, part, run_leaf);
  if (work.mapped) advise(work, part, Advice::WRITE_AND_DROP);
}

void run_on(std::vector<Leaf>& leaves, std::size_t elements, int threads, const Mapped* mapped) {
  if (threads == 1 && !mapped) {
    const DefaultControl control;
    for (auto leaf = leaves.begin(); leaf != leaves.end(); ++leaf) {
      if (leaf + 1 != leaves.end()) fetch(leaf[1]);
      if (leaf->elements) run_leaf(*leaf, 0, leaf->elements);
    }
    return;
  }
  Work work{leaves, elements, parts_for(elements, threads), mapped,
            static_cast<std::size_t>(threads)};
  if (mapped) work.parts = std::max(work.parts, mapped->parts(leaves, threads));
  work.threads = std::min(work.threads, work.parts);
  parallel_for(work.parts, threads, run_part, &work);
}

struct Touching {
  const std::vector<Extent>& extents;
  std::size_t elements, parts;
};

void touch_part(void* context, std::size_t part) {
  constexpr std::size_t PAGE = 4096;
  const Touching& work = *static_cast<const Touching*>(context);
  const std::size_t from = share_begin(work.elements, work.parts, part);
  const std::size_t to = share_begin(work.elements, work.parts, part + 1);
  for (const Extent& extent : work.extents) {
    const std::size_t low = std::max(from, extent.start);
    const std::size_t high = std::min(to, extent.start + extent.elements);
    if (low >= high) continue;
    const double each = static_cast<double>(extent.bytes) / static_cast<double>(extent.elements);
    const auto byte = [&](std::size_t at) {
      return static_cast<std::size_t>(static_cast<double>(at - extent.start) * each);
    };
    for (std::size_t at = byte(low); at < std::min(byte(high), extent.bytes); at += PAGE)
      extent.data[at] = 0;
  }
}

}  // namespace

void run(std::vector<Leaf>& leaves, int threads, const Mapped* mapped, ThreadChoice* choice) {
  std::size_t elements = 0;
  for (Leaf& leaf : leaves) {
    put(leaf.start, elements);
    elements += leaf.elements;
  }
  threads = threads_for(elements, threads);
  if (threads == 1 || !choice || mapped || elements >= PLENTY)
    return run_on(leaves, elements, threads, mapped);
  using Clock = std::chrono::steady_clock;
  const bool all = choice->all();
  const Clock::time_point before = Clock::now();
  run_on(leaves, elements, all ? threads : 1, mapped);
  choice->tell(all, std::chrono::duration<double>(Clock::now() - before).count());
}

void touch(const std::vector<Extent>& extents, std::size_t elements, int threads) {
  threads = threads_for(elements, threads);
  Touching work{extents, elements, parts_for(elements, threads)};
  parallel_for(work.parts, threads, touch_part, &work);
}

}  // namespace fusedopt
