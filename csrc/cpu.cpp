#include "cpu.hpp"

#include <atomic>
#include <cstdint>

// The number of levels of x86-64 in this build, the baseline included; undefined elsewhere.
#if defined(FUSEDOPT_X86_LEVELS)
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fusedopt {

extern const Table table_baseline;

namespace {

bool always() { return true; }

#if defined(FUSEDOPT_X86_LEVELS)

struct Registers {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(std::uint32_t leaf, std::uint32_t part = 0) {
  Registers r;
#if defined(_MSC_VER)
  int v[4];
  __cpuid(v, 0);
  if (static_cast<std::uint32_t>(v[0]) < leaf && leaf < 0x80000000u) return r;
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(part));
  r.a = v[0], r.b = v[1], r.c = v[2], r.d = v[3];
#else
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return Registers();
#endif
  return r;
}

// Which register files the operating system saves: without that, the instructions fault.
std::uint64_t saved_registers() {
  constexpr std::uint32_t osxsave = 1u << 27;
  if (!(cpuid(1).c & osxsave)) return 0;
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

bool all(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }

constexpr std::uint32_t bit(int n) { return std::uint32_t{1} << n; }

// The x86-64 psABI's level 3: FMA, MOVBE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT.
bool has_v3() {
  return all(cpuid(1).c, bit(12) | bit(22) | bit(28) | bit(29)) &&
         all(cpuid(7).b, bit(3) | bit(5) | bit(8)) && all(cpuid(0x80000001u).c, bit(5)) &&
         all(saved_registers(), 0x6);
}

// Level 4: AVX-512 F, DQ, CD, BW, VL.
bool has_v4() {
  return has_v3() && all(cpuid(7).b, bit(16) | bit(17) | bit(28) | bit(30) | bit(31)) &&
         all(saved_registers(), 0xe6);
}

#if FUSEDOPT_X86_LEVELS > 3
// And what its successors brought: VBMI, BF16. (Leaf 7 says in `a` how many parts it has.)
bool has_v4_bf16() {
  return has_v4() && all(cpuid(7).c, bit(1)) && cpuid(7).a >= 1 && all(cpuid(7, 1).a, bit(5));
}
#endif

#endif

}  // namespace

#if defined(FUSEDOPT_X86_LEVELS)
extern const Table table_x86_v3;
extern const Table table_x86_v4;
#if FUSEDOPT_X86_LEVELS > 3
extern const Table table_x86_v4_bf16;
#endif
#endif

const std::vector<Level>& levels() {
  static const std::vector<Level> supported = [] {
    const Level all_levels[] = {
        {"baseline", &table_baseline, always},
#if defined(FUSEDOPT_X86_LEVELS)
        {"x86_v3", &table_x86_v3, has_v3},
        {"x86_v4", &table_x86_v4, has_v4},
#if FUSEDOPT_X86_LEVELS > 3
        {"x86_v4_bf16", &table_x86_v4_bf16, has_v4_bf16},
#endif
#endif
    };
    std::vector<Level> here;
    for (const Level& l : all_levels)
      if (l.supported()) here.push_back(l);
    return here;
  }();
  return supported;
}

namespace {
std::atomic<const Level*> chosen{nullptr};
}

const Level& level() {
  const Level* l = chosen.load(std::memory_order_acquire);
  return l ? *l : levels().back();
}

bool force_level(const std::string& name) {
  for (const Level& l : levels())
    if (name == l.name) {
      chosen.store(&l, std::memory_order_release);
      return true;
    }
  return false;
}

bool has_amx() {
#if defined(FUSEDOPT_X86_LEVELS) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request = 0x1023, tile_data = 18;
  return all(cpuid(7).d, bit(22) | bit(24)) && all(saved_registers(), 0x60000) &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace fusedopt
