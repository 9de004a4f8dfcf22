// Lightweight convolution of channels-last whose rows are read where they lie. Included by kernels only; internal
// linkage.
//
// The rows that a block of outputs meets are found through a pointer a row (zeros for pads and masked positions). Lines
// of rows that lie a power of two apart fall into one set of L1, so that a vector of half a line would fetch its line
// twice: such outputs are put together in rows before they are written (AVX2, N8 C1024 T256 K7: 2.66 ms and 1.66).
// Whole lines are written where they belong (AVX-512, N128 C512 T25 K15, kernels alone: 0.79 ms and 0.63).
#pragma once
#include "kernels/lightweight_tile.h"

namespace omniconv {
namespace {

// Vectors are half a line and taps many: then each half is fetched for every 4 taps, and a copy is faster (AVX2,
// float32, N8 C1024 T30 K31: 0.39 ms and 0.29 copied; bfloat16, which is widened as it is copied, 2.3 and 8.4 at N8
// C512 T512 K31). Where an instruction set has no conversion of half types, every element is converted once, by the
// copy.
template <class E> bool reads_in_place(const LightweightGeometry& g) {
  typedef typename Accumulator<E>::type A;
  const bool halves = sizeof(E) < sizeof(A), few_fetches = kVectorIsLine || halves || g.kernel <= 8;
  return (kConvertsHalves || !halves) && few_fetches && g.x_channel == 1 && g.y_channel == 1 && g.dilation == 1 &&
         g.channels >= Vec<A>::lanes;
}

// Taps [i, i + Q) of P sums of a vector of channels: a row is loaded once for all the taps that meet it.
template <class E, class A, int P, int Q>
INLINE void add_taps_of_rows(typename Vec<A>::V* sum, const E* const* row, int64_t c, const A* w) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V weight[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) weight[q] = in_register(load(w + q * L));
#pragma GCC unroll 32
  for (int s = 0; s < P + Q - 1; ++s) {
    const V at = in_register(load(row[s] + c));
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
      if (s - q >= 0 && s - q < P) sum[s - q] += weight[q] * at;
  }
}

// P outputs of one vector of channels, from K taps; weights (K, L).
template <class E, class A, int P>
INLINE void add_rows(typename Vec<A>::V* sum, const E* const* row, int64_t c, const A* w, int64_t K) {
  constexpr int L = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + kTaps <= K; i += kTaps) add_taps_of_rows<E, A, P, kTaps>(sum, row + i, c, w + i * L);
  if (kTaps > 4 && i + 4 <= K) {
    add_taps_of_rows<E, A, P, 4>(sum, row + i, c, w + i * L);
    i += 4;
  }
  if (K - i == 3) add_taps_of_rows<E, A, P, 3>(sum, row + i, c, w + i * L);
  else if (K - i == 2) add_taps_of_rows<E, A, P, 2>(sum, row + i, c, w + i * L);
  else if (K - i == 1) add_taps_of_rows<E, A, P, 1>(sum, row + i, c, w + i * L);
}

// What the blocks of outputs of one call share.
template <class E, class A> struct RowCall {
  int64_t channels, vectors;
  const A* const* weights;  // of each vector of channels: (K, L)
  const A* bias;            // of these channels, or null
  OutputTile to;
  A* staging;  // sums that are put together before they are written
};

constexpr int64_t kStagedVectors = kVectorIsLine ? 1 : 1024 / VECTOR_BYTES;  // of channels: rows of 1 KB

// Outputs [t, t + n), n <= P, of all channels; taps outside [from, to) meet nothing but zeros. K taps, or 0 for any
// number.
template <class E, class A, int P, int K>
NOINLINE void row_block(const RowCall<E, A>& s, int64_t t, int64_t n, const E* const* row, int64_t from, int64_t to) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  // in locals: of `s` every field would be read again after a store
  const int64_t vectors = s.vectors, channels = s.channels;
  const A* const* const weights = s.weights;
  const A* const biases = s.bias;
  A* const staging = s.staging;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = min64(v * L, channels - L);  // the last vector goes over some channels twice
    const V bias = biases ? load(biases + c) : V{};
    V sum[P];
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) sum[j] = bias;
    if constexpr (K > 0) add_taps_of_rows<E, A, P, K>(sum, row, c, weights[v]);
    else add_rows<E, A, P>(sum, row + from, c, weights[v] + from * L, to - from);
    if constexpr (kVectorIsLine && sizeof(E) == sizeof(A))
      if (s.to.direct) {
        A* y = (A*)s.to.y + t * s.to.step + c;
#pragma GCC unroll 16
        for (int j = 0; j < P; ++j)
          if (j < n) store(y + j * s.to.step, sum[j]);
        continue;
      }
    A* staged = staging + v % kStagedVectors * L;
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) store(staged + j * kStagedVectors * L, sum[j]);
    if (v % kStagedVectors == kStagedVectors - 1 || v == vectors - 1) {
      const int64_t first = v / kStagedVectors * kStagedVectors;
      store_rows<E>(staging, kStagedVectors * L, t, n, first * L, v + 1 - first, channels, s.to);
    }
  }
}

template <class E, class A> using RowBlock = void (*)(const RowCall<E, A>&, int64_t, int64_t, const E* const*, int64_t,
                                                      int64_t);

// K of 3, 5 and 7, which networks have, are each taken at once; float64 has one body.
template <class E, class A, int P> RowBlock<E, A> row_block_of(int64_t K) {
  if constexpr (sizeof(E) < 8) {
    if (K == 3) return row_block<E, A, P, 3>;
    if (K == 5) return row_block<E, A, P, 5>;
    if (K == 7) return row_block<E, A, P, 7>;
  }
  return row_block<E, A, P, 0>;
}

template <class E>
void forward_rows(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t t0, int64_t t1, const E* x,
                  const typename Accumulator<E>::type* weight, const typename Accumulator<E>::type* bias,
                  const uint8_t* mask, const uint8_t* zeroed, E* y, void* scratch) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t channels = c1 - c0, vectors = (channels + L - 1) / L, taps = g.kernel;
  A* table = (A*)scratch;
  const A** weights = (const A**)(table + vectors * taps * L);
  const E** row = (const E**)(weights + vectors);
  E* zeros = (E*)(row + kBlock + taps - 1);
  __builtin_memset(zeros, 0, channels * sizeof(E));
  int64_t head = -1;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = c0 + min64(v * L, channels - L), before = head;
    if (before >= 0 && c / g.group == before && (c + L - 1) / g.group == before) {
      weights[v] = weights[v - 1];
      continue;
    }
    expand_weights(g, weight, c, L, table, head);
    weights[v] = table;
    table += taps * L;
  }
  A staging[kBlock * kStagedVectors * L] __attribute__((aligned(64)));
  const bool direct = g.activation == kNone && !zeroed;
  const RowCall<E, A> call{channels,
                           vectors,
                           weights,
                           bias ? bias + c0 : nullptr,
                           {(char*)(y + c0), g.y_step, 1, L, zeroed, 1, g.activation, direct},
                           staging};
  const RowBlock<E, A> block4 = row_block_of<E, A, 4>(taps), block8 = row_block_of<E, A, 8>(taps);
  const RowBlock<E, A> block12 = row_block_of<E, A, (kBlock == 16 ? 12 : 8)>(taps),
                       block16 = row_block_of<E, A, kBlock>(taps);
  for (int64_t t = t0; t < t1;) {
    const int64_t rest = t1 - t;
    // as few as possible beyond the end: 24 are 12 and 12
    const int P = kBlock == 8                              ? (rest > 4 ? 8 : 4)
                  : rest > 24 || (rest > 12 && rest <= 16) ? 16
                  : rest > 8                               ? 12
                  : rest > 4                               ? 8
                                                           : 4;
    const int64_t n = min64(P, rest);
    int64_t first = P + taps - 1, last = 0;  // rows that are not zeros
    for (int64_t r = 0; r < P + taps - 1; ++r) {
      const int64_t p = r < n + taps - 1 ? source(t - g.before + r, g.length, 1, g.mode) : -1;
      const bool zero = p < 0 || (mask && mask[p]);
      row[r] = zero ? zeros : x + p * g.x_step + c0;
      if (!zero) {
        if (first > r) first = r;
        last = r;
      }
    }
    int64_t from = 0, to = taps;
    if (g.finite && taps > 8) {  // a tap that meets no other row adds nothing
      from = min64(max64(0, first - P + 1), taps);
      to = max64(from, min64(taps, last + 1));
    }
    (P == 16 ? block16 : P == 12 ? block12 : P == 8 ? block8 : block4)(call, t, n, row, from, to);
    t += n;
  }
}

}  // namespace
}  // namespace omniconv
