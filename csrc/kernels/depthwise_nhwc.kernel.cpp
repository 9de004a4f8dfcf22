// Depthwise kernels on channels-last tensors; compiled once per instruction set (CMake defines ISA, the namespace,
// and VECTOR_BYTES).
//
// A strip is one cache line of channels. Outputs are made tile by tile (rows and columns that fit L2), and within a
// tile strip by strip, so that the few input rows of a strip that its windows share stay in L1. Along a row, columns
// stream through a block of sums held in registers: a column is loaded once for all the taps that read it, and one
// that is padding is never added.
//
// Every body adds the taps of an output in the same order, row by row and left to right: which one runs never shows
// in the bits. So there are unrolled bodies only for what networks use (3, 4, 5 and 7 taps a row of float and of half
// types that the processor converts), and activations with an exponential are out of line. With all activations inlined
// and every body for every type, this file took 280 s of a Zen 3 core to compile at the three levels and 5.3 MB of
// objects; now it takes 65 s and 1.4 MB.
#include "kernels/depthwise.h"

#include "kernels/depthwise_nhwc.h"
#include "simd/activate.h"

namespace omniconv {
namespace ISA {
namespace {

// Whether E has unrolled bodies besides those that take any number of taps.
template <class E> constexpr bool kUnrolled = kConvertsHalves;
template <> constexpr bool kUnrolled<float> = true;
template <> constexpr bool kUnrolled<double> = false;

// Which columns of a block are inside: all; all but up to KW/2 at either end, which are checked; any, every one
// checked; or, of a whole row of R·S columns between (KW − 1)/2 pads, all but these, which the compiler then knows.
// AVX-512, 3x3, 1024 channels of 7x7: 21.3 us checked, 18.6 known.
enum Columns { kInside, kEdges, kChecked, kWholeRow };

// R outputs side by side, stride S, read KW taps. Column j is at x + j·C; in [from, to) it is inside.
template <class E, class A, int KW, int S, int R, Columns COLUMNS>
INLINE void add_taps(const E* x, int64_t C, int64_t from, int64_t to, const A* w, int64_t tap_step,
                     typename Vec<A>::V* sum) {
  typename Vec<A>::V tap[KW];
#pragma GCC unroll 8
  for (int t = 0; t < KW; ++t) tap[t] = load(w + t * tap_step);
  constexpr int n = (R - 1) * S + KW;
#pragma GCC unroll 40
  for (int j = 0; j < n; ++j) {
    if ((COLUMNS == kChecked || (COLUMNS == kEdges && j < KW / 2)) && j < from) continue;
    if ((COLUMNS == kChecked || (COLUMNS == kEdges && j >= n - KW / 2)) && j >= to) continue;
    if (COLUMNS == kWholeRow && (j < (KW - 1) / 2 || j >= (KW - 1) / 2 + R * S)) continue;
    const typename Vec<A>::V v = in_register(load(x + j * C));
#pragma GCC unroll 8
    for (int t = 0; t < KW; ++t)
      if (j >= t && (j - t) % S == 0 && (j - t) / S < R) sum[(j - t) / S] += tap[t] * v;
  }
}

// The same for any stride, dilation, padding mode and number of taps: every column's offset is looked up.
template <class E, class A, int R>
INLINE void add_taps_by_offset(const DepthwiseGeometry& g, const E* x, const int64_t* offset, const A* w, int64_t C,
                               typename Vec<A>::V* sum) {
  for (int64_t t = 0; t < g.kernel[2]; ++t) {
    const typename Vec<A>::V tap = load(w + t * C);
    const int64_t* column = offset + t * g.dilation[2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      if (column[r * g.stride[2]] >= 0) sum[r] += tap * load(x + column[r * g.stride[2]]);
  }
}

// Activates R vectors of sums, side by side: one after the other they took 10 to 15 % of a 3x3 or 5x5 layer.
template <class A, int R> INLINE void activate_each(typename Vec<A>::V* sum, Activation activation) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = activate<A>(sum[r], activation);
}

// Those with an exponential, out of line: they take more code than the sums of a block.
template <class A, int R>
__attribute__((noinline)) void activate_curved(typename Vec<A>::V* sum, Activation activation) {
  switch (activation) {
    case kSilu: return activate_each<A, R>(sum, kSilu);
    case kGelu: return activate_each<A, R>(sum, kGelu);
    default: return activate_each<A, R>(sum, kSigmoid);
  }
}

// Outputs [o, o + R) of a row of one vector of channels, c elements into each.
template <class E, class A, int KW, int S, int R, Columns COLUMNS>
INLINE void forward_block(const Rows<E, A>& rows, int64_t o, int64_t c, const A* bias, E* y) {
  typedef typename Vec<A>::V V;
  const DepthwiseGeometry& g = rows.g;
  V sum[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r] = bias ? load(bias + c) : V{};
  const int64_t first = rows.first_column + o * S, C = rows.C, step = rows.tap_step, output_step = rows.output_step;
  for (int64_t i = 0; i < rows.count; ++i) {
    const E* x = rows.tap_rows[i].x + c;
    const A* w = rows.tap_rows[i].w + c + rows.first_tap;
    if constexpr (KW > 0) {
      add_taps<E, A, KW, S, R, COLUMNS>(x + first * C, C, -first, g.in[2] - first, w, step, sum);
    } else if constexpr (S == 1) {
      int64_t t = 0, p = first;
      for (; t + 7 <= rows.taps; t += 7, p += 7)
        add_taps<E, A, 7, 1, R, COLUMNS>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
      for (; t + 4 <= rows.taps; t += 4, p += 4)
        add_taps<E, A, 4, 1, R, COLUMNS>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
      for (; t + 2 <= rows.taps; t += 2, p += 2)
        add_taps<E, A, 2, 1, R, COLUMNS>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
      if (t < rows.taps) add_taps<E, A, 1, 1, R, COLUMNS>(x + p * C, C, -p, g.in[2] - p, w + t * step, step, sum);
    } else {
      add_taps_by_offset<E, A, R>(g, x, rows.offset + o * g.stride[2], w, C, sum);
    }
  }
  switch (g.activation) {
    case kNone: break;
    case kRelu: activate_each<A, R>(sum, kRelu); break;
    case kRelu6: activate_each<A, R>(sum, kRelu6); break;
    case kHardswish: activate_each<A, R>(sum, kHardswish); break;
    default: {
      V finished[R];  // a copy: sums whose address is taken would not stay in registers
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) finished[r] = sum[r];
      activate_curved<A, R>(finished, g.activation);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] = finished[r];
    }
  }
  E* to = y + o * output_step + c;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) store(to + r * output_step, sum[r]);
}

// Outputs [begin, end) of a row, of any number and one by one.
template <class E, class A, int S>
__attribute__((noinline)) void forward_outputs(const Rows<E, A>& rows, int64_t begin, int64_t end, int64_t c,
                                               const A* bias, E* y) {
  for (int64_t o = begin; o < end; ++o) forward_block<E, A, 0, S, 1, kChecked>(rows, o, c, bias, y);
}

template <class E, class A, int KW, int S>
void forward_row(const Rows<E, A>& rows, int64_t begin, int64_t end, int64_t c, const A* bias, E* y);

// Outputs [o, o + R) of a row by the body for the columns that they read.
template <class E, class A, int KW, int S, int R>
INLINE void forward_columns(const Rows<E, A>& rows, int64_t o, int64_t c, const A* bias, E* y) {
  if (S > 0 && o >= rows.interior_begin && o + R <= rows.interior_end)
    return forward_block<E, A, KW, S, R, kInside>(rows, o, c, bias, y);
  if constexpr (KW == 0) {
    forward_block<E, A, KW, S, R, kChecked>(rows, o, c, bias, y);
  } else {
    const int64_t first = rows.first_column + o * S, past = first + (R - 1) * S + KW - rows.g.in[2];
    if (-first <= KW / 2 && past <= KW / 2) forward_block<E, A, KW, S, R, kEdges>(rows, o, c, bias, y);
    else forward_row<E, A, 0, S == 1>(rows, o, o + R, c, bias, y);
  }
}

// Outputs [begin, end) of a row. KW taps with stride S; KW = 0: any number of taps; S = 0: any stride and dilation.
template <class E, class A, int KW, int S>
void forward_row(const Rows<E, A>& rows, int64_t begin, int64_t end, int64_t c, const A* bias, E* y) {
  const int64_t n = end - begin;
  if (n < kBlock) return forward_outputs<E, A, S == 1>(rows, begin, end, c, bias, y);
  if constexpr (KW >= 3 && KW % 2 && S > 0) {
    if (rows.first_column == -(KW - 1) / 2 && rows.g.in[2] == n * S && n == rows.g.out[2]) {
      if (n == kWideBlock) return forward_block<E, A, KW, S, kWideBlock, kWholeRow>(rows, begin, c, bias, y);
      if (n == kBlock) return forward_block<E, A, KW, S, kBlock, kWholeRow>(rows, begin, c, bias, y);
    }
  }
  for (int64_t o = begin; o < end;) {
    // the last block ends where the row does and makes some outputs twice
    const int64_t many = end - o > kBlock && n >= kWideBlock ? kWideBlock : kBlock, from = min64(o, end - many);
    if (many == kWideBlock) forward_columns<E, A, KW, S, kWideBlock>(rows, from, c, bias, y);
    else forward_columns<E, A, KW, S, kBlock>(rows, from, c, bias, y);
    o = from + many;
  }
}

// The body that adds `taps` taps a row with stride 1.
template <class E, class A> auto forward_row_of(int64_t taps) {
  if constexpr (kUnrolled<E>) {
    if (taps == 1) return forward_row<E, A, 1, 1>;
    if (taps == 2) return forward_row<E, A, 2, 1>;
    if (taps == 3) return forward_row<E, A, 3, 1>;
  }
  return forward_row<E, A, 0, 1>;
}

// Outputs [begin, end) of a row of a dilated input, phase by phase: none of the zeros between its elements is
// multiplied.
template <class E, class A>
void forward_dilated_phases(Rows<E, A> rows, int64_t begin, int64_t end, int64_t c, const A* bias, E* y) {
  const DepthwiseGeometry& g = rows.g;
  const int64_t input_dilation = g.spread[2], before = g.before[2];
  for (int64_t q = 0; q < input_dilation; ++q) {
    const int64_t tap = ((before - q) % input_dilation + input_dilation) % input_dilation;
    rows.first_tap = tap * rows.C;
    rows.taps = tap < g.kernel[2] ? (g.kernel[2] - tap + input_dilation - 1) / input_dilation : 0;
    rows.first_column = (q - before + tap) / input_dilation;
    rows.interior_begin = max64(0, -rows.first_column);
    rows.interior_end = max64(0, g.in[2] - rows.first_column - rows.taps + 1);
    // the r-th output of a phase is q + r·input_dilation
    const int64_t from = max64(0, (begin - q + input_dilation - 1) / input_dilation);
    const int64_t to = (end - q + input_dilation - 1) / input_dilation;
    if (from < to) forward_row_of<E, A>(rows.taps)(rows, from, to, c, bias, y + q * rows.C);
  }
}

template <class E, class A, int KW, int S>
void forward_tiles(const DepthwiseGeometry& g, int64_t C, int64_t first, int64_t last, int64_t o0, int64_t o1,
                   const E* x, const A* w, const A* bias, E* y, void* scratch) {
  constexpr int64_t L = Vec<A>::lanes;
  Rows<E, A> rows = make_rows<E, A>(g, C, scratch);
  auto row = [&](int64_t r, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
    E* out = y + r * g.out[2] * C;
    for (int64_t c = c0; c < c1; c += L) {
      const int64_t i = min64(c, C - L);  // the last vector goes over some channels twice
      if (KW == 0 && S == 1 && g.spread[2] > 1) forward_dilated_phases(rows, begin, end, i, bias, out);
      else forward_row<E, A, KW, S>(rows, begin, end, i, bias, out);
    }
  };
  for_each_row(rows, first, last, o0, o1, 0, C, x, w, row);
}

// The body for g: a row of plain taps with stride 1 or 2, or anything.
template <class E, class A> auto forward_tiles_of(const DepthwiseGeometry& g) {
  const bool plain = g.dilation[2] == 1 && g.mode == kZeros;
  if constexpr (kUnrolled<E>) {
    if (plain && g.spread[2] == 1 && g.stride[2] <= 2) {
      switch (g.kernel[2] * 10 + g.stride[2]) {
        case 31: return forward_tiles<E, A, 3, 1>;
        case 32: return forward_tiles<E, A, 3, 2>;
        case 41: return forward_tiles<E, A, 4, 1>;
        case 51: return forward_tiles<E, A, 5, 1>;
        case 52: return forward_tiles<E, A, 5, 2>;
        case 71: return forward_tiles<E, A, 7, 1>;
      }
    }
  }
  return plain && g.stride[2] == 1 ? forward_tiles<E, A, 0, 1> : forward_tiles<E, A, 0, 0>;
}

template <class E>
void forward(const DepthwiseGeometry& g, int64_t C, int64_t first, int64_t last, int64_t o0, int64_t o1, const void* x,
             const void* w, const void* bias, void* y, void* scratch) {
  typedef typename Accumulator<E>::type A;
  const auto run = forward_tiles_of<E, A>(g);
  run(g, C, first, last, o0, o1, (const E*)x, (const A*)w, (const A*)bias, (E*)y, scratch);
}

// Adds the gradients of Q rows of taps, T taps of each from t0 on, from outputs [begin, end) of one row and one
// vector of channels.
template <class E, class A, int Q, int T>
void grad_taps(const Rows<E, A>& rows, const TapRow<E, A>* tap_rows, int64_t t0, int64_t begin, int64_t end,
               const E* grad_y, int64_t c) {
  typedef typename Vec<A>::V V;
  const DepthwiseGeometry& g = rows.g;
  const int64_t S = g.stride[2], D = g.dilation[2], C = rows.C, first = t0 * D - g.before[2];
  V sum[Q][T];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[q][t] = load(tap_rows[q].w + c + (t0 + t) * C);
  const int64_t lo = max64(begin, min64(rows.interior_begin, end)), hi = max64(lo, min64(rows.interior_end, end));
  auto edge = [&](int64_t from, int64_t to) {
    for (int64_t o = from; o < to; ++o) {
      const V v = load(grad_y + o * C + c);
      const int64_t* offset = rows.offset + o * S + t0 * D;
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          if (offset[t * D] >= 0) sum[q][t] += v * load(tap_rows[q].x + c + offset[t * D]);
    }
  };
  edge(begin, lo);
  for (int64_t o = lo; o < hi; ++o) {
    const V v = load(grad_y + o * C + c);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[q][t] += v * load(tap_rows[q].x + c + (first + o * S + t * D) * C);
  }
  edge(hi, end);
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store((A*)tap_rows[q].w + c + (t0 + t) * C, sum[q][t]);
}

template <class E, class A, int KW, int Q>
INLINE void grad_row(const Rows<E, A>& rows, int64_t begin, int64_t end, const E* grad_y, int64_t c) {
  int64_t i = 0;
  const TapRow<E, A>* tap_rows = rows.tap_rows;
  if constexpr (KW > 0) {
    for (; i + Q <= rows.count; i += Q) grad_taps<E, A, Q, KW>(rows, tap_rows + i, 0, begin, end, grad_y, c);
    for (; i < rows.count; ++i) grad_taps<E, A, 1, KW>(rows, tap_rows + i, 0, begin, end, grad_y, c);
  } else {
    for (; i < rows.count; ++i) {
      int64_t t = 0;
      for (; t + 8 <= rows.g.kernel[2]; t += 8) grad_taps<E, A, 1, 8>(rows, tap_rows + i, t, begin, end, grad_y, c);
      for (; t + 4 <= rows.g.kernel[2]; t += 4) grad_taps<E, A, 1, 4>(rows, tap_rows + i, t, begin, end, grad_y, c);
      for (; t < rows.g.kernel[2]; ++t) grad_taps<E, A, 1, 1>(rows, tap_rows + i, t, begin, end, grad_y, c);
    }
  }
}

// Adds the sum of outputs [begin, end) of a row to the bias gradient: four chains, as an addition takes four cycles.
template <class E, class A>
INLINE void grad_bias_row(int64_t begin, int64_t end, const E* grad_y, int64_t C, A* grad_bias) {
  typename Vec<A>::V sum[4] = {load(grad_bias)};
  int64_t o = begin;
  for (; o + 4 <= end; o += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += load(grad_y + (o + i) * C);
  }
  for (; o < end; ++o) sum[0] += load(grad_y + o * C);
  store(grad_bias, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class E, class A, int KW, int Q>
void grad_weight_tiles(const DepthwiseGeometry& g, int64_t C, int64_t c0, int64_t c1, const E* x, const E* grad_y,
                       A* grad_weight, A* grad_bias, void* scratch) {
  Rows<E, A> rows = make_rows<E, A>(g, C, scratch);
  auto row = [&](int64_t r, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const E* grads = grad_y + r * g.out[2] * C;
    for (int64_t c = from; c < to; c += Vec<A>::lanes) {
      grad_row<E, A, KW, Q>(rows, begin, end, grads, c);
      if (grad_bias) grad_bias_row(begin, end, grads + c, C, grad_bias + c);
    }
  };
  for_each_row(rows, 0, g.out[0] * g.out[1], 0, g.out[2], c0, c1, x, (const A*)grad_weight, row);
}

template <class E, class A> auto grad_weight_tiles_of(int64_t taps) {
  if constexpr (kUnrolled<E>) {
    if (taps == 3) return grad_weight_tiles<E, A, 3, 3>;
    if (taps == 5) return grad_weight_tiles<E, A, 5, 2>;
    if (taps == 7) return grad_weight_tiles<E, A, 7, 2>;
  }
  return grad_weight_tiles<E, A, 0, 1>;
}

template <class E>
void grad_weight(const DepthwiseGeometry& g, int64_t C, int64_t c0, int64_t c1, const void* x, const void* grad_y,
                 void* grad_weight, void* grad_bias, void* scratch) {
  typedef typename Accumulator<E>::type A;
  const auto run = grad_weight_tiles_of<E, A>(g.kernel[2]);
  run(g, C, c0, c1, (const E*)x, (const E*)grad_y, (A*)grad_weight, (A*)grad_bias, scratch);
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
