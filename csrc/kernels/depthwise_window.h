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

}  // namespace
}  // namespace omniconv
