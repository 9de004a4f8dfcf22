// The weights of a tile of positions, made from the kernels' numbers. Included by kernels only; internal linkage.
#pragma once
#include "kernels/depthwise_window.h"
#include "kernels/dynamic.h"
#include "simd/exponent.h"
#include "simd/part.h"
#include "simd/registers.h"

namespace omniconv {
namespace {

// Well mixed bits of 64.
INLINE uint64_t mix_bits(uint64_t x) {
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93u;
  x = (x ^ x >> 29) * 0xa0761d6478bd642fu;
  return x ^ x >> 32;
}

// Drops of a row of n numbers, the first of which is at position `from`: nothing is stored, and every pass draws the
// same.
template <class A> NOINLINE void drop(const DynamicGeometry& g, uint64_t row, int64_t from, int64_t n, A* numbers) {
  const uint64_t key = mix_bits(g.seed + mix_bits(row + 1));
  const uint32_t low = uint32_t(key), high = uint32_t(key >> 32), dropped = g.dropped;
  const A scale = A(g.scale);
  for (int64_t t = 0; t < n; ++t) {
    uint32_t x = uint32_t(from + t) * 0x9e3779b1u + low;
    x = (x ^ x >> 16) * 0x7feb352du ^ high;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x ^= x >> 16;
    numbers[t] *= x < dropped ? A(0) : scale;
  }
}

INLINE bool has_dropout(const DynamicGeometry& g) { return g.scale != 1; }

// Drops of head h's weights at positions [from, from + n), in rows.
template <class A>
void drop_weights(const DynamicGeometry& g, int64_t h, int64_t from, int64_t n, A* weights, int64_t stride) {
  for (int64_t i = 0; has_dropout(g) && i < g.kernel; ++i)
    drop(g, g.row + h * g.kernel + i, from, n, weights + i * stride);
}
// The same of the one column that serves all positions.
template <class A> void drop_column(const DynamicGeometry& g, int64_t h, A* column) {
  for (int64_t i = 0; has_dropout(g) && i < g.kernel; ++i) drop(g, g.row + h * g.kernel + i, 0, 1, column + i);
}

// The one column of head h as weights: column[0, K), and whole vectors beyond.
template <class E>
NOINLINE void make_column(const DynamicGeometry& g, int64_t h, const void* kernels,
                          typename Accumulator<E>::type* column) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const int64_t K = g.kernel;
  const E* numbers = (const E*)kernels + h * K;
  for (int64_t i = 0; i < K; i += L) store(column + i, load_part<A>(numbers + i, K - i));
  if (!g.softmax) return;
  A largest = column[0], sum = 0;
  for (int64_t i = 1; i < K; ++i) largest = column[i] > largest ? column[i] : largest;
  for (int64_t i = 0; i < K; i += L) store(column + i, exponential_below(load(column + i) - broadcast(largest)));
  for (int64_t i = 0; i < K; ++i) sum += column[i];
  const V share = broadcast(A(1) / sum);
  for (int64_t i = 0; i < K; i += L) store(column + i, load(column + i) * share);
}

// Weights of head h at positions [from, from + n), in rows, `stride` apart, of whole vectors; `largest` holds a number
// for each position.
template <class E>
NOINLINE void make_weights(const DynamicGeometry& g, int64_t h, const void* kernels, int64_t from, int64_t n,
                           typename Accumulator<E>::type* weights, int64_t stride,
                           typename Accumulator<E>::type* largest) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const int64_t K = g.kernel;
  const E* numbers = (const E*)kernels + h * K * g.positions + from;
  // row by row: of a column of 512·4 bytes a step, L1 holds 24
  for (int64_t i = 0; i < K; ++i)
    for (int64_t t = 0; t < n; t += L) {
      const V v = load_part<A>(numbers + i * g.positions + t, n - t);
      store(weights + i * stride + t, v);
      if (g.softmax) store(largest + t, i ? larger(v, load(largest + t)) : v);
    }
  for (int64_t t = 0; g.softmax && t < n; t += L) {
    const V m = load(largest + t);
    V sum{};
    for (A* at = weights + t; at < weights + K * stride; at += stride) {
      const V e = exponential_below(load(at) - m);
      sum += e;
      store(at, e);
    }
    const V share = A(1) / sum;
    for (A* at = weights + t; at < weights + K * stride; at += stride) store(at, load(at) * share);
  }
}

}  // namespace
}  // namespace omniconv
