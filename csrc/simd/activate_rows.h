// Activations of sums that are in memory already: one copy of their code serves every block of sums, where one in each block was most of a
// kernel's code. Included by kernels only; internal linkage.
#pragma once
#include "simd/activate.h"
#include "simd/capability.h"

namespace omniconv {
namespace {

// `vectors` whole vectors of each of `rows` rows, `stride` elements apart.
template <class A> NOINLINE void activate_rows(A* sums, int64_t rows, int64_t stride, int64_t vectors, Activation activation) {
  constexpr int64_t L = Vec<A>::lanes;
  if (activation == kNone) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      A* at = sums + r * stride + v * L;
      store(at, activate<A>(load(at), activation));
    }
}

}  // namespace
}  // namespace omniconv
