// How the processor treats denormal numbers, which can slow a kernel down a hundredfold.
#pragma once
#include <cstdint>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace omniconv {
namespace {

// The control register of this thread's floating-point arithmetic; where none is known, kFlushDenormals asks for
// nothing.
#if defined(__SSE__)
constexpr uint64_t kFlushDenormals = 0x8040;  // results (FTZ) and operands (DAZ)
inline uint64_t float_control() { return _mm_getcsr(); }
inline void set_float_control(uint64_t bits) { _mm_setcsr(unsigned(bits)); }
#elif defined(__aarch64__)
constexpr uint64_t kFlushDenormals = 1 << 24;  // FZ: results and operands
inline uint64_t float_control() {
  uint64_t bits;
  __asm__ volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
inline void set_float_control(uint64_t bits) { __asm__ volatile("msr fpcr, %0" : : "r"(bits)); }
#else
constexpr uint64_t kFlushDenormals = 0;
inline uint64_t float_control() { return 0; }
inline void set_float_control(uint64_t) {}
#endif

// Makes denormal operands and results count as zero while it lives, if asked to; then the thread's own setting returns.
class ScopedFlushDenormals {
 public:
  explicit ScopedFlushDenormals(bool on) : saved_(float_control()) {
    if (on) set_float_control(saved_ | kFlushDenormals);
  }
  ~ScopedFlushDenormals() { set_float_control(saved_); }
  ScopedFlushDenormals(const ScopedFlushDenormals&) = delete;
  ScopedFlushDenormals& operator=(const ScopedFlushDenormals&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace
}  // namespace omniconv
