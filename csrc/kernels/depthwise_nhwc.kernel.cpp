// Depthwise kernels on channels-last tensors; compiled once per instruction set (CMake defines ISA, the namespace, and VECTOR_BYTES).
//
// A strip is one cache line of channels. Outputs are made tile by tile (rows and columns that fit L2), and within a tile strip by strip, so
// that the few input rows of a strip that its windows share stay in L1. Along a row, columns stream through a block of sums held in
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
constexpr int64_t kNarrow = 14;                     // columns of a narrow tile
constexpr int64_t kTile = 256 << 10;                // bytes of input and output that a tile may have
constexpr int64_t kTapRows = 1024;                 // of the rows of a tile, unless one row has more

// A row of input columns and the row of taps that it meets.
template <class E, class A> struct TapRow {
  const E* x;
  const A* w;
};

// Which columns of a block are inside: all; those that have to be looked at; or, of a whole row of R·S columns between (KW − 1)/2 pads, all
// but these, which the compiler then knows. AVX-512, 3x3, 1024 channels of 7x7: 21.3 us looked at, 18.6 known.
enum Edge { kInside, kLook, kWhole };

// R outputs side by side, stride S, meet KW taps. Column j is at x + j·C; in [from, to) it is inside.
template <class E, class A, int KW, int S, int R, Edge EDGE>
INLINE void slide(const E* x, int64_t C, int64_t from, int64_t to, const A* w, int64_t tap_step, typename Vec<A>::V* sum) {
  typename Vec<A>::V tap[KW];
#pragma GCC unroll 8
  for (int t = 0; t < KW; ++t) tap[t] = load(w + t * tap_step);
#pragma GCC unroll 40
  for (int j = 0; j < (R - 1) * S + KW; ++j) {
    if (EDGE == kLook && (j < from || j >= to)) continue;
    if (EDGE == kWhole && (j < (KW - 1) / 2 || j >= (KW - 1) / 2 + R * S)) continue;
    const typename Vec<A>::V v = in_register(load(x + j * C));
#pragma GCC unroll 8
    for (int t = 0; t < KW; ++t)
      if (j >= t && (j - t) % S == 0 && (j - t) / S < R) sum[(j - t) / S] += tap[t] * v;
  }
}

// The same for any stride, dilation, padding mode and number of taps: every column looked up; below 0 is padding.
template <class E, class A, int R>
INLINE void look_up(const DepthwiseGeometry& g, const E* x, const int64_t* at, const A* w, int64_t C, typename Vec<A>::V* sum) {
  for (int64_t t = 0; t < g.kernel[2]; ++t) {
    const typename Vec<A>::V tap = load(w + t * C);
    const int64_t* here = at + t * g.dilation[2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      if (here[r * g.stride[2]] >= 0) sum[r] += tap * load(x + here[r * g.stride[2]]);
  }
}

// What the rows of one call share.
template <class E, class A> struct Rows {
  const DepthwiseGeometry& g;
  int64_t C;            // channels
  const int64_t* at;    // where padded column p is, in elements; below 0 where it is padding
  int64_t first, last;  // outputs [first, last) see no padding
  // Outputs and taps that stand `spread` apart read neighbouring columns: those of one phase are a convolution of their own.
  int64_t origin;                      // the column that tap 0 of output 0 reads
  int64_t tap, taps;                   // its first tap, in elements, and how many there are
  int64_t tap_step, out_step;          // elements between taps, and between outputs
  const TapRow<E, A>* tap_rows;
  int64_t count;
};

// Outputs [o, o + R) of a row of one vector of channels, c elements into each.
template <class E, class A, int KW, int S, int R, Edge EDGE>
INLINE void block(const Rows<E, A>& rows, int64_t o, int64_t c, const A* bias, E* y) {
  const DepthwiseGeometry& g = rows.g;
  typename Vec<A>::V sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = bias ? load(bias + c) : typename Vec<A>::V{};
  const int64_t first = rows.origin + o * S, C = rows.C, step = rows.tap_step;
  for (int64_t i = 0; i < rows.count; ++i) {
    const E* x = rows.tap_rows[i].x + c;
    const A* w = rows.tap_rows[i].w + c + rows.tap;
    if constexpr (KW > 0) {
      slide<E, A, KW, S, R, EDGE>(x + first * C, C, -first, g.in[2] - first, w, step, sum);
    } else if constexpr (S == 1) {
      int64_t t = 0, p = first;
      for (; t + 7 <= rows.taps; t += 7, p += 7) slide<E, A, 7, 1, R, EDGE>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
      for (; t + 4 <= rows.taps; t += 4, p += 4) slide<E, A, 4, 1, R, EDGE>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
      for (; t + 2 <= rows.taps; t += 2, p += 2) slide<E, A, 2, 1, R, EDGE>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
      if (t < rows.taps) slide<E, A, 1, 1, R, EDGE>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
    } else {
      look_up<E, A, R>(g, x, rows.at + o * g.stride[2], w, C, sum);
    }
  }
  if (g.activation != kNone) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = activate<A>(sum[r], g.activation);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(y + (o + r) * rows.out_step + c, sum[r]);
}

// Outputs [begin, end) of a row. KW taps with stride S; KW = 0: any number of taps; S = 0: any stride and dilation.
template <class E, class A, int KW, int S>
void outputs(const Rows<E, A>& rows, int64_t begin, int64_t end, int64_t c, const A* bias, E* y) {
  for (int64_t o = begin; o < end;) {
    // the last block ends where the row does and makes some outputs twice
    const int64_t rest = end - o, many = rest > 7 && end - begin >= kWide ? kWide : end - begin >= 7 ? 7 : 1, from = rest < many ? end - many : o;
    const bool inside = from >= rows.first && from + many <= rows.last;
    if (many == 1) block<E, A, 0, S == 1, 1, kLook>(rows, from, c, bias, y);
    else if (KW > 0 && S > 0 && rows.origin == -(KW - 1) / 2 && rows.g.in[2] == many * S && many == rows.g.out[2]) {
      if (many == kWide) block<E, A, KW, S, kWide, kWhole>(rows, from, c, bias, y);
      else block<E, A, KW, S, 7, kWhole>(rows, from, c, bias, y);
    }
    else if (many == kWide && inside) block<E, A, KW, S, kWide, kInside>(rows, from, c, bias, y);
    else if (many == kWide) block<E, A, KW, S, kWide, kLook>(rows, from, c, bias, y);
    else if (inside) block<E, A, KW, S, 7, kInside>(rows, from, c, bias, y);
    else block<E, A, KW, S, 7, kLook>(rows, from, c, bias, y);
    o = from + many;
  }
}

// Outputs [begin, end) of a row that is spread, phase by phase: none of the zeros between its elements is multiplied.
template <class E, class A> void spread_outputs(Rows<E, A> rows, int64_t begin, int64_t end, int64_t c, const A* bias, E* y) {
  const DepthwiseGeometry& g = rows.g;
  const int64_t spread = g.spread[2], before = g.before[2];
  for (int64_t q = 0; q < spread; ++q) {
    const int64_t tap = ((before - q) % spread + spread) % spread;
    rows.tap = tap * rows.C;
    rows.taps = tap < g.kernel[2] ? (g.kernel[2] - tap + spread - 1) / spread : 0;
    rows.origin = (q - before + tap) / spread;
    rows.first = max64(0, -rows.origin);
    rows.last = max64(0, g.in[2] - rows.origin - rows.taps + 1);
    // the r-th output of a phase is q + r·spread
    const int64_t from = max64(0, (begin - q + spread - 1) / spread), to = (end - q + spread - 1) / spread;
    if (from >= to) continue;
    const auto run = rows.taps == 1 ? outputs<E, A, 1, 1> : rows.taps == 2 ? outputs<E, A, 2, 1> : rows.taps == 3 ? outputs<E, A, 3, 1> : outputs<E, A, 0, 1>;
    run(rows, from, to, c, bias, y + q * rows.C);
  }
}

int64_t padded(const DepthwiseGeometry& g) { return (g.out[2] - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1; }

// Outputs are made in tiles, and in a tile by strips of a cache line of channels.
struct Tiling {
  int64_t width, rows, columns;
  Tiling(const DepthwiseGeometry& g, int64_t C, int64_t element) {
    const int64_t column = (g.stride[2] + 1) * C * element;
    width = 64 / element;
    columns = g.out[2];
    rows = max64(1, kTile / (column * g.out[2]));
    // A stride that reaches few of the 64 sets of L1 cannot keep the rows of a strip there. Then tiles are narrow (128 channels, 56x56, 3x3,
    // AVX2: 0.160 ms and 0.113), and with still fewer sets strips change before rows do (512 channels, 14x14, 3x3: 0.030 and 0.025).
    int64_t sets = 64;
    for (int64_t s = C * element; s % 128 == 0 && sets > 1; s /= 2) sets /= 2;
    const bool crowded = sets <= 8 && g.kernel[0] * g.kernel[1] * g.in[2] > sets * 8;
    if (rows == 1 || (crowded && sets <= 4)) {
      rows = 1;
      columns = min64(columns, kWide);
    } else if (crowded) {
      columns = min64(columns, kNarrow);
    }
    rows = min64(rows, max64(1, kTapRows / (g.kernel[0] * g.kernel[1])));
    if (rows == 1) width = C;  // nothing is met again: what a row meets is found out once for all strips
  }
};

// The rows of one call, set up in scratch.
template <class E, class A> Rows<E, A> rows_of(const DepthwiseGeometry& g, int64_t C, void* scratch) {
  int64_t* at = (int64_t*)scratch;
  const int64_t S = g.stride[2], P = g.before[2], seen = P + g.in[2] - (g.kernel[2] - 1) * g.dilation[2];
  for (int64_t p = 0; p < padded(g); ++p) {
    const int64_t c = source(p - P, g.in[2], g.spread[2], g.mode);
    at[p] = c < 0 ? -1 : c * C;
  }
  const int64_t step = g.dilation[2] == 1 ? C * g.spread[2] : C;  // dilated, every column is looked up: there are no phases
  Rows<E, A> rows{g, C, at, 0, 0, -P, 0, g.kernel[2], step, step, nullptr, 0};
  if (g.spread[2] == 1 && seen > 0) {
    rows.first = max64(0, (P + S - 1) / S);
    rows.last = (seen - 1) / S + 1;
  }
  return rows;
}

size_t scratch_bytes(const DepthwiseGeometry& g) {
  return (padded(g) + kTapRows) * sizeof(int64_t) + (kTapRows + g.kernel[0] * g.kernel[1]) * sizeof(TapRow<void, void>);
}

// What output row (od, oh) meets, and with how many rows of taps, which are (taps, C).
template <class E, class A> int64_t meet(const Rows<E, A>& rows, int64_t od, int64_t oh, const E* x, const A* w, TapRow<E, A>* to) {
  const DepthwiseGeometry& g = rows.g;
  int64_t count = 0;
  for (int64_t kd = 0; kd < g.kernel[0]; ++kd) {
    const int64_t a = source(od * g.stride[0] - g.before[0] + kd * g.dilation[0], g.in[0], g.spread[0], g.mode);
    if (a < 0) continue;
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
      const int64_t b = source(oh * g.stride[1] - g.before[1] + kh * g.dilation[1], g.in[1], g.spread[1], g.mode);
      if (b >= 0) to[count++] = {x + (a * g.in[1] + b) * g.in[2] * rows.C, w + (kd * g.kernel[1] + kh) * g.kernel[2] * rows.C};
    }
  }
  return count;
}

// f(row, outputs [begin, end), channels [c, until)) over rows [first, last), their outputs [o0, o1) and channels [c0, c1), with the row's
// tap_rows made.
template <class E, class A, class F>
INLINE void walk(Rows<E, A>& rows, int64_t first, int64_t last, int64_t o0, int64_t o1, int64_t c0, int64_t c1, const E* x, const A* w, const F& f) {
  const DepthwiseGeometry& g = rows.g;
  const Tiling tile(g, rows.C, sizeof(E));
  const int64_t most = g.kernel[0] * g.kernel[1];
  int64_t* counts = (int64_t*)rows.at + padded(g);  // of the rows of a tile, behind the columns; then their tap_rows
  TapRow<E, A>* tap_rows = (TapRow<E, A>*)(counts + kTapRows);
  for (int64_t r0 = first; r0 < last; r0 += tile.rows) {
    const int64_t many = min64(tile.rows, last - r0);
    for (int64_t r = 0; r < many; ++r) counts[r] = meet(rows, (r0 + r) / g.out[1], (r0 + r) % g.out[1], x, w, tap_rows + r * most);
    for (int64_t o = o0; o < o1; o += tile.columns)
      for (int64_t c = c0; c < c1; c += tile.width)
        for (int64_t r = 0; r < many; ++r) {
          rows.tap_rows = tap_rows + r * most;
          rows.count = counts[r];
          f(r0 + r, o, min64(o + tile.columns, o1), c, min64(c + tile.width, c1));
        }
  }
}

template <class E, class A, int KW, int S>
void tiles(const DepthwiseGeometry& g, int64_t C, int64_t first, int64_t last, int64_t o0, int64_t o1, const E* x, const A* w, const A* bias, E* y, void* scratch) {
  constexpr int64_t L = Vec<A>::lanes;
  Rows<E, A> rows = rows_of<E, A>(g, C, scratch);
  walk(rows, first, last, o0, o1, 0, C, x, w, [&](int64_t r, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c += L) {
      const int64_t i = min64(c, C - L);  // the last vector goes over some channels twice
      if (KW == 0 && S == 1 && g.spread[2] > 1) spread_outputs(rows, begin, end, i, bias, y + r * g.out[2] * C);
      else outputs<E, A, KW, S>(rows, begin, end, i, bias, y + r * g.out[2] * C);
    }
  });
}

template <class E>
void forward(const DepthwiseGeometry& g, int64_t C, int64_t first, int64_t last, int64_t o0, int64_t o1, const void* x, const void* w, const void* bias,
             void* y, void* scratch) {
  typedef typename Accumulator<E>::type A;
  const bool straight = g.dilation[2] == 1 && g.mode == kZeros && g.stride[2] <= 2;
  const int64_t form = !straight ? 0 : g.spread[2] > 1 ? 1 : g.kernel[2] * 10 + g.stride[2];  // what is spread has stride 1
  const auto run = form == 31 ? tiles<E, A, 3, 1> : form == 32 ? tiles<E, A, 3, 2> : form == 51 ? tiles<E, A, 5, 1> : form == 52 ? tiles<E, A, 5, 2>
                 : form == 71 ? tiles<E, A, 7, 1> : form == 41 ? tiles<E, A, 4, 1> : form % 10 == 1 ? tiles<E, A, 0, 1> : tiles<E, A, 0, 0>;
  run(g, C, first, last, o0, o1, (const E*)x, (const A*)w, (const A*)bias, (E*)y, scratch);
}

// Gradients of Q rows of taps, T taps of each from t0 on, from outputs [begin, end) of one row and one vector of channels: they are added to.
template <class E, class A, int Q, int T>
void gather(const Rows<E, A>& rows, const TapRow<E, A>* m, int64_t t0, int64_t begin, int64_t end, const E* gy, int64_t c) {
  typedef typename Vec<A>::V V;
  const DepthwiseGeometry& g = rows.g;
  const int64_t S = g.stride[2], D = g.dilation[2], C = rows.C, first = t0 * D - g.before[2];
  V sum[Q][T];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[q][t] = load(m[q].w + c + (t0 + t) * C);
  const int64_t lo = max64(begin, min64(rows.first, end)), hi = max64(lo, min64(rows.last, end));
  auto edge = [&](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) {
      const V v = load(gy + o * C + c);
      const int64_t* at = rows.at + o * S + t0 * D;
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          if (at[t * D] >= 0) sum[q][t] += v * load(m[q].x + c + at[t * D]);
    }
  };
  edge(begin, lo);
  for (int64_t o = lo; o < hi; ++o) {
    const V v = load(gy + o * C + c);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[q][t] += v * load(m[q].x + c + (first + o * S + t * D) * C);
  }
  edge(hi, end);
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store((A*)m[q].w + c + (t0 + t) * C, sum[q][t]);
}

template <class E, class A, int KW, int Q> INLINE void gather_row(const Rows<E, A>& rows, int64_t begin, int64_t end, const E* gy, int64_t c) {
  int64_t i = 0;
  const TapRow<E, A>* m = rows.tap_rows;
  if constexpr (KW > 0) {
    for (; i + Q <= rows.count; i += Q) gather<E, A, Q, KW>(rows, m + i, 0, begin, end, gy, c);
    for (; i < rows.count; ++i) gather<E, A, 1, KW>(rows, m + i, 0, begin, end, gy, c);
  } else {
    for (; i < rows.count; ++i) {
      int64_t t = 0;
      for (; t + 8 <= rows.g.kernel[2]; t += 8) gather<E, A, 1, 8>(rows, m + i, t, begin, end, gy, c);
      for (; t + 4 <= rows.g.kernel[2]; t += 4) gather<E, A, 1, 4>(rows, m + i, t, begin, end, gy, c);
      for (; t < rows.g.kernel[2]; ++t) gather<E, A, 1, 1>(rows, m + i, t, begin, end, gy, c);
    }
  }
}

// The sum of outputs [begin, end) of a row is added to the bias gradient: four chains, as an addition takes four cycles.
template <class E, class A> INLINE void total(int64_t begin, int64_t end, const E* gy, int64_t C, A* gb) {
  typename Vec<A>::V sum[4] = {load(gb)};
  int64_t o = begin;
  for (; o + 4 <= end; o += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += load(gy + (o + i) * C);
  }
  for (; o < end; ++o) sum[0] += load(gy + o * C);
  store(gb, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class E, class A, int KW, int Q>
void gather_tiles(const DepthwiseGeometry& g, int64_t C, int64_t c0, int64_t c1, const E* x, const E* gy, A* gw, A* gb, void* scratch) {
  Rows<E, A> rows = rows_of<E, A>(g, C, scratch);
  walk(rows, 0, g.out[0] * g.out[1], 0, g.out[2], c0, c1, x, (const A*)gw, [&](int64_t r, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const E* grads = gy + r * g.out[2] * C;
    for (int64_t c = from; c < to; c += Vec<A>::lanes) {
      gather_row<E, A, KW, Q>(rows, begin, end, grads, c);
      if (gb) total(begin, end, grads + c, C, gb + c);
    }
  });
}

template <class E>
void grad_weight(const DepthwiseGeometry& g, int64_t C, int64_t c0, int64_t c1, const void* x, const void* gy, void* gw, void* gb, void* scratch) {
  typedef typename Accumulator<E>::type A;
  const auto run = g.kernel[2] == 3 ? gather_tiles<E, A, 3, 3> : g.kernel[2] == 5 ? gather_tiles<E, A, 5, 2>
                 : g.kernel[2] == 7 ? gather_tiles<E, A, 7, 2> : gather_tiles<E, A, 0, 1>;
  run(g, C, c0, c1, (const E*)x, (const E*)gy, (A*)gw, (A*)gb, scratch);
}

}  // namespace

extern const NhwcTables depthwise_nhwc;
const NhwcTables depthwise_nhwc = {
    {scratch_bytes, forward<float>, grad_weight<float>},
    {scratch_bytes, forward<double>, grad_weight<double>},
    {scratch_bytes, forward<bf16>, grad_weight<bf16>},
    {scratch_bytes, forward<f16>, grad_weight<f16>},
};

}  // namespace ISA
}  // namespace omniconv
