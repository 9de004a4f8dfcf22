// Weights of a tile of positions, applied. Included by kernels only; internal linkage.
//
// There are two arithmetics, which give the same bits: with channels in the lanes (`across`) every load is aligned or a whole row's, and a
// weight is broadcast; with positions in the lanes (`along`) the weights are vectors too, and nothing of a contiguous sequence is transposed.
// What a tile reads is found through a pointer for each of its rows: to where it lies, if its channels lie side by side; else to a copy,
// widened; or to zeros for what is padded or masked. What follows is arithmetic without a case.
#pragma once
#include "kernels/dynamic_tile.h"
#include "simd/activate.h"

namespace omniconv {
namespace {

#define FUNCTION __attribute__((noinline))  // of its own for its registers

constexpr int kBlock = VECTOR_BYTES == 64 ? 8 : 6;     // positions whose sums are held at once, of two vectors of channels
constexpr int kChannels = VECTOR_BYTES == 64 ? 8 : 4;  // channels whose sums are held at once, of two vectors of positions
constexpr int64_t kPack = 16;                          // channels of a tile with positions in the lanes
constexpr int64_t kUnit = 32;                          // tiles are multiples of it: two of the widest vectors

// Positions whose weights, and what makes them, stay in `bytes`.
template <class A> int64_t tile_of(const DynamicGeometry& g, int64_t bytes) {
  const int64_t most = min64(128, round_up(g.outputs, kUnit));
  return max64(kUnit, min64(most, bytes / (g.kernel * int64_t(sizeof(A))) / kUnit * kUnit));
}

template <int n> struct Count { static constexpr int value = n; };

// ---- channels in the lanes

// R positions meet Q taps: a row is loaded once for all of them.
template <class A, int W, int R, int Q> INLINE void slide(const A* const* rows, int64_t c, const A* w, int64_t stride, typename Vec<A>::V (*sum)[W]) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
#pragma GCC unroll 16
  for (int j = 0; j < R + Q - 1; ++j) {
    const A* x = rows[j] + c;
    V row[W];
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) row[v] = in_register(load(x + v * L));
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
      if (j >= q && j - q < R) {
        V tap = broadcast(w[q * stride + j - q]);
        if (W > 1) tap = in_register(tap);
#pragma GCC unroll 2
        for (int v = 0; v < W; ++v) sum[j - q][v] += tap * row[v];
      }
  }
}

// R positions of W vectors of channels from c on; tap i of position p meets row p + i·step.
template <class A, int W, int R>
FUNCTION void across_block(const A* const* rows, int64_t c, int64_t step, const A* w, int64_t stride, Taps taps, const A* bias, Activation a, A* y, int64_t y_step) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V sum[R][W];
#pragma GCC unroll 8
  for (int p = 0; p < R; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) sum[p][v] = load(bias + v * L);
  int64_t i = taps.first;
  if (step == 1) {
    if constexpr (R > 1) {
      for (; i + 4 <= taps.last; i += 4) slide<A, W, R, 4>(rows + i, c, w + i * stride, stride, sum);
      if (i + 2 <= taps.last) slide<A, W, R, 2>(rows + i, c, w + i * stride, stride, sum), i += 2;
    }
    for (; i < taps.last; ++i) slide<A, W, R, 1>(rows + i, c, w + i * stride, stride, sum);
  } else {
    for (; i < taps.last; ++i) slide<A, W, R, 1>(rows + i * step, c, w + i * stride, stride, sum);
  }
  if (a != kNone) {
#pragma GCC unroll 8
    for (int p = 0; p < R; ++p)
#pragma GCC unroll 2
      for (int v = 0; v < W; ++v) sum[p][v] = activate<A>(sum[p][v], a);
  }
#pragma GCC unroll 8
  for (int p = 0; p < R; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) store(y + p * y_step + v * L, sum[p][v]);
}

// ---- positions in the lanes

// B vectors of positions of C channels; tap i of position p meets element p + i·step of a row.
template <class A, int C, int B>
FUNCTION void along_block(const A* x, int64_t row, int64_t step, const A* w, int64_t stride, int64_t K, const A* bias, Activation a, A* y, int64_t y_row) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V sum[C][B];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sum[c][b] = broadcast(bias[c]);
  for (int64_t i = 0; i < K; ++i, x += step, w += stride)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const V tap = in_register(load(w + b * L));
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c][b] += tap * load(x + c * row + b * L);
    }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store(y + c * y_row + b * L, a == kNone ? sum[c][b] : activate<A>(sum[c][b], a));
}

// `channels` rows of n positions, in whole vectors.
template <class A>
void along(const A* x, int64_t row, const Reach& reach, const Seen& seen, const A* w, int64_t stride, int64_t n, int64_t channels, const A* bias, Activation a, A* y,
           int64_t y_row) {
  constexpr int L = Vec<A>::lanes;
  int64_t c = 0;
  auto rows = [&](auto two, auto one, int64_t many) {
    for (; c + many <= channels; c += many)
      for (int64_t t = 0; t < n; t += 2 * L) {
        const Taps taps = taps_of(reach, seen, t, min64(2 * L, n - t));
        const int64_t i = taps.first;
        (n - t > L ? two : one)(x + c * row + t + i * reach.step, row, reach.step, w + i * stride + t, stride, taps.last - i, bias + c, a, y + c * y_row + t, y_row);
      }
  };
  rows(along_block<A, kChannels, 2>, along_block<A, kChannels, 1>, kChannels);
  if (kChannels > 4) rows(along_block<A, 4, 2>, along_block<A, 4, 1>, 4);
  rows(along_block<A, 2, 2>, along_block<A, 2, 1>, 2);
  rows(along_block<A, 1, 2>, along_block<A, 1, 1>, 1);
}

// ---- an application: of the weights in a table, to what the spans of a tile name

template <class E, class A> struct Application {
  int64_t K, heads, group;
  int64_t from_step, from_channel, to_step, to_channel;
  Activation activation;
  bool lanes_are_channels;
  bool skips;  // taps that reach no row but zeros are passed over: nothing changes where weights are finite
  // scratch
  A *in, *out, *shift, *zeros;
  const A** row;
  int64_t in_row;

  static constexpr int64_t L = Vec<A>::lanes;

  Application(Arena& arena, const DynamicGeometry& g, int64_t tile, int64_t rows, bool in_time)
      : K(g.kernel), heads(g.heads), group(g.group), lanes_are_channels(group * 2 > L && !(in_time && K < 8)) {
    in_row = round_up(rows, kUnit) + 3 * kUnit + Vec<float>::lanes;  // no power of two: L1 would hold few of such rows
    in = arena.take<A>(max64(kPack * in_row, (rows + L) * 2 * L));
    out = arena.take<A>(max64(kPack, 2 * L) * tile);
    shift = arena.take<A>(round_up(heads * group, kPack) + 2 * L);
    zeros = arena.take<A>(round_up(group, 2 * L));
    row = arena.take<const A*>(rows);
  }
  // Rows are read, and outputs written, where they lie.
  bool in_place() const { return sizeof(E) == sizeof(A) && from_channel == 1 && to_channel == 1 && group % L == 0; }
  // In two loops: of a condition in one the compiler makes masked loads from null, which the processor mends one at a time (0.7 µs a call).
  void set_bias(const A* bias) {
    const int64_t given = bias ? heads * group : 0;
    for (int64_t c = 0; c < given; ++c) shift[c] = bias[c] + A(0);  // −0 becomes 0: so does a sum that meets zeros
    for (int64_t c = given; c < round_up(heads * group, kPack) + 2 * L; ++c) shift[c] = A(0);
    for (int64_t c = 0; in_place() && c < group; ++c) zeros[c] = A(0);
  }
  // f(block, p): positions in blocks as large as they fit.
  template <class F> static void blocks(int64_t n, const F& f) {
    int64_t p = 0;
    for (; p + kBlock <= n; p += kBlock) f(Count<kBlock>{}, p);
    for (; p + 3 <= n; p += 3) f(Count<3>{}, p);
    for (; p < n; ++p) f(Count<1>{}, p);
  }
  // Channels [c, end) where they lie, a block of positions after another: rows are read, and outputs written, from one end to the other.
  void across(const Spans& spans, const Reach& reach, const Seen& seen, const A* table, int64_t stride, int64_t n, const A* x, int64_t c, int64_t end, A* y) const {
    point(spans, x + c, from_step, zeros, row);
    blocks(n, [&](auto block, int64_t p) {
      constexpr int R = decltype(block)::value;
      const Taps taps = taps_of(reach, seen, p, R);
      int64_t v = 0;
      for (; v + 2 * L <= end - c; v += 2 * L)
        across_block<A, 2, R>(row + p, v, reach.step, table + p, stride, taps, shift + c + v, activation, y + p * to_step + c + v, to_step);
      if (v < end - c) across_block<A, 1, R>(row + p, v, reach.step, table + p, stride, taps, shift + c + v, activation, y + p * to_step + c + v, to_step);
    });
  }
  // W vectors of channels, or as many of them as there are before channel `end`, copied first.
  template <int W>
  void across(const Spans& spans, const Reach& reach, const Seen& seen, const A* table, int64_t stride, int64_t n, const E* x, int64_t c, int64_t end, E* y) const {
    const int64_t many = min64(W * L, end - c);
    pack_rows<E, A, W>(spans, x, from_step, from_channel, c, end, in);
    for (int64_t r = 0; r < reach.rows; ++r) row[r] = in + r * W * L;
    E* to = y + c * to_channel;
    const bool direct = sizeof(E) == sizeof(A) && to_channel == 1 && many == W * L;
    A* made = direct ? (A*)to : out;
    const int64_t step = direct ? to_step : W * L;
    blocks(n, [&](auto block, int64_t p) {
      constexpr int R = decltype(block)::value;
      across_block<A, W, R>(row + p, 0, reach.step, table + p, stride, taps_of(reach, seen, p, R), shift + c, activation, made + p * step, step);
    });
    if (direct) return;
    if (to_channel == 1) {
      for (int64_t t = 0; t < n; ++t)
        for (int64_t v = 0; v * L < many; ++v) store_part<A>(to + t * to_step + v * L, load(out + (t * W + v) * L), many - v * L);
      return;
    }
    unpack(out, W * L, n, many, to, to_channel);
  }
  // Squares of a matrix (rows, columns) become squares of its transpose, whose rows are elements.
  static void unpack(const A* from, int64_t from_row, int64_t rows, int64_t columns, E* to, int64_t to_row) {
    typename Vec<A>::V square[L];
    for (int64_t r = 0; r < rows; r += L)
      for (int64_t c = 0; c < columns; c += L) {
        const int64_t n = min64(L, rows - r), m = min64(L, columns - c);
        if (n == L && m == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load(from + (r + i) * from_row + c);
          ::transpose<A>(square);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(to + (c + i) * to_row + r, square[i]);
        } else {
          for (int i = 0; i < L; ++i) square[i] = load(from + (r + (i < n ? i : 0)) * from_row + c);
          ::transpose<A>(square);
          for (int i = 0; i < m; ++i) store_part<A>(to + (c + i) * to_row + r, square[i], n);
        }
      }
  }
  // x is the first position and channel of the sequence, y of the tile; weigh(h) fills the table for head h.
  template <class F> void run(const Spans& spans, const Reach& reach, const A* table, int64_t stride, int64_t n, const E* x, E* y, const F& weigh) const {
    const Seen seen(spans, reach, K, skips);
    for (int64_t h = 0; lanes_are_channels && h < heads; ++h) {
      weigh(h);
      int64_t c = h * group;
      const int64_t end = c + group;
      if (in_place()) {
        across(spans, reach, seen, table, stride, n, (const A*)x, c, end, (A*)y);
        continue;
      }
      for (; end - c > L; c += 2 * L) across<2>(spans, reach, seen, table, stride, n, x, c, end, y);
      if (c < end) across<1>(spans, reach, seen, table, stride, n, x, c, end, y);
    }
    if (lanes_are_channels) return;
    const int64_t whole = round_up(n, 2 * L);
    if (heads == 1) weigh(0);
    for (int64_t c = 0; c < heads * group; c += kPack) {
      const int64_t many = min64(kPack, heads * group - c);
      pack_channels<E, A>(spans, x + c * from_channel, from_step, from_channel, many, in, in_row);
      E* to = y + c * to_channel;
      const bool direct = sizeof(E) == sizeof(A) && to_step == 1 && n % L == 0;
      A* made = direct ? (A*)to : out;
      const int64_t row = direct ? to_channel : whole;
      if (heads == 1) along<A>(in, in_row, reach, seen, table, stride, n, many, shift + c, activation, made, row);
      for (int64_t h = 0; heads > 1 && h < heads; ++h) {  // few channels in all: one pack
        weigh(h);
        along<A>(in + h * group * in_row, in_row, reach, seen, table, stride, n, group, shift + h * group, activation, made + h * group * row, row);
      }
      if (direct) continue;
      if (to_step != 1) {
        unpack(out, whole, many, n, to, to_step);
        continue;
      }
      for (int64_t i = 0; i < many; ++i)
        for (int64_t t = 0; t < n; t += L) store_part<A>(to + i * to_channel + t, load(out + i * whole + t), n - t);
    }
  }
};

}  // namespace
}  // namespace omniconv
