// Activations of sums that are in memory already: one copy of their code serves every block of sums, where one in each
// block was most of a kernel's code. Included by kernels only; internal linkage.
#pragma once
#include "simd/activate.h"
#include "simd/registers.h"

namespace omniconv {
namespace {

template <class A> NOINLINE void activate_each(A* sums, int64_t rows, int64_t stride, int64_t vectors,
                                               Activation activation) {
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      A* at = sums + r * stride + v * L;
      store(at, activate<A>(load(at), activation));
    }
}

// `vectors` whole vectors of each of `rows` rows, `stride` elements apart.
template <class A> INLINE void activate_rows(A* sums, int64_t rows, int64_t stride, int64_t vectors,
                                             Activation activation) {
  if (activation != kNone) activate_each(sums, rows, stride, vectors, activation);
}

}  // namespace
}  // namespace omniconv
