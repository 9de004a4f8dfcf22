// Depthwise kernels on channels-last tensors; compiled once per instruction set (CMake defines ISA, the namespace, and VECTOR_BYTES).
//
// A strip is one cache line of channels. Output rows are made band by band, and within a band strip by strip, so that the few input rows
// of a strip that its windows share stay in L1 while the band stays in L2. Along a row, columns stream through a block of sums held in
// registers: a column is loaded once for all the taps that meet it, and one that is padding is never added.
#include "kernels/depthwise.h"

#include "kernels/depthwise_window.h"

#ifndef ISA
#define ISA isa_base
#endif

namespace omniconv {
namespace ISA {
namespace {

constexpr int kWide = VECTOR_BYTES == 64 ? 14 : 7;  // sums in registers; every ImageNet size is a multiple of 7
constexpr int64_t kBand = 256 << 10;                // bytes of input and output that a band may have

// A row of the input and the row of taps that it meets, as offsets in elements.
struct Meeting { int64_t x, w; };

// Where the columns of a window row are, as offsets in elements; below 0 where they are padding.
struct Columns {
  const int64_t* at;
  int64_t first, last;  // outputs [first, last) see no padding
};

template <class E> struct Line {
  static constexpr int64_t channels = 64 / sizeof(E);
};

// R outputs side by side meet KW taps (in memory C apart) of columns `step` apart from q on; S is the stride.
template <class E, class A, int KW, int S, int R, bool EDGE>
INLINE void slide(const E* x, const int64_t* at, int64_t C, const A* w, typename Vec<A>::V* sum) {
  typename Vec<A>::V tap[KW];
#pragma GCC unroll 8
  for (int t = 0; t < KW; ++t) tap[t] = load(w + t * C);
#pragma GCC unroll 40
  for (int j = 0; j < (R - 1) * S + KW; ++j) {
    if (EDGE && at[j] < 0) continue;
    const typename Vec<A>::V v = load(EDGE ? x + at[j] : x + j * C);
#pragma GCC unroll 8
    for (int t = 0; t < KW; ++t)
      if (j >= t && (j - t) % S == 0 && (j - t) / S < R) sum[(j - t) / S] += tap[t] * v;
  }
}

// The same for any stride, dilation and number of taps.
template <class E, class A, int R, bool EDGE>
INLINE void step(const DepthwiseGeometry& g, const E* x, const int64_t* at, int64_t C, const A* w, typename Vec<A>::V* sum) {
  const int64_t S = g.stride[2], D = g.dilation[2];
  for (int64_t t = 0; t < g.kernel[2]; ++t) {
    const typename Vec<A>::V tap = load(w + t * C);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int64_t j = r * S + t * D;
      if (!EDGE || at[j] >= 0) sum[r] += tap * load(EDGE ? x + at[j] : x + j * C);
    }
  }
}

template <class E, class A, int KW, int S, int R, bool EDGE>
void block(const DepthwiseGeometry& g, int64_t C, const Meeting* m, int64_t meetings, const int64_t* at, const E* x, const A* w, const A* bias, E* y) {
  typename Vec<A>::V sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = bias ? load(bias) : typename Vec<A>::V{};
  for (int64_t i = 0; i < meetings; ++i) {
    const E* row = x + m[i].x + (EDGE ? 0 : at[0]);
    const A* taps = w + m[i].w;
    if constexpr (KW > 0) {
      slide<E, A, KW, S, R, EDGE>(row, at, C, taps, sum);
    } else if (g.dilation[2] == 1 && g.stride[2] == 1) {
      int64_t t = 0;
      for (; t + 7 <= g.kernel[2]; t += 7) slide<E, A, 7, 1, R, EDGE>(row + (EDGE ? 0 : t * C), at + t, C, taps + t * C, sum);
      for (; t < g.kernel[2]; ++t) slide<E, A, 1, 1, R, EDGE>(row + (EDGE ? 0 : t * C), at + t, C, taps + t * C, sum);
    } else {
      step<E, A, R, EDGE>(g, row, at, C, taps, sum);
    }
  }
  if (g.activation != kNone) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = activate<A>(sum[r], g.activation);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(y + r * C, sum[r]);
}

// One row of outputs of one vector of channels.
template <class E, class A, int KW, int S>
void row(const DepthwiseGeometry& g, int64_t C, const Meeting* m, int64_t meetings, const Columns& columns, const E* x, const A* w, const A* bias, E* y) {
  const int64_t n = g.out[2], stride = g.stride[2];
  for (int64_t o = 0; o < n;) {
    const int64_t rest = n - o;
    // the last block ends where the row does and makes some outputs twice
    const bool wide = rest > 7 ? n >= kWide : false;
    const int64_t many = wide ? kWide : n >= 7 ? 7 : 1, from = rest < many ? n - many : o;
    const bool inside = from >= columns.first && from + many <= columns.last;
    const int64_t* at = columns.at + from * stride;
    E* to = y + from * C;
    if (many == 1) block<E, A, 0, 0, 1, true>(g, C, m, meetings, at, x, w, bias, to);
    else if (wide && inside) block<E, A, KW, S, kWide, false>(g, C, m, meetings, at, x, w, bias, to);
    else if (wide) block<E, A, KW, S, kWide, true>(g, C, m, meetings, at, x, w, bias, to);
    else if (inside) block<E, A, KW, S, 7, false>(g, C, m, meetings, at, x, w, bias, to);
    else block<E, A, KW, S, 7, true>(g, C, m, meetings, at, x, w, bias, to);
    o = from + many;
  }
}

int64_t padded(const DepthwiseGeometry& g) { return (g.out[2] - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1; }

size_t scratch_bytes(const DepthwiseGeometry& g) { return padded(g) * sizeof(int64_t) + g.kernel[0] * g.kernel[1] * sizeof(Meeting); }

Columns columns_of(const DepthwiseGeometry& g, int64_t C, int64_t* at) {
  const int64_t S = g.stride[2], P = g.before[2], reach = (g.kernel[2] - 1) * g.dilation[2], size = g.in[2];
  for (int64_t p = 0; p < padded(g); ++p) {
    const int64_t column = source(p - P, size, g.spread[2], g.mode);
    at[p] = column < 0 ? -1 : column * C;
  }
  if (g.spread[2] > 1) return {at, 0, 0};
  return {at, max64(0, (P + S - 1) / S), P + size > reach ? (P + size - 1 - reach) / S + 1 : 0};
}

// What output row (oa, ob) meets.
int64_t meet(const DepthwiseGeometry& g, int64_t C, int64_t oa, int64_t ob, Meeting* m) {
  int64_t count = 0;
  for (int64_t ka = 0; ka < g.kernel[0]; ++ka) {
    const int64_t a = source(oa * g.stride[0] - g.before[0] + ka * g.dilation[0], g.in[0], g.spread[0], g.mode);
    if (a < 0) continue;
    for (int64_t kb = 0; kb < g.kernel[1]; ++kb) {
      const int64_t b = source(ob * g.stride[1] - g.before[1] + kb * g.dilation[1], g.in[1], g.spread[1], g.mode);
      if (b >= 0) m[count++] = {(a * g.in[1] + b) * g.in[2] * C, (ka * g.kernel[1] + kb) * g.kernel[2] * C};
    }
  }
  return count;
}

// Output rows whose input and output fill a band.
int64_t band_rows(const DepthwiseGeometry& g, int64_t C, size_t element) {
  const int64_t bytes = (g.in[2] * g.stride[1] + g.out[2]) * C * element;
  return max64(1, kBand / bytes);
}

template <class E, class A, int KW, int S>
void bands(const DepthwiseGeometry& g, int64_t C, int64_t first, int64_t last, const E* x, const A* w, const A* bias, E* y, void* scratch) {
  constexpr int64_t L = Vec<A>::lanes, line = Line<E>::channels;
  const Columns columns = columns_of(g, C, (int64_t*)scratch);
  Meeting* m = (Meeting*)((int64_t*)scratch + padded(g));
  const int64_t tall = band_rows(g, C, sizeof(E));
  for (int64_t r0 = first; r0 < last; r0 += tall)
    for (int64_t c0 = 0; c0 < C; c0 += line)
      for (int64_t r = r0; r < min64(r0 + tall, last); ++r) {
        const int64_t meetings = meet(g, C, r / g.out[1], r % g.out[1], m);
        for (int64_t c = c0; c < min64(c0 + line, C); c += L) {
          const int64_t i = min64(c, C - L);  // the last vector goes over some channels twice
          row<E, A, KW, S>(g, C, m, meetings, columns, x + i, w + i, bias ? bias + i : nullptr, y + r * g.out[2] * C + i);
        }
      }
}

template <class E>
void forward(const DepthwiseGeometry& g, int64_t C, int64_t first, int64_t last, const void* x, const void* w, const void* bias, void* y, void* scratch) {
  typedef typename Sum<E>::type A;
  const int64_t kw = g.dilation[2] == 1 && g.stride[2] <= 2 ? g.kernel[2] * 10 + g.stride[2] : 0;
  const auto run = kw == 31 ? bands<E, A, 3, 1> : kw == 32 ? bands<E, A, 3, 2> : kw == 51 ? bands<E, A, 5, 1> : kw == 52 ? bands<E, A, 5, 2>
                 : kw == 71 ? bands<E, A, 7, 1> : kw == 72 ? bands<E, A, 7, 2> : bands<E, A, 0, 0>;
  run(g, C, first, last, (const E*)x, (const A*)w, (const A*)bias, (E*)y, scratch);
}

// sum[q][t] += Σ_o gy[o]·x[q][o·S + t·D] for Q rows of the input and T taps at once, over outputs [from, to), none of which sees padding.
template <class E, class A, int Q, int T>
INLINE void correlate(const E* gy, const E* const* x, int64_t C, int64_t from, int64_t to, int64_t stride, int64_t dilation, typename Vec<A>::V (*sum)[T]) {
  for (int64_t o = from; o < to; ++o) {
    const typename Vec<A>::V v = load(gy + o * C);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[q][t] += v * load(x[q] + (o * stride + t * dilation) * C);
  }
}

// Q rows of taps, T taps of each from t0 on, of one output row and one vector of channels; their gradients are added to.
template <class E, class A, int Q, int T>
void gather(const DepthwiseGeometry& g, int64_t C, const Meeting* m, int64_t t0, const Columns& columns, const E* x, const E* gy, A* gw) {
  typedef typename Vec<A>::V V;
  const int64_t S = g.stride[2], D = g.dilation[2], shift = t0 * D - g.before[2];
  V sum[Q][T];
  const E* rows[Q];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q) {
    rows[q] = x + m[q].x + shift * C;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[q][t] = load(gw + m[q].w + (t0 + t) * C);
  }
  const int64_t n = g.out[2], lo = min64(columns.first, n), hi = max64(lo, min64(columns.last, n));
  auto edge = [&](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) {
      const V v = load(gy + o * C);
      const int64_t* at = columns.at + o * S + t0 * D;
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          if (at[t * D] >= 0) sum[q][t] += v * load(x + m[q].x + at[t * D]);
    }
  };
  edge(0, lo);
  correlate<E, A, Q, T>(gy, rows, C, lo, hi, S, D, sum);
  edge(hi, n);
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(gw + m[q].w + (t0 + t) * C, sum[q][t]);
}

template <class E, class A, int KW, int Q>
INLINE void gather_row(const DepthwiseGeometry& g, int64_t C, const Meeting* m, int64_t meetings, const Columns& columns, const E* x, const E* gy, A* gw) {
  int64_t i = 0;
  if constexpr (KW > 0) {
    for (; i + Q <= meetings; i += Q) gather<E, A, Q, KW>(g, C, m + i, 0, columns, x, gy, gw);
    for (; i < meetings; ++i) gather<E, A, 1, KW>(g, C, m + i, 0, columns, x, gy, gw);
  } else {
    for (; i < meetings; ++i) {
      int64_t t = 0;
      for (; t + 8 <= g.kernel[2]; t += 8) gather<E, A, 1, 8>(g, C, m + i, t, columns, x, gy, gw);
      for (; t + 3 <= g.kernel[2]; t += 3) gather<E, A, 1, 3>(g, C, m + i, t, columns, x, gy, gw);
      for (; t < g.kernel[2]; ++t) gather<E, A, 1, 1>(g, C, m + i, t, columns, x, gy, gw);
    }
  }
}

template <class E, class A, int KW, int Q>
void gather_bands(const DepthwiseGeometry& g, int64_t C, int64_t c0, int64_t c1, const E* x, const E* gy, A* gw, void* scratch) {
  constexpr int64_t L = Vec<A>::lanes, line = Line<E>::channels;
  const Columns columns = columns_of(g, C, (int64_t*)scratch);
  Meeting* m = (Meeting*)((int64_t*)scratch + padded(g));
  const int64_t tall = band_rows(g, C, sizeof(E)), rows = g.out[0] * g.out[1];
  for (int64_t r0 = 0; r0 < rows; r0 += tall)
    for (int64_t s = c0; s < c1; s += line)
      for (int64_t r = r0; r < min64(r0 + tall, rows); ++r) {
        const int64_t meetings = meet(g, C, r / g.out[1], r % g.out[1], m);
        for (int64_t c = s; c < min64(s + line, c1); c += L)
          gather_row<E, A, KW, Q>(g, C, m, meetings, columns, x + c, gy + r * g.out[2] * C + c, gw + c);
      }
}

template <class E>
void grad_weight(const DepthwiseGeometry& g, int64_t C, int64_t c0, int64_t c1, const void* x, const void* gy, void* gw, void* scratch) {
  typedef typename Sum<E>::type A;
  const auto run = g.kernel[2] == 3 ? gather_bands<E, A, 3, 3> : g.kernel[2] == 5 ? gather_bands<E, A, 5, 2>
                 : g.kernel[2] == 7 ? gather_bands<E, A, 7, 2> : gather_bands<E, A, 0, 1>;
  run(g, C, c0, c1, (const E*)x, (const E*)gy, (A*)gw, scratch);
}

}  // namespace

extern const LastTables depthwise_last;
const LastTables depthwise_last = {
    {scratch_bytes, forward<float>, grad_weight<float>},
    {scratch_bytes, forward<double>, grad_weight<double>},
    {scratch_bytes, forward<bf16>, grad_weight<bf16>},
    {scratch_bytes, forward<f16>, grad_weight<f16>},
};

}  // namespace ISA
}  // namespace omniconv
