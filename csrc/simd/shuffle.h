// Lanes of two vectors in an order that is known when compiled. Included by kernels only; internal linkage.
#pragma once
#include <utility>

#include "simd/vec.h"

namespace {

template <int... I> using Indices = std::integer_sequence<int, I...>;

// Lane i of the result is the I[i]-th of the lanes of a followed by those of b. GCC has __builtin_shufflevector from 12
// on only, Clang no
// __builtin_shuffle.
template <class V, int... I> INLINE V shuffle(V a, V b, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  typedef decltype(a < b) Mask;
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

template <class V> using Lanes = std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>;

template <class V, int... I> INLINE V even_lanes(V a, V b, Indices<I...>) { return shuffle(a, b, Indices<2 * I...>{}); }
template <class V, int... I> INLINE V odd_lanes(V a, V b, Indices<I...>) {
  return shuffle(a, b, Indices<2 * I + 1 ...>{});
}
template <class V, int FROM, int... I> INLINE V interleaved(V a, V b, Indices<I...>) {
  return shuffle(a, b, Indices<FROM + I / 2 + I % 2 * int(sizeof...(I))...>{});
}

// Every second lane of two vectors, from the first on, or from the second.
template <class V> INLINE V even_lanes(V a, V b) { return even_lanes(a, b, Lanes<V>{}); }
template <class V> INLINE V odd_lanes(V a, V b) { return odd_lanes(a, b, Lanes<V>{}); }
// Lanes of two vectors in turn: of their lower halves, or of their upper ones.
template <class V> INLINE V interleave_low(V a, V b) { return interleaved<V, 0>(a, b, Lanes<V>{}); }
template <class V> INLINE V interleave_high(V a, V b) {
  return interleaved<V, int(sizeof(V) / sizeof(V{}[0])) / 2>(a, b, Lanes<V>{});
}

}  // namespace
