// The gradient of a lightweight convolution's weights, and the softmax before them. Included by kernels only; internal
// linkage.
#pragma once
#include "kernels/lightweight_tile.h"

namespace omniconv {
namespace {

// Taps [0, Q) of the weight gradient from n outputs: sums (Q, L) are added to. With few taps a tap has several sums,
// for an addition takes four cycles.
template <class A, int Q> INLINE void add_grad_taps(A* total, const A* x, const A* grad_y, int64_t n, int64_t D) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes, R = Q > 4 ? 1 : Q > 2 ? 2 : 4;
  V sum[R][Q] = {};
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) sum[0][i] = load(total + i * L);
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) {
    V g[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) g[u] = in_register(load(grad_y + (t + u) * L));
    if (D == 1) {
#pragma GCC unroll 16
      for (int s = 0; s < Q + 3; ++s) {
        const V row = in_register(load(x + (t + s) * L));
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u)
          if (s - u >= 0 && s - u < Q) sum[u % R][s - u] += g[u] * row;
      }
    } else {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) sum[u % R][i] += g[u] * load(x + (t + u + i * D) * L);
    }
  }
  for (; t < n; ++t) {
    const V g = load(grad_y + t * L);
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) sum[0][i] += g * load(x + (t + i * D) * L);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) {
    V v = sum[0][i];
#pragma GCC unroll 4
    for (int r = 1; r < R; ++r) v += sum[r][i];
    store(total + i * L, v);
  }
}

template <class A> NOINLINE void add_grad_tile(A* total, const A* x, const A* grad_y, int64_t n, int64_t K, int64_t D) {
  constexpr int64_t L = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + 8 <= K; i += 8) add_grad_taps<A, 8>(total + i * L, x + i * D * L, grad_y, n, D);
  if (K - i >= 4) {
    add_grad_taps<A, 4>(total + i * L, x + i * D * L, grad_y, n, D);
    i += 4;
  }
  A* rest = total + i * L;
  x += i * D * L;
  if (K - i == 3) add_grad_taps<A, 3>(rest, x, grad_y, n, D);
  else if (K - i == 2) add_grad_taps<A, 2>(rest, x, grad_y, n, D);
  else if (K - i == 1) add_grad_taps<A, 1>(rest, x, grad_y, n, D);
}

// The lanes of each of K vectors are added to a number.
template <class A> void add_lanes(const A* rows, int64_t K, A* to) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t i = 0; i < K; i += L) {
    const int64_t n = min64(L, K - i);
    V square[L];
    for (int64_t r = 0; r < L; ++r) square[r] = r < n ? load(rows + (i + r) * L) : V{};
    transpose<A>(square);
#pragma GCC unroll 16
    for (int r = 1; r < L; ++r) square[0] += square[r];
    store_part<A>(to + i, load_part<A>(to + i, n) + square[0], n);
  }
}

template <class A>
void grad_weight_tiles(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t samples, const char* x,
                       const char* grad_y, const uint8_t* mask, A* grad_weight, A* grad_bias, A* scratch,
                       const Edges<A>& edges) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const Tiling tiling(g);
  const bool channels_last = g.x_channel == 1 && g.y_channel == 1;
  const int64_t width = channels_last ? kVectors * L : L;  // channels at once
  A *rows = scratch, *grads = rows + tiling.rows * width, *total = rows + (tiling.rows + tiling.outputs) * kVectors * L;
  A* bias_total = total + g.kernel * width;
  const Strides x_strides{g.x_step, g.x_channel, g.length}, y_strides{g.y_step, g.y_channel, g.outputs};
  for (int64_t b = c0; b < c1; b += width) {
    const int64_t channels = min64(width, c1 - b);
    for (int64_t i = 0; i < (g.kernel + 1) * width; i += L) store(total + i, V{});
    for (int64_t n = 0; n < samples; ++n) {
      const char* x_at = x + (n * g.x_sample + b * g.x_channel) * edges.element;
      const char* grad_at = grad_y + (n * g.y_sample + b * g.y_channel) * edges.element;
      const uint8_t* hidden = mask ? mask + n * g.length : nullptr;
      for (int64_t q = 0; q < min64(tiling.phases, g.outputs); ++q) {
        const int64_t of_phase = (g.outputs - q + tiling.phases - 1) / tiling.phases;
        for (int64_t r = 0; r < of_phase; r += tiling.outputs) {
          const int64_t count = min64(tiling.outputs, of_phase - r), t = q + r * tiling.phases, first = t - g.before;
          const int64_t step = tiling.phases, met = count + tiling.halo;
          if (channels_last) {
            edges.load_rows(x_strides, kZeros, hidden, x_at, channels, first, step, met, rows, tiling.rows * L);
            edges.load_rows(y_strides, kZeros, nullptr, grad_at, channels, t, step, count, grads, tiling.outputs * L);
          } else {
            edges.load_tile(x_strides, kZeros, hidden, x_at, channels, first, step, met, rows);
            edges.load_tile(y_strides, kZeros, nullptr, grad_at, channels, t, step, count, grads);
          }
          for (int64_t c = 0; c < channels; c += L) {
            const A* from = grads + c / L * tiling.outputs * L;
            add_grad_tile(total + g.kernel * c, rows + c / L * tiling.rows * L, from, count, g.kernel, tiling.dilation);
            V sum[4] = {load(bias_total + c)};
            for (int64_t i = 0; grad_bias && i < count; ++i) sum[i & 3] += load(from + i * L);
            store(bias_total + c, (sum[0] + sum[1]) + (sum[2] + sum[3]));
          }
        }
      }
    }
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t lanes = min64(L, channels - c), h = (b + c) / g.group;
      const A* sums = total + g.kernel * c;
      if (lanes == L && (b + c + L - 1) / g.group == h) {
        add_lanes(sums, g.kernel, grad_weight + h * g.kernel);
      } else {
        for (int64_t l = 0; l < lanes; ++l)
          for (int64_t i = 0; i < g.kernel; ++i) grad_weight[(b + c + l) / g.group * g.kernel + i] += sums[i * L + l];
      }
    }
    for (int64_t c = 0; grad_bias && c < channels; ++c) grad_bias[b + c] += bias_total[c];
  }
}

INLINE float power_of_e(float x) { return __builtin_expf(x); }
INLINE double power_of_e(double x) { return __builtin_exp(x); }

// NaN and infinite logits make a row of NaN, as in torch: they are left in the sum.
template <class A> void softmax(int64_t heads, int64_t taps, void* weight) {
  A* w = (A*)weight;
  for (int64_t h = 0; h < heads; ++h, w += taps) {
    A most = w[0], sum = 0;
    for (int64_t i = 1; i < taps; ++i) most = most < w[i] ? w[i] : most;
    for (int64_t i = 0; i < taps; ++i) sum += w[i] = power_of_e(w[i] - most);
    for (int64_t i = 0; i < taps; ++i) w[i] /= sum;
  }
}

template <class A> void softmax_gradient(int64_t heads, int64_t taps, const void* weight, void* grad) {
  const A* w = (const A*)weight;
  A* g = (A*)grad;
  for (int64_t h = 0; h < heads; ++h, w += taps, g += taps) {
    double mean = 0;
    for (int64_t i = 0; i < taps; ++i) mean += double(w[i]) * double(g[i]);
    for (int64_t i = 0; i < taps; ++i) g[i] = A(w[i] * (g[i] - mean));
  }
}

}  // namespace
}  // namespace omniconv
