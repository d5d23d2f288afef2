// The floating-point environment in which results are defined: rounding to the nearest, denormal
// numbers kept, no traps. A caller's own may differ, and that of a thread is what the thread that
// made it had: torch.set_flush_denormal and some libraries' start-up code change it.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#include <xmmintrin.h>
#elif defined(_M_ARM64)
#include <intrin.h>
#endif

namespace fusedopt {

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
// MXCSR: all exceptions masked; the flags below are left as they are.
constexpr std::uint64_t DEFAULT_CONTROL = 0x1f80, CONTROL_FLAGS = 0x3f;
inline std::uint64_t get_control() { return _mm_getcsr(); }
inline void set_control(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
constexpr std::uint64_t DEFAULT_CONTROL = 0, CONTROL_FLAGS = 0;
inline std::uint64_t get_control() {
  std::uint64_t value;
  asm volatile("mrs %0, fpcr" : "=r"(value));
  return value;
}
inline void set_control(std::uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#elif defined(_M_ARM64)
constexpr std::uint64_t DEFAULT_CONTROL = 0, CONTROL_FLAGS = 0;
inline std::uint64_t get_control() { return _ReadStatusReg(ARM64_FPCR); }
inline void set_control(std::uint64_t value) { _WriteStatusReg(ARM64_FPCR, value); }
#else
constexpr std::uint64_t DEFAULT_CONTROL = 0, CONTROL_FLAGS = 0;
inline std::uint64_t get_control() { return 0; }
inline void set_control(std::uint64_t) {}
#endif

// This thread has that environment as long as one of these lives, and then its own again.
class DefaultControl {
 public:
  DefaultControl() : own_(get_control()), changed_((own_ & ~CONTROL_FLAGS) != DEFAULT_CONTROL) {
    if (changed_) set_control(DEFAULT_CONTROL);
  }
  ~DefaultControl() {
    if (changed_) set_control(own_);
  }
  DefaultControl(const DefaultControl&) = delete;
  DefaultControl& operator=(const DefaultControl&) = delete;

 private:
  const std::uint64_t own_;
  const bool changed_;
};

}  // namespace fusedopt
