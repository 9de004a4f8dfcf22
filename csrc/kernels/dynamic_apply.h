// Weights of a tile of positions, applied. Included by kernels only; internal linkage.
//
// There are two arithmetics, which give the same bits: with channels in the lanes every load is aligned or a whole
// row's, and a weight is broadcast; with positions in the lanes the weights are vectors too, and nothing of a
// contiguous sequence is transposed. What a tile reads is found through a pointer for each of its rows: to where it
// lies, if its channels lie side by side; else to a copy, widened; or to zeros for what is padded or masked. What
// follows is arithmetic without a case, of the sums' type only.
#pragma once
#include "kernels/dynamic_tile.h"
#include "simd/activate_rows.h"

namespace omniconv {
namespace {

constexpr int kBlock =
    kVectorRegisters == 32 ? 8 : 6;  // positions whose sums are held at once, of two vectors of channels
constexpr int kChannels =
    kVectorRegisters == 32 ? 8 : 4;  // channels whose sums are held at once, of two vectors of positions
constexpr int64_t kPack = 16;        // channels of a tile with positions in the lanes
constexpr int64_t kUnit = 32;        // tiles are multiples of it: two of the widest vectors

// Positions whose weights, and what makes them, stay in `bytes`.
template <class A> int64_t tile_of(const DynamicGeometry& g, int64_t bytes) {
  const int64_t limit = min64(128, round_up(g.outputs, kUnit));
  return max64(kUnit, min64(limit, bytes / (g.kernel * int64_t(sizeof(A))) / kUnit * kUnit));
}

// ---- channels in the lanes

// R positions meet Q taps: a row is loaded once for all of them.
template <class A, int W, int R, int Q>
INLINE void add_taps(const A* const* rows, int64_t c, const A* w, int64_t stride, typename Vec<A>::V (*sum)[W]) {
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
NOINLINE void channel_block(const A* const* rows, int64_t c, int64_t step, const A* w, int64_t stride, Taps taps,
                            const A* bias, A* y, int64_t y_step) {
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
      for (; i + 4 <= taps.last; i += 4) add_taps<A, W, R, 4>(rows + i, c, w + i * stride, stride, sum);
      if (i + 2 <= taps.last) add_taps<A, W, R, 2>(rows + i, c, w + i * stride, stride, sum), i += 2;
    }
    for (; i < taps.last; ++i) add_taps<A, W, R, 1>(rows + i, c, w + i * stride, stride, sum);
  } else {
    for (; i < taps.last; ++i) add_taps<A, W, R, 1>(rows + i * step, c, w + i * stride, stride, sum);
  }
#pragma GCC unroll 8
  for (int p = 0; p < R; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < W; ++v) store(y + p * y_step + v * L, sum[p][v]);
}

// ---- positions in the lanes

// B vectors of positions of C channels; tap i of position p meets element p + i·step of a row.
template <class A, int C, int B>
NOINLINE void position_block(const A* x, int64_t row, int64_t step, const A* w, int64_t stride, int64_t K,
                             const A* bias, A* y, int64_t y_row) {
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
    for (int b = 0; b < B; ++b) store(y + c * y_row + b * L, sum[c][b]);
}

template <class A> using PositionBlock = void (*)(const A*, int64_t, int64_t, const A*, int64_t, int64_t, const A*, A*,
                                                  int64_t);
template <class A> struct PositionBlocks {
  int64_t channels;
  PositionBlock<A> two, one;
};

// `channels` rows of n positions, in whole vectors.
template <class A>
NOINLINE void apply_to_positions(const A* x, int64_t row, const TileInput& input, const NonzeroRows& nonzero,
                                 const A* w, int64_t stride, int64_t n, int64_t channels, const A* bias,
                                 Activation activation, A* y, int64_t y_row) {
  constexpr int L = Vec<A>::lanes;
  static constexpr PositionBlocks<A> blocks[] = {
      {kChannels, position_block<A, kChannels, 2>, position_block<A, kChannels, 1>},
      {4, position_block<A, 4, 2>, position_block<A, 4, 1>},
      {2, position_block<A, 2, 2>, position_block<A, 2, 1>},
      {1, position_block<A, 1, 2>, position_block<A, 1, 1>}};
  const PositionBlocks<A>* block = blocks;
  for (int64_t c = 0; c < channels; c += block->channels) {
    while (block->channels > channels - c) ++block;
    for (int64_t t = 0; t < n; t += 2 * L) {
      const Taps taps = taps_of(input, nonzero, t, min64(2 * L, n - t));
      const int64_t i = taps.first;
      (n - t > L ? block->two : block->one)(x + c * row + t + i * input.step, row, input.step, w + i * stride + t,
                                            stride, taps.last - i, bias + c, y + c * y_row + t, y_row);
    }
  }
  activate_rows(y, channels, y_row, (n + L - 1) / L, activation);
}

// ---- both

// A function of a head, by reference.
struct HeadFunction {
  const void* context;
  void (*call)(const void*, int64_t);
  template <class F>
  HeadFunction(const F& f) : context(&f), call([](const void* c, int64_t head) { (*(const F*)c)(head); }) {}
  void operator()(int64_t head) const { call(context, head); }
};

// The convolution of a tile by the weights in a table; what it reads the segments of the tile name.
template <class A> struct TileConvolution {
  const Edges<A>& edges;
  int64_t K, heads, group;
  int64_t from_step, from_channel, to_step, to_channel;
  Activation activation;
  bool lanes_are_channels;
  bool skips;  // taps that reach no row but zeros are passed over: nothing changes where weights are finite
  // scratch
  A *packed, *sums, *bias, *zeros;
  const A** row;
  int64_t packed_row;

  static constexpr int64_t L = Vec<A>::lanes;

  TileConvolution(Arena& arena, const DynamicGeometry& g, const Edges<A>& edges, int64_t tile, int64_t rows,
                  bool in_time)
      : edges(edges),
        K(g.kernel),
        heads(g.heads),
        group(g.group),
        lanes_are_channels(group * 2 > L && !(in_time && K < 8)) {
    packed_row =
        round_up(rows, kUnit) + 3 * kUnit + Vec<float>::lanes;  // no power of two: L1 would hold few of such rows
    packed = arena.take<A>(max64(kPack * packed_row, (rows + L) * 2 * L));
    sums = arena.take<A>(max64(kPack, 2 * L) * tile);
    bias = arena.take<A>(round_up(heads * group, kPack) + 2 * L);
    zeros = arena.take<A>(round_up(group, 2 * L));
    row = arena.take<const A*>(rows);
  }
  // Rows are read, and outputs written, where they lie.
  bool in_place() const { return !edges.converts && from_channel == 1 && to_channel == 1 && group % L == 0; }
  // In two loops: of a condition in one the compiler makes masked loads from null, which the processor mends one at a
  // time (0.7 µs a call).
  void set_bias(const A* from) {
    const int64_t given = from ? heads * group : 0;
    for (int64_t c = 0; c < given; ++c) bias[c] = from[c] + A(0);  // −0 becomes 0: so does a sum that meets zeros
    for (int64_t c = given; c < round_up(heads * group, kPack) + 2 * L; ++c) bias[c] = A(0);
    for (int64_t c = 0; in_place() && c < group; ++c) zeros[c] = A(0);
  }
  // `vectors` of channels of the rows that are pointed to, a block of positions after another: rows are read, and
  // outputs written, from one end to the other.
  NOINLINE void apply_to_channels(const TileInput& input, const NonzeroRows& nonzero, const A* table, int64_t stride,
                                  int64_t n, int64_t vectors, const A* shift, A* y, int64_t y_step) const {
    static constexpr decltype(&channel_block<A, 2, 1>) two[] = {channel_block<A, 2, kBlock>, channel_block<A, 2, 3>,
                                                                channel_block<A, 2, 1>},
                                                       one[] = {channel_block<A, 1, kBlock>, channel_block<A, 1, 3>,
                                                                channel_block<A, 1, 1>};
    for (int64_t p = 0, R; p < n; p += R) {
      const int size = n - p >= kBlock ? 0 : n - p >= 3 ? 1 : 2;
      R = size == 0 ? kBlock : size == 1 ? 3 : 1;
      const Taps taps = taps_of(input, nonzero, p, R);
      A* to = y + p * y_step;
      int64_t v = 0;
      for (; v + 2 <= vectors; v += 2)
        two[size](row + p, v * L, input.step, table + p, stride, taps, shift + v * L, to + v * L, y_step);
      if (v < vectors)
        one[size](row + p, v * L, input.step, table + p, stride, taps, shift + v * L, to + v * L, y_step);
      activate_rows(to, R, y_step, vectors, activation);
    }
  }
  // Channels [c, c + many), of no more than two vectors, copied first.
  void apply_to_copy(const Segments& segments, const TileInput& input, const NonzeroRows& nonzero, const A* table,
                     int64_t stride, int64_t n, const char* x, int64_t c, int64_t many, char* y) const {
    const int64_t vectors = (many + L - 1) / L, width = vectors * L;
    edges.pack_rows(segments, x + c * from_channel * edges.element, from_step, from_channel, many, vectors, packed);
    for (int64_t r = 0; r < input.rows; ++r) row[r] = packed + r * width;
    char* to = y + c * to_channel * edges.element;
    const bool direct = !edges.converts && to_channel == 1 && many == width;
    apply_to_channels(input, nonzero, table, stride, n, vectors, bias + c, direct ? (A*)to : sums,
                      direct ? to_step : width);
    if (direct) return;
    if (to_channel == 1) edges.store_rows(sums, width, n, many, to, to_step);
    else edges.store_columns(sums, width, n, many, to, to_channel);
  }
  // x is the first position and channel of the sequence, y of the tile; make_weights(h) fills the table for head h.
  NOINLINE void run(const Segments& segments, const TileInput& input, const A* table, int64_t stride, int64_t n,
                    const void* xv, void* yv, const HeadFunction& make_weights) const {
    const char* x = (const char*)xv;
    char* y = (char*)yv;
    const NonzeroRows nonzero(segments, input, K, skips);
    for (int64_t h = 0; lanes_are_channels && h < heads; ++h) {
      make_weights(h);
      const int64_t c = h * group, end = c + group;
      if (in_place()) {
        point_rows(segments, (const A*)x + c, from_step, zeros, row);
        apply_to_channels(input, nonzero, table, stride, n, group / L, bias + c, (A*)y + c, to_step);
        continue;
      }
      for (int64_t at = c; at < end; at += 2 * L)
        apply_to_copy(segments, input, nonzero, table, stride, n, x, at, min64(2 * L, end - at), y);
    }
    if (lanes_are_channels) return;
    const int64_t whole = round_up(n, 2 * L);
    if (heads == 1) make_weights(0);
    for (int64_t c = 0; c < heads * group; c += kPack) {
      const int64_t many = min64(kPack, heads * group - c);
      edges.pack_channels(segments, x + c * from_channel * edges.element, from_step, from_channel, many, packed,
                          packed_row);
      char* to = y + c * to_channel * edges.element;
      const bool direct = !edges.converts && to_step == 1 && n % L == 0;
      A* made = direct ? (A*)to : sums;
      const int64_t made_row = direct ? to_channel : whole;
      if (heads == 1)
        apply_to_positions(packed, packed_row, input, nonzero, table, stride, n, many, bias + c, activation, made,
                           made_row);
      for (int64_t h = 0; heads > 1 && h < heads; ++h) {  // few channels in all: one pack
        make_weights(h);
        apply_to_positions(packed + h * group * packed_row, packed_row, input, nonzero, table, stride, n, group,
                           bias + h * group, activation, made + h * group * made_row, made_row);
      }
      if (direct) continue;
      if (to_step == 1) edges.store_rows(sums, whole, many, n, to, to_channel);
      else edges.store_columns(sums, whole, many, n, to, to_step);
    }
  }
};

}  // namespace
}  // namespace omniconv
