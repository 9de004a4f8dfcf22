// What one thread of a parallel region needs: scratch, and how denormal numbers are treated.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace omniconv {

// 64-byte aligned scratch that stays with its thread up to a cap; what is larger is given back after use.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    constexpr size_t kCap = size_t(4) << 20;
    if (bytes > kCap) {
      own_.reset(allocate(bytes));
      data_ = own_.get();
      return;
    }
    thread_local Block kept;
    thread_local size_t kept_bytes = 0;
    if (kept_bytes < bytes) {
      kept.reset();
      kept_bytes = 0;
      kept.reset(allocate(bytes));
      kept_bytes = bytes;
    }
    data_ = kept.get();
  }
  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Block = std::unique_ptr<void, Free>;
  static void* allocate(size_t bytes) {
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!p) throw std::bad_alloc();
    return p;
  }
  Block own_;
  void* data_;
};

// Denormal operands and results count as zero inside, so that they cannot slow a kernel down a hundredfold; the thread's own setting returns.
class Flush {
 public:
  explicit Flush(bool on) {
#if defined(__SSE__)
    before_ = _mm_getcsr();
    if (on) _mm_setcsr(before_ | 0x8040);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    if (on) __asm__ volatile("msr fpcr, %0" : : "r"(before_ | (1ul << 24)));
#else
    (void)on;
#endif
  }
  ~Flush() {
#if defined(__SSE__)
    _mm_setcsr(before_);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before_));
#endif
  }
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_;
#else
  unsigned long before_;
#endif
};

}  // namespace omniconv
