// Products of grad_y and x, the gradient of a dynamic convolution's weights: with positions in the lanes, with channels
// in the lanes, or as a product of matrices whose diagonals are taps. Included by kernels only; internal linkage.
#pragma once
#include "kernels/dynamic_apply.h"

namespace omniconv {
namespace {

// Lane l is the sum over the lanes of v[l]: as a transposition, with what would lie side by side added at once (45
// operations for 16 vectors).
template <class A> INLINE typename Vec<A>::V lane_sums(const typename Vec<A>::V* v) {
  typedef typename Vec<A>::V V;
  typedef Vec<double>::V D;
  constexpr int L = Vec<A>::lanes, Q = 16 / int(sizeof(A)), pieces = L / Q;
  V in[pieces];
#pragma GCC unroll 4
  for (int h = 0; h < pieces; ++h, v += Q) {
    if constexpr (Q == 2) {
      in[h] = low(v[0], v[1]) + high(v[0], v[1]);
    } else {
      const V a = low(v[0], v[1]) + high(v[0], v[1]), b = low(v[2], v[3]) + high(v[2], v[3]);
      in[h] = (V)low((D)a, (D)b) + (V)high((D)a, (D)b);
    }
  }
  if constexpr (pieces == 1) {
    return in[0];
  } else if constexpr (pieces == 2) {
    return even(in[0], in[1]) + odd(in[0], in[1]);
  } else {
    const V a = even(in[0], in[1]) + odd(in[0], in[1]), b = even(in[2], in[3]) + odd(in[2], in[3]);
    return even(a, b) + odd(a, b);
  }
}

template <int n> struct Count { static constexpr int value = n; };

// ---- positions in the lanes

// Q taps and B vectors of positions: g[i, t] += Σ_c grad_y[c, t]·x[c, t + i·step].
template <class A, int Q, int B>
NOINLINE void position_grads(const A* x, int64_t row, int64_t step, const A* grad_y, int64_t channels, A* g,
                             int64_t stride) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V sum[Q][B];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) sum[q][b] = load(g + q * stride + b * L);
  for (int64_t c = 0; c < channels; ++c, x += row, grad_y += row) {
    V d[B];
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) d[b] = in_register(load(grad_y + b * L));
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) sum[q][b] += d[b] * load(x + q * step + b * L);
  }
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) store(g + q * stride + b * L, sum[q][b]);
}

template <class A>
NOINLINE void add_grads_of_positions(const A* x, int64_t row, int64_t step, const A* grad_y, int64_t channels,
                                     int64_t K, int64_t n, A* g, int64_t stride) {
  constexpr int L = Vec<A>::lanes, kMost = kVectorRegisters == 32 ? 8 : 4;
  for (int64_t t = 0; t < n; t += 2 * L) {
    int64_t i = 0;
    auto taps = [&](auto count) {
      constexpr int Q = decltype(count)::value;
      for (; i + Q <= K; i += Q)
        (n - t > L ? position_grads<A, Q, 2> : position_grads<A, Q, 1>)(x + i * step + t, row, step, grad_y + t,
                                                                        channels, g + i * stride + t, stride);
    };
    if (kMost > 4) taps(Count<kMost>{});
    taps(Count<4>{});
    taps(Count<2>{});
    taps(Count<1>{});
  }
}

// ---- channels in the lanes

// R outputs and Q taps: g[q, r] += Σ_c grad_y[r, c]·x[r + q·step, c].
template <class A, int R, int Q>
NOINLINE void row_grads(const A* const* x, int64_t step, const A* grad_y, int64_t y_step, int64_t channels, A* g,
                        int64_t stride) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes, all = (R * Q + L - 1) / L * L;
  V sum[all];
#pragma GCC unroll 16
  for (int s = 0; s < all; ++s) sum[s] = V{};
  for (int64_t c = 0; c < channels; c += L) {
    V d[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) d[r] = in_register(load(grad_y + r * y_step + c));
    if (step == 1) {
#pragma GCC unroll 8
      for (int j = 0; j < R + Q - 1; ++j) {
        const V row = in_register(load(x[j] + c));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q)
          if (j >= q && j - q < R) sum[q * R + j - q] += d[j - q] * row;
      }
    } else {
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[q * R + r] += d[r] * load(x[r + q * step] + c);
    }
  }
  A made[all];
#pragma GCC unroll 16
  for (int s = 0; s < all; s += L) store(made + s, lane_sums<A>(sum + s));
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) g[q * stride + r] += made[q * R + r];
}

constexpr int kGradOutputs = kVectorRegisters == 32 ? 4 : 2;  // outputs of a block, of four taps

// All n outputs, of the taps that meet a row which is not zeros; g is added to.
template <class A>
NOINLINE void add_grads_of_rows(const A* const* x, const TileInput& input, const NonzeroRows& nonzero, const A* grad_y,
                                int64_t y_step, int64_t channels, int64_t n, A* g, int64_t stride) {
  int64_t t = 0;
  auto outputs = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; t + R <= n; t += R) {
      const Taps taps = taps_of(input, nonzero, t, R);
      int64_t i = taps.first;
      auto add = [&](auto block, int64_t Q) {
        block(x + t + i * input.step, input.step, grad_y + t * y_step, y_step, channels, g + i * stride + t, stride),
            i += Q;
      };
      while (i + 4 <= taps.last) add(row_grads<A, R, 4>, 4);
      if (i + 3 <= taps.last) add(row_grads<A, R, 3>, 3);
      if (i + 2 <= taps.last) add(row_grads<A, R, 2>, 2);
      if (i < taps.last) add(row_grads<A, R, 1>, 1);
    }
  };
  if (kGradOutputs > 2) outputs(Count<kGradOutputs>{});
  outputs(Count<2>{});
  outputs(Count<1>{});
}

// ---- a product of matrices

// R outputs meet W vectors of the positions of x: to[r, p − r] += Σ_c grad_y[c, r]·x[c, p], the taps of an output in a
// row of `to`.
template <class A, int R, int W>
NOINLINE void product_block(const A* x, int64_t row, const A* grad_y, int64_t channel, int64_t step, int64_t channels,
                            A* to, int64_t to_row) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) sum[r][w] = load(to + r * (to_row - 1) + w * L);
  for (int64_t c = 0; c < channels; ++c, x += row, grad_y += channel) {
    V v[W];
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) v[w] = in_register(load(x + w * L));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      V d = broadcast(grad_y[r * step]);
      if (W > 1) d = in_register(d);
#pragma GCC unroll 3
      for (int w = 0; w < W; ++w) sum[r][w] += d * v[w];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) store(to + r * (to_row - 1) + w * L, sum[r][w]);
}

constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;  // outputs of a block, of three vectors of positions

// All n outputs of K taps, output t at x + t, of which x is 0 outside of positions [low, high).
template <class A>
NOINLINE void add_products(const A* x, int64_t row, int64_t low, int64_t high, const A* grad_y, int64_t channel,
                           int64_t step, int64_t channels, int64_t K, int64_t n, A* to, int64_t to_row) {
  constexpr int L = Vec<A>::lanes;
  int64_t t = 0;
  auto outputs = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; t + R <= n; t += R)
      for (int64_t p = max64(0, low - t), end = min64(K + R - 1, high - t); p < end;) {
        const int64_t vectors = min64((end - p + L - 1) / L, 3);
        const auto block = vectors == 3   ? product_block<A, R, 3>
                           : vectors == 2 ? product_block<A, R, 2>
                                          : product_block<A, R, 1>;
        block(x + t + p, row, grad_y + t * step, channel, step, channels, to + t * to_row + p, to_row);
        p += vectors * L;
      }
  };
  if (kRows > 4) outputs(Count<kRows>{});
  outputs(Count<4>{});
  outputs(Count<2>{});
  outputs(Count<1>{});
}

// Rows of taps, one for each of n positions, become the K rows of g, or are added to them.
template <class A>
NOINLINE void transpose_taps(const A* from, int64_t from_row, int64_t K, int64_t n, bool add, A* g, int64_t stride) {
  constexpr int L = Vec<A>::lanes;
  for (int64_t t = 0; t < n; t += L)
    for (int64_t i = 0; i < K; i += L) {
      typename Vec<A>::V square[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) square[r] = load(from + (t + r) * from_row + i);
      ::transpose<A>(square);
      A* to = g + i * stride + t;
      if (K - i >= L && !add) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) store(to + r * stride, square[r]);
      } else {
        for (int r = 0; r < min64(L, K - i); ++r)
          store(to + r * stride, add ? load(to + r * stride) + square[r] : square[r]);
      }
    }
}

}  // namespace
}  // namespace omniconv
