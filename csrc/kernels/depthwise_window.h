// What the depthwise kernels share: where a window reads. Included by kernels only; internal linkage.
#pragma once
#include "kernels/depthwise.h"
#include "simd/activate.h"
#include "simd/vec.h"

namespace omniconv {
namespace {

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The input index that a position reads, or -1 where it reads a zero.
INLINE int64_t source(int64_t p, int64_t size, int64_t input_dilation, Mode mode) {
  if (input_dilation > 1) return p < 0 || p % input_dilation || p / input_dilation >= size ? -1 : p / input_dilation;
  if (p >= 0 && p < size) return p;
  switch (mode) {
    case kReflect: return p < 0 ? -p : 2 * (size - 1) - p;
    case kReplicate: return p < 0 ? 0 : size - 1;
    case kCircular: return p < 0 ? p + size : p - size;
    default: return -1;
  }
}

}  // namespace
}  // namespace omniconv
