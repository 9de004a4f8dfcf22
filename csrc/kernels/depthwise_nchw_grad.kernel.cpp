// Gradient of the weight of a depthwise convolution of contiguous planes; compiled once per instruction set.
#include "kernels/depthwise_nchw.h"
#include "simd/registers.h"

namespace omniconv {
namespace ISA {
namespace {

// R rows of grad_y, STEP input rows apart, meet KH·KW taps. PART: only n columns, and no NaN beyond them.
template <class A, int KH, int KW, int R, int STEP, bool PART>
INLINE void touch(const A* gy, int64_t gy_step, const A* x, int64_t x_row, const Tap* columns, int64_t n,
                  typename Vec<A>::V (*acc)[KW]) {
  typedef typename Vec<A>::V V;
  V g[R];
#pragma GCC unroll 8
  for (int q = 0; q < R; ++q) g[q] = load(gy + q * gy_step);
#pragma GCC unroll 16
  for (int r = 0; r < STEP * (R - 1) + KH; ++r, x += x_row)
#pragma GCC unroll 8
    for (int t = 0; t < KW; ++t) {
      V v = KH > 1 ? in_register(load(x + columns[t].x)) : load(x + columns[t].x);
      if (PART) v = first<A>(v, n);
#pragma GCC unroll 4
      for (int m = 0; m < KH; ++m)
        if (r >= m && (r - m) % STEP == 0 && (r - m) / STEP < R) acc[m][t] += g[(r - m) / STEP] * v;
    }
}

// The rows of a tile: of grad_y (zeros beyond n columns) and of the input.
template <class A> struct Field {
  int64_t slices, classes, rows, n, rest;  // `rest` columns of one row more
  const A* gy;
  int64_t gy_slice, gy_row;
  const A* x;
  int64_t x_slice, x_step, x_row;
};

template <class A, int KH, int KW, int R, int STEP>
INLINE void correlate_rows(const Field<A>& f, const A* gy, const A* x, const Tap* columns,
                           typename Vec<A>::V (*acc)[KW]) {
  constexpr int L = Vec<A>::lanes;
  const int64_t gy_step = f.classes * f.gy_row;
  int64_t o = 0;
  for (; o + L <= f.n; o += L) touch<A, KH, KW, R, STEP, false>(gy + o, gy_step, x + o, f.x_row, columns, L, acc);
  if (o < f.n) touch<A, KH, KW, R, STEP, true>(gy + o, gy_step, x + o, f.x_row, columns, f.n - o, acc);
}

// The sum over lanes of each of T vectors: pairs of vectors become one, of the sums of pairs of lanes, until a lane is
// a vector's sum.
template <class A, int T> INLINE void add_lanes(const typename Vec<A>::V* v, A* sums) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  A all[(T + L - 1) / L * L];
#pragma GCC unroll 8
  for (int from = 0; from < T; from += L) {
    V s[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) s[i] = from + i < T ? v[from + i] : V{};
    int left = T - from < L ? T - from : L;
#pragma GCC unroll 4
    for (int w = L / 2; w; w /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < w; ++i)
        if (2 * i < left) s[i] = even_lanes(s[2 * i], s[2 * i + 1]) + odd_lanes(s[2 * i], s[2 * i + 1]);
        else s[i] = V{};
      left = (left + 1) / 2;
    }
    store(all + from, s[0]);
  }
  for (int t = 0; t < T; ++t) sums[t] = all[t];
}

// sums[m][t] of taps m, t over a tile. STEP 0: rows that share nothing.
template <class A, int KH, int KW, int STEP> void correlate(const Field<A>& f, const A* gy, const A* x,
                                                            const Tap* columns, A* sums) {
  typedef typename Vec<A>::V V;
  V acc[KH][KW];
#pragma GCC unroll 4
  for (int m = 0; m < KH; ++m)
#pragma GCC unroll 8
    for (int t = 0; t < KW; ++t) acc[m][t] = V{};
  for (int64_t d = 0; d < f.slices; ++d)
    for (int64_t c = 0; c < f.classes; ++c) {
      const A* of = gy + d * f.gy_slice + c * f.gy_row;
      const A* from = x + d * f.x_slice + c * f.x_step;
      int64_t i = c;
      if constexpr (STEP > 0) {
        for (; i + 3 * f.classes < f.rows;
             i += 4 * f.classes, of += 4 * f.classes * f.gy_row, from += 4 * f.classes * f.x_step)
          correlate_rows<A, KH, KW, 4, STEP>(f, of, from, columns, acc);
        if (i + f.classes < f.rows) {
          correlate_rows<A, KH, KW, 2, STEP>(f, of, from, columns, acc);
          i += 2 * f.classes, of += 2 * f.classes * f.gy_row, from += 2 * f.classes * f.x_step;
        }
      }
      for (; i < f.rows; i += f.classes, of += f.classes * f.gy_row, from += f.classes * f.x_step)
        correlate_rows<A, KH, KW, 1, 1>(f, of, from, columns, acc);
    }
  if (f.rest)
    touch<A, KH, KW, 1, 1, true>(gy + f.rows * f.gy_row, 0, x + f.rows * f.x_step, f.x_row, columns, f.rest, acc);
  add_lanes<A, KH * KW>(acc[0], sums);
}

template <class A> struct GradWeight : Plan<A> {
  static constexpr int L = Vec<A>::lanes;
  using P = Plan<A>;
  using P::g, P::l, P::arena;
  int64_t gy_row;
  A* gy;

  GradWeight(const DepthwiseGeometry& of, void* scratch) : P(of, scratch, false) {
    gy_row = round_up(l.cut[2].tile, L);
    gy = arena.template take<A>(l.cut[0].tile * l.cut[1].tile * gy_row);
  }

  template <class E> void fill_gy(const int64_t* at, const int64_t* n, const E* from, const E* end) const {
    for (int64_t i = 0; i < n[0]; ++i)
      copy_rows(from + ((at[0] + i) * g.out[1] + at[1]) * g.out[2] + at[2], g.out[2], n[2], n[1], end,
                gy + i * n[1] * gy_row, gy_row);
  }

  template <int KH, int KW, int STEP> static void add(const Field<A>& f, const A* x, const Tap* columns, A* gw,
                                                      int64_t w_row, int64_t made) {
    A sums[KH * KW];
    correlate<A, KH, KW, STEP>(f, f.gy, x, columns, sums);
    for (int m = 0; m < KH; ++m)
      for (int64_t t = made; t < KW; ++t) gw[m * w_row + t] += sums[m * KW + t];
  }
  // KH kernel rows; one or two last columns are taken with some before them, which are dropped.
  template <int KH, int STEP> static void kernel_rows(const Field<A>& f, const A* x, const Tap* columns, int64_t count,
                                                      A* gw, int64_t w_row) {
    for (int64_t t = 0; t < count;) {
      const int64_t left = count - t, wide = KH > 1 || left < 4 ? 3 : left < 7 || !kFusesMultiplyAdd ? 4 : 7;
      const int64_t at = count < 3 ? t : min64(t, count - wide);
      if (count < 3) add<KH, 1, STEP>(f, x, columns + at, gw + at, w_row, 0);
      else if (KH == 1 && wide == 7) add<1, 7, 0>(f, x, columns + at, gw + at, w_row, t - at);
      else if (KH == 1 && wide == 4) add<1, 4, 0>(f, x, columns + at, gw + at, w_row, t - at);
      else add<KH, 3, STEP>(f, x, columns + at, gw + at, w_row, t - at);
      t = at + (count < 3 ? 1 : wide);
    }
  }
  template <int STEP> void parts(const Field<A>& f, int64_t w_row, A* gw) const {
    for (int64_t i = 0; i < P::count; ++i) {
      const Part& p = P::parts[i];
      const A* x = f.x + p.x;
      A* to = gw + p.w;
      for (int64_t left = p.rows; left > 0; left -= 3, x += 3 * f.x_row, to += 3 * w_row) {
        if (left >= 3) kernel_rows<3, STEP>(f, x, P::columns, p.columns, to, w_row);
        else if (left == 2) kernel_rows<2, STEP>(f, x, P::columns, p.columns, to, w_row);
        else kernel_rows<1, 0>(f, x, P::columns, p.columns, to, w_row);
      }
    }
  }
  void tile(const int64_t* n, A* gw) const {
    const Sharing s(g.stride[1], g.dilation[1]);
    Field<A> f{n[0],
               s.classes,
               n[1],
               n[2],
               0,
               gy,
               n[1] * gy_row,
               gy_row,
               P::tile,
               g.stride[0] * l.slice,
               g.stride[1] * l.row,
               g.dilation[1] * l.row};
    if (P::folded) {
      f.n = f.gy_row = f.x_step = f.x_row = L;
      f.classes = 1;
      f.rows = n[2] / L;
      f.rest = n[2] % L;
      return parts<1>(f, L / g.dilation[2], gw);
    }
    if (s.step == 1) parts<1>(f, g.kernel[2], gw);
    else if (s.step == 2) parts<2>(f, g.kernel[2], gw);
    else parts<0>(f, g.kernel[2], gw);
  }
  template <class E> void plane(const E* x, const E* from, A* gw) const {
    const int64_t in = g.in[0] * g.in[1] * g.in[2], out = g.out[0] * g.out[1] * g.out[2],
                  taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
    const Cut* c = l.cut;
    for (int64_t i = 0; i < c[0].steps; i += c[0].tile)
      for (int64_t j = 0; j < c[1].steps; j += c[1].tile)
        for (int64_t k = 0; k < c[2].steps; k += c[2].tile) {
          const int64_t at[3] = {i, j, k}, n[3] = {min64(c[0].tile, c[0].steps - i), min64(c[1].tile, c[1].steps - j),
                                                   min64(c[2].tile, c[2].steps - k)};
          fill<E, A>(l, at, n, false, x, x + in, P::tile, P::straight);
          for (int64_t m = 0; m < g.multiplier; ++m) {
            fill_gy(at, n, from + m * out, from + g.multiplier * out);
            tile(n, gw + m * taps);
          }
        }
  }
};

template <class E> void grad_weight(const DepthwiseGeometry& g, const void* x, const void* grad_y, void* grad_weight,
                                    void* scratch) {
  typedef typename Accumulator<E>::type A;
  GradWeight<A> w(g, scratch);
  w.prepare();
  w.plane((const E*)x, (const E*)grad_y, (A*)grad_weight);
}

template <class E> size_t scratch_bytes(const DepthwiseGeometry& g) {
  const GradWeight<typename Accumulator<E>::type> w(g, nullptr);
  return w.arena.at;
}

}  // namespace

extern const NchwGradTables depthwise_nchw_grad;
const NchwGradTables depthwise_nchw_grad = {
    {scratch_bytes<float>, grad_weight<float>},
    {scratch_bytes<double>, grad_weight<double>},
    {scratch_bytes<bf16>, grad_weight<bf16>},
    {scratch_bytes<f16>, grad_weight<f16>},
};

}  // namespace ISA
}  // namespace omniconv
