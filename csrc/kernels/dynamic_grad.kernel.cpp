// The gradients of a dynamic convolution; compiled once per instruction set (CMake defines ISA, the namespace, and VECTOR_BYTES).
//
// That of the input is the same application to grad_y, of weights that are each moved to the position they reach. That of the kernels is a
// product of grad_y and x, and goes back through the softmax; its weights are made anew.
#include "kernels/dynamic_apply.h"

#ifndef ISA
#define ISA isa_base
#endif

namespace omniconv {
namespace ISA {
namespace {

// ---- the gradient of the input

// How many positions of x a tile has: their weights are those of K − 1 more outputs, so that a short tile makes many of them twice.
int64_t input_tile(const DynamicGeometry& g) { return round_up(min64(max64(256, g.dilation * (g.kernel - 1)), g.length), kUnit); }

template <class E, class A> struct GradInput {
  int64_t tile, wide;  // positions of x, and of y whose weights they need
  A *table, *moved, *most, *column;
  Span* span;
  Arena arena;
  Application<E, A> apply;

  GradInput(const DynamicGeometry& g, void* scratch)
      : tile(input_tile(g)),
        wide(round_up(min64(tile + g.dilation * (g.kernel - 1), g.outputs), kUnit) + kUnit),
        arena{uintptr_t(scratch)},
        apply((table = arena.take<A>(g.positions == 1 ? 0 : g.kernel * wide), moved = arena.take<A>(g.kernel * tile), most = arena.take<A>(wide),
               column = arena.take<A>(g.kernel + 2 * kUnit), span = arena.take<Span>(Reach(tile, g.kernel, g.dilation).rows), arena),
              g, tile, Reach(tile, g.kernel, g.dilation).rows, g.y_step == 1) {}
};

template <class E> size_t grad_input_bytes(const DynamicGeometry& g) { return GradInput<E, typename Accumulator<E>::type>(g, nullptr).arena.at; }

template <class E>
void grad_input(const DynamicGeometry& g, int64_t first, int64_t last, const void* grad_y, const void* kernels, const uint8_t* mask, void* grad_x, void* scratch) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  GradInput<E, A> f(g, scratch);
  const int64_t K = g.kernel, tile = f.tile, far = g.dilation * (K - 1), before = far - g.before;
  f.apply.from_step = g.y_step;
  f.apply.from_channel = g.y_channel;
  f.apply.to_step = g.x_step;
  f.apply.to_channel = g.x_channel;
  f.apply.activation = kNone;
  f.apply.skips = true;
  f.apply.set_bias(nullptr);
  for (int64_t s = first; s < last; s += tile) {
    const int64_t n = min64(tile, last - s), low = s - before;  // output `low` is what tap K − 1 of position s meets
    const int64_t from = min64(max64(low, 0), g.outputs), to = max64(min64(low + n + far, g.outputs), from);
    const Reach reach(n, K, g.dilation);
    const Spans spans = spans_of(g, s, n, before, g.outputs, reach, nullptr, f.span);
    E* out = (E*)grad_x + s * g.x_step;
    f.apply.run(spans, reach, f.moved, tile, n, (const E*)grad_y, out, [&](int64_t h) {
      if (g.positions == 1) {
        weigh_one(g, h, (const E*)kernels, f.column);
        drop_one(g, h, f.column);
      } else if (to > from) {
        weigh(g, h, (const E*)kernels, from, to - from, f.table, f.wide, f.most);
        drop_rows(g, h, from, to - from, f.table, f.wide);
      }
      for (int64_t i = 0; i < K; ++i) {
        // position p meets output low + i·dilation + p by tap K − 1 − i; outside of the outputs the weight is 0, whatever the numbers hold
        const int64_t base = low + i * g.dilation;
        const int64_t left = min64(max64(from - base, 0), n), right = max64(min64(to - base, n), left);
        A* row = f.moved + i * tile;
        for (int64_t p = 0; p < n; p += L) store(row + p, V{});
        const A* weights = f.table + (K - 1 - i) * f.wide + base - from;
        for (int64_t p = left; p < right; p += L)
          store_part<A>(row + p, g.positions == 1 ? broadcast(f.column[K - 1 - i]) : load_part<A>(weights + p, right - p), right - p);
      }
    });
    for (int64_t p = 0; mask && p < n; ++p)
      for (int64_t c = 0; mask[s + p] && c < g.heads * g.group; ++c) out[p * g.x_step + c * g.x_channel] = E{};
  }
}

// ---- the gradient of the kernels

// Lane l is the sum over the lanes of v[l]: as a transposition, with what would lie side by side added at once (45 operations for 16 vectors).
template <class A> INLINE typename Vec<A>::V sums(const typename Vec<A>::V* v) {
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
#if VECTOR_BYTES == 16
  return in[0];
#elif VECTOR_BYTES == 32
  return even(in[0], in[1]) + odd(in[0], in[1]);
#else
  const V a = even(in[0], in[1]) + odd(in[0], in[1]), b = even(in[2], in[3]) + odd(in[2], in[3]);
  return even(a, b) + odd(a, b);
#endif
}

// Q taps and B vectors of positions: g[i, t] += Σ_c grad_y[c, t]·x[c, t + i·step].
template <class A, int Q, int B>
FUNCTION void meet_block(const A* x, int64_t row, int64_t step, const A* grad_y, int64_t channels, A* g, int64_t stride) {
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

template <class A> void meet(const A* x, int64_t row, int64_t step, const A* grad_y, int64_t channels, int64_t K, int64_t n, A* g, int64_t stride) {
  constexpr int L = Vec<A>::lanes;
  for (int64_t t = 0; t < n; t += 2 * L) {
    int64_t i = 0;
    auto taps = [&](auto two, auto one, int64_t many) {
      for (; i + many <= K; i += many) (n - t > L ? two : one)(x + i * step + t, row, step, grad_y + t, channels, g + i * stride + t, stride);
    };
    if (VECTOR_BYTES == 64) taps(meet_block<A, 8, 2>, meet_block<A, 8, 1>, 8);
    taps(meet_block<A, 4, 2>, meet_block<A, 4, 1>, 4);
    taps(meet_block<A, 2, 2>, meet_block<A, 2, 1>, 2);
    taps(meet_block<A, 1, 2>, meet_block<A, 1, 1>, 1);
  }
}

// R outputs and Q taps, channels in the lanes: g[q, r] += Σ_c grad_y[r, c]·x[r + q·step, c].
template <class A, int R, int Q>
FUNCTION void rows_block(const A* const* x, int64_t step, const A* grad_y, int64_t y_step, int64_t channels, A* g, int64_t stride) {
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
  for (int s = 0; s < all; s += L) store(made + s, sums<A>(sum + s));
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) g[q * stride + r] += made[q * R + r];
}

constexpr int kMeet = VECTOR_BYTES == 64 ? 4 : 2;  // outputs of a block, of four taps

// All n outputs, of the taps that meet a row which is seen; g is added to.
template <class A>
void meet_rows(const A* const* x, const Reach& reach, const Seen& seen, const A* grad_y, int64_t y_step, int64_t channels, int64_t n, A* g, int64_t stride) {
  int64_t t = 0;
  auto outputs = [&](auto four, auto three, auto two, auto one, int64_t many) {
    for (; t + many <= n; t += many) {
      const Taps taps = taps_of(reach, seen, t, many);
      int64_t i = taps.first;
      auto run = [&](auto block, int64_t Q) { block(x + t + i * reach.step, reach.step, grad_y + t * y_step, y_step, channels, g + i * stride + t, stride), i += Q; };
      while (i + 4 <= taps.last) run(four, 4);
      if (i + 3 <= taps.last) run(three, 3);
      if (i + 2 <= taps.last) run(two, 2);
      if (i < taps.last) run(one, 1);
    }
  };
  if (kMeet > 2) outputs(rows_block<A, 4, 4>, rows_block<A, 4, 3>, rows_block<A, 4, 2>, rows_block<A, 4, 1>, 4);
  outputs(rows_block<A, 2, 4>, rows_block<A, 2, 3>, rows_block<A, 2, 2>, rows_block<A, 2, 1>, 2);
  outputs(rows_block<A, 1, 4>, rows_block<A, 1, 3>, rows_block<A, 1, 2>, rows_block<A, 1, 1>, 1);
}

// R outputs meet W vectors of the positions of x: to[r, p − r] += Σ_c grad_y[c, r]·x[c, p], the taps of an output in a row of `to`.
template <class A, int R, int W>
FUNCTION void product_block(const A* x, int64_t row, const A* grad_y, int64_t channel, int64_t step, int64_t channels, A* to, int64_t to_row) {
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

constexpr int kRows = VECTOR_BYTES == 64 ? 8 : 4;  // outputs of a block, of three vectors of positions

// R outputs of K taps, of which x is 0 outside of positions [low, high).
template <class A, int R>
void product_rows(const A* x, int64_t row, int64_t low, int64_t high, const A* grad_y, int64_t channel, int64_t step, int64_t channels, int64_t K, A* to,
                  int64_t to_row) {
  constexpr int L = Vec<A>::lanes;
  const int64_t end = min64(K + R - 1, high);
  for (int64_t p = max64(0, low); p < end;) {
    const int64_t vectors = min64((end - p + L - 1) / L, 3);
    (vectors == 3 ? product_block<A, R, 3> : vectors == 2 ? product_block<A, R, 2> : product_block<A, R, 1>)(x + p, row, grad_y, channel, step, channels, to + p,
                                                                                                            to_row);
    p += vectors * L;
  }
}

// All n outputs, output t at x + t.
template <class A>
void product(const A* x, int64_t row, int64_t low, int64_t high, const A* grad_y, int64_t channel, int64_t step, int64_t channels, int64_t K, int64_t n, A* to,
             int64_t to_row) {
  int64_t t = 0;
  auto rows = [&](auto block, int64_t many) {
    for (; t + many <= n; t += many) block(x + t, row, low - t, high - t, grad_y + t * step, channel, step, channels, K, to + t * to_row, to_row);
  };
  if (kRows > 4) rows(product_rows<A, kRows>, kRows);
  rows(product_rows<A, 4>, 4);
  rows(product_rows<A, 2>, 2);
  rows(product_rows<A, 1>, 1);
}

// Rows of taps, one for each of n positions, become the K rows of g, or are added to them.
template <class A, bool add> void transpose_taps(const A* from, int64_t from_row, int64_t K, int64_t n, A* g, int64_t stride) {
  constexpr int L = Vec<A>::lanes;
  for (int64_t t = 0; t < n; t += L)
    for (int64_t i = 0; i < K; i += L) {
      typename Vec<A>::V square[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) square[r] = load(from + (t + r) * from_row + i);
      ::transpose<A>(square);
      A* to = g + i * stride + t;
      if (K - i >= L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) store(to + r * stride, add ? load(to + r * stride) + square[r] : square[r]);
      } else {
        for (int r = 0; r < K - i; ++r) store(to + r * stride, add ? load(to + r * stride) + square[r] : square[r]);
      }
    }
}

// The gradient of head h's numbers at positions [t, t + n), from that of its weights.
template <class E, class A>
void through_softmax(const DynamicGeometry& g, int64_t h, const E* kernels, int64_t t, int64_t n, A* table, int64_t tile, A* most, A* met, E* grad) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  if (g.softmax) weigh(g, h, kernels, t, n, table, tile, most);
  drop_rows(g, h, t, n, met, tile);
  grad += h * g.kernel * g.positions + t;
  for (int64_t p = 0; p < n; p += L) {
    V dot{};
    for (int64_t i = 0; g.softmax && i < g.kernel; ++i) dot += load(table + i * tile + p) * load(met + i * tile + p);
    for (int64_t i = 0; i < g.kernel; ++i) {
      const V d = load(met + i * tile + p);
      store_part<A>(grad + i * g.positions + p, g.softmax ? load(table + i * tile + p) * (d - dot) : d, n - p);
    }
  }
}

// The same of one kernel for all positions, whose weights' gradients are rows of n positions, in whole vectors, to be added up.
template <class E, class A>
void through_softmax_of_one(const DynamicGeometry& g, int64_t h, const E* kernels, A* column, A* met, int64_t tile, int64_t n, E* grad) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t K = g.kernel;
  weigh_one(g, h, kernels, column);
  for (int64_t i = 0; i < K; i += L) {
    V row[L] = {};
    for (int64_t r = 0; r < min64(L, K - i); ++r)
      for (int64_t p = 0; p < n; p += L) row[r] += load(met + (i + r) * tile + p);
    store(met + i, sums<A>(row));  // over rows before these, or their first vectors
  }
  drop_one(g, h, met);
  A dot = 0;
  if (g.softmax) {
    V lanes[L] = {};
    for (int64_t i = 0; i < K; i += L) lanes[0] += load_part<A>(column + i, K - i) * load_part<A>(met + i, K - i);
    dot = sums<A>(lanes)[0];
  }
  for (int64_t i = 0; i < K; i += L) {
    const V d = load(met + i);
    store_part<A>(grad + h * K + i, g.softmax ? load(column + i) * (d - broadcast(dot)) : d, K - i);
  }
}

template <class E, class A> struct GradKernels {
  static constexpr int64_t L = Vec<A>::lanes;
  bool in_place;  // channels side by side are read where they lie
  bool products;  // of grad_y and x, whose loads serve several outputs; else tap by tap
  int64_t tile, row, pack, met_row;
  Arena arena;
  A *table, *met, *most, *column, *x, *grad_y, *taps;
  const A** rows_of_x;
  Span* span;

  GradKernels(const DynamicGeometry& g, void* scratch)
      : in_place(sizeof(E) == sizeof(A) && g.x_channel == 1 && g.y_channel == 1 && g.group % L == 0 && few_sums(g)),
        products(!in_place && g.dilation == 1 && g.group >= 16 && (g.kernel >= 8 || g.x_step != 1)), tile(tile_of<A>(g, 12288)), arena{uintptr_t(scratch)} {
    const int64_t rows = Reach(tile, g.kernel, g.dilation).rows;
    row = round_up(rows, kUnit) + 3 * kUnit + Vec<float>::lanes;
    pack = products ? 2 * kPack : kPack;
    met_row = ((kMargin + g.kernel + kRows + 2 * L - 1) / L | 1) * L;  // an odd number of vectors: L1 would hold few rows of another
    table = arena.take<A>(g.kernel * tile);
    met = arena.take<A>((g.positions == 1 ? g.heads : 1) * g.kernel * tile);
    most = arena.take<A>(tile);
    column = arena.take<A>(g.kernel + 2 * kUnit);
    x = arena.take<A>(in_place ? g.group : pack * row);  // in place: zeros
    grad_y = arena.take<A>(in_place ? 0 : pack * row);
    rows_of_x = arena.take<const A*>(in_place ? rows : 0);
    taps = arena.take<A>(products ? tile * met_row : 0);
    span = arena.take<Span>(rows);
  }
  // Three operations a sum, against two transpositions of what the sums are made from and products with what no tap meets.
  static bool few_sums(const DynamicGeometry& g) {
    const int64_t met = g.dilation == 1 ? round_up(g.kernel + kRows - 1, L) : 2 * g.kernel;
    return 3 * g.kernel <= (12 + met - g.kernel) * (g.group / L);
  }
  static constexpr int64_t kMargin = 16;  // before the first tap: what the later outputs of a block do not read
};

template <class E> size_t grad_kernels_bytes(const DynamicGeometry& g) { return GradKernels<E, typename Accumulator<E>::type>(g, nullptr).arena.at; }

template <class E>
void grad_kernels(const DynamicGeometry& g, int64_t first, int64_t last, const void* grad_y, const void* x, const void* kernels, const uint8_t* mask, void* grad,
                  void* scratch) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  GradKernels<E, A> f(g, scratch);
  const int64_t K = g.kernel, tile = f.tile;
  const bool one = g.positions == 1;
  const int64_t whole = round_up(min64(tile, g.outputs), L);  // positions of `met` that a tile may fill
  for (int64_t i = 0; one && i < g.heads * K; ++i)
    for (int64_t p = 0; p < whole; p += L) store(f.met + i * tile + p, V{});
  for (int64_t c = 0; f.in_place && c < g.group; c += L) store(f.x + c, V{});
  for (int64_t t = first; t < last; t += tile) {
    const int64_t n = min64(tile, last - t);
    const Reach reach(n, K, g.dilation);
    const Spans spans = spans_of(g, t, n, g.before, g.length, reach, mask, f.span);
    Span here{0, n, t};
    const Spans outputs{&here, 1};
    if (f.in_place) {
      const Seen seen(spans, reach, K, true);
      for (int64_t h = 0; h < g.heads; ++h) {
        const int64_t c = h * g.group;
        A* met = f.met + (one ? h * K * tile : 0);
        for (int64_t i = 0; !one && i < K; ++i)
          for (int64_t p = 0; p < n; p += L) store(met + i * tile + p, V{});
        point(spans, (const A*)x + c, g.x_step, f.x, f.rows_of_x);
        meet_rows(f.rows_of_x, reach, seen, (const A*)grad_y + c + t * g.y_step, g.y_step, g.group, n, met, tile);
        if (!one) through_softmax(g, h, (const E*)kernels, t, n, f.table, tile, f.most, met, (E*)grad);
      }
      continue;
    }
    if (f.products) {
      int64_t low = reach.rows, high = 0;
      for (const Span* at = spans.span; at < spans.span + spans.count; ++at)
        if (at->from >= 0) low = min64(low, at->row), high = at->row + at->count;
      for (int64_t p = 0; p < round_up(n, L) * f.met_row; p += L) store(f.taps + p, V{});
      for (int64_t c = 0; c < g.group; c += f.pack) {
        const int64_t many = min64(f.pack, g.group - c);
        pack_channels<E, A>(spans, (const E*)x + c * g.x_channel, g.x_step, g.x_channel, many, f.x, f.row);
        const A* d = (const A*)((const E*)grad_y + c * g.y_channel + t * g.y_step);
        int64_t channel = g.y_channel, step = g.y_step;
        if (sizeof(E) != sizeof(A)) {
          pack_channels<E, A>(outputs, (const E*)grad_y + c * g.y_channel, g.y_step, g.y_channel, many, f.grad_y, f.row);
          d = f.grad_y, channel = f.row, step = 1;
        }
        product(f.x, f.row, low, high, d, channel, step, many, K, n, f.taps + f.kMargin, f.met_row);
      }
      if (one) {
        transpose_taps<A, true>(f.taps + f.kMargin, f.met_row, K, n, f.met, tile);
        continue;
      }
      transpose_taps<A, false>(f.taps + f.kMargin, f.met_row, K, n, f.met, tile);
      through_softmax(g, 0, (const E*)kernels, t, n, f.table, tile, f.most, f.met, (E*)grad);
      continue;
    }
    // heads of few channels are packed together, a head of many a part at a time
    for (int64_t c = 0; c < g.heads * g.group; c += kPack) {
      const int64_t many = min64(kPack, g.heads * g.group - c);
      pack_channels<E, A>(spans, (const E*)x + c * g.x_channel, g.x_step, g.x_channel, many, f.x, f.row);
      pack_channels<E, A>(outputs, (const E*)grad_y + c * g.y_channel, g.y_step, g.y_channel, many, f.grad_y, f.row);
      for (int64_t h = 0; h < g.heads; ++h) {
        A* met = f.met + (one ? h * K * tile : 0);
        for (int64_t p = 0; !one && c == 0 && p < K * tile; p += L) store(met + p, V{});
        meet(f.x + h * g.group * f.row, f.row, reach.step, f.grad_y + h * g.group * f.row, g.heads == 1 ? many : g.group, K, n, met, tile);
        if (!one && c + kPack >= g.heads * g.group)
          through_softmax(g, h, (const E*)kernels, t, n, f.table, tile, f.most, met, (E*)grad);
      }
    }
  }
  for (int64_t h = 0; one && h < g.heads; ++h) through_softmax_of_one(g, h, (const E*)kernels, f.column, f.met + h * K * tile, tile, whole, (E*)grad);
}

}  // namespace

extern const DynamicGradTables dynamic_grad;
#define OMNICONV_KERNELS(E) \
  {grad_input_bytes<E>, grad_input<E>, grad_kernels_bytes<E>, grad_kernels<E>}
const DynamicGradTables dynamic_grad = {OMNICONV_KERNELS(float), OMNICONV_KERNELS(double), OMNICONV_KERNELS(bf16), OMNICONV_KERNELS(f16)};

}  // namespace ISA
}  // namespace omniconv
