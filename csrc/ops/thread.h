// How the work of a call is shared out among threads, and what each of them needs: scratch, and how denormal numbers
// are treated.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "ops/error.h"
#include "simd/denormals.h"

namespace omniconv {

// 64-byte aligned scratch that stays with its thread up to a cap; what is larger is freed after use.
class Scratch {
 public:
  Scratch(const char* op, size_t bytes) {
    constexpr size_t kCap = size_t(4) << 20;
    if (bytes > kCap) {
      own_ = allocate(op, bytes);
      data_ = own_.get();
      return;
    }
    thread_local Block kept;
    thread_local size_t kept_bytes = 0;
    if (kept_bytes < bytes) {
      kept.reset();
      kept_bytes = 0;
      kept = allocate(op, bytes);
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
  static Block allocate(const char* op, size_t bytes) {
    Block block(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (!block)
      fail(op, "a thread's scratch of " + std::to_string(bytes) + " bytes must fit into memory",
           "an allocation failure");
    return block;
  }
  Block own_;
  void* data_;
};

// Returns how many units of so many multiply-accumulates make a part worth a thread: about ten microseconds.
inline int64_t grain_of(int64_t macs) { return std::max<int64_t>(1, 200000 / std::max<int64_t>(macs, 1)); }

// The work of a call: units that do not depend on each other.
struct Work {
  int64_t units, grain;  // a thread takes about `grain` units or more
  size_t scratch_bytes;  // of a thread
  bool flush_denormals;
};

// Calls f(first, last, scratch) for parts of the units, in torch's threads.
template <class F> void for_each_part(const char* op, const Work& work, const F& f) {
  parallel_for(work.units, work.grain, [&](int64_t first, int64_t last) {
    const ScopedFlushDenormals denormals(work.flush_denormals);
    const Scratch scratch(op, work.scratch_bytes);
    f(first, last, scratch.data());
  });
}

}  // namespace omniconv
