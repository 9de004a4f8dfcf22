// The matrix product over channels; compiled once per instruction set.
#include "kernels/gemm.h"

#include "simd/activate.h"
#include "simd/registers.h"
#include "simd/transpose.h"
#include "simd/vec.h"

namespace omniconv {
namespace ISA {
namespace {

// Rows of a tile, two vectors wide: of 32 or 16 registers all but the two vectors and a broadcast hold sums.
constexpr int kRows = (kVectorRegisters - 3) / 2;
constexpr int64_t kFew = 4;                     // rows for which vectors of weights are used as they are made
constexpr int64_t kAhead = 256;                 // bytes that rows are prefetched ahead of a transposition
constexpr int64_t kDepth = 256;                 // channels at a time: a panel of vectors takes 32 KB of L1
constexpr int64_t kGroup = int64_t(512) << 10;  // bytes of a group of rows, which stays in L2

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows or lanes [first, first + count) of an operand: where each begins, and how far its channels are apart. `end` is
// past the last element.
template <class E> struct Operand {
  const E* at[32];
  const E* end;
  int64_t count, stride, spacing;
};

template <class E> void weights(const Gemm& g, int64_t first, int64_t count, Operand<E>& to) {
  const E* w = (const E*)g.weight;
  for (int64_t j = 0; j < count; ++j) to.at[j] = w + (first + j) * g.weight_output_stride;
  to.end = w + (g.outputs - 1) * g.weight_output_stride + (g.channels - 1) * g.weight_channel_stride + 1;
  to.count = count;
  to.stride = g.weight_channel_stride;
  to.spacing = g.weight_output_stride;
}

template <class E> void columns(const Gemm& g, int64_t first, int64_t count, Operand<E>& to) {
  const E* x = (const E*)g.x;
  int64_t n = first / g.steps, t = first % g.steps;
  for (int64_t j = 0; j < count; ++j) {
    to.at[j] = x + n * g.sample_stride + t * g.step_stride;
    if (++t == g.steps) {
      t = 0;
      ++n;
    }
  }
  to.end =
      x + (g.samples - 1) * g.sample_stride + (g.steps - 1) * g.step_stride + (g.channels - 1) * g.channel_stride + 1;
  to.count = count;
  to.stride = g.channel_stride;
  to.spacing = count > 1 ? to.at[1] - to.at[0] : 0;
  for (int64_t j = 2; j < count; ++j)
    if (to.at[j] - to.at[j - 1] != to.spacing) to.spacing = 0;
}

// A vector at p, of which what lies at `end` or beyond is not read.
template <class E, class A> INLINE typename Vec<A>::V guarded(const E* p, const E* end) {
  if (p + Vec<A>::lanes <= end) return load(p);
  E lanes[Vec<A>::lanes] = {};
  for (int64_t l = 0; p + l < end; ++l) lanes[l] = p[l];
  return load(lanes);
}

// Channels [k, k + L) of rows [j, j + L), as L vectors along the rows; the last row stands in for those beyond.
template <class E, class A> INLINE void square(const Operand<E>& from, int64_t j, int64_t k, typename Vec<A>::V* v) {
  constexpr int64_t L = Vec<A>::lanes;
  if (from.spacing && j + L <= from.count) {
    const E* p = from.at[j] + k;
#pragma GCC unroll 16
    for (int64_t l = 0; l < L; ++l, p += from.spacing) {
      __builtin_prefetch(p + kAhead / sizeof(E));
      v[l] = load(p);
    }
  } else {
#pragma GCC unroll 16
    for (int64_t l = 0; l < L; ++l) v[l] = load(from.at[least(j + l, from.count - 1)] + k);
  }
  transpose<A>(v);
}

// The same of fewer channels.
template <class E, class A> INLINE void short_square(const Operand<E>& from, int64_t j, int64_t k, int64_t deep,
                                                     typename Vec<A>::V* v) {
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t last = from.count - 1;
  for (int64_t l = 0; l < L; ++l) {
    E lanes[L] = {};
    for (int64_t i = 0; i < deep; ++i) lanes[i] = from.at[least(j + l, last)][k + i];
    v[l] = load(lanes);
  }
  transpose<A>(v);
}

// Channels [k0, k1) of an operand as to[k][j], `width` apart. A vector is stored over the end of a row: what comes
// after it is stored later, and the last may reach a vector beyond the end.
template <class E, class A> void pack(const Operand<E>& from, int64_t k0, int64_t k1, A* to, int64_t width) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  if (from.stride == 1) {
    for (int64_t k = k0; k < k1; k += L) {
      const int64_t deep = least(L, k1 - k);
      for (int64_t j = (from.count - 1) / L * L; j >= 0; j -= L) {
        V v[L];
        A* out = to + (k - k0) * width + j;
        if (deep == L) {
          square<E, A>(from, j, k, v);
#pragma GCC unroll 16
          for (int64_t l = 0; l < L; ++l) store(out + l * width, v[l]);
        } else {
          short_square<E, A>(from, j, k, deep, v);
          for (int64_t l = 0; l < deep; ++l) store(out + l * width, v[l]);
        }
      }
    }
    return;
  }
  // what is adjacent in memory is copied by vectors
  int64_t start[32], size[32], runs = 0;
  for (int64_t j = 0; j < from.count; ++j) {
    if (runs && from.at[j] == from.at[j - 1] + 1) {
      ++size[runs - 1];
    } else {
      start[runs] = j;
      size[runs++] = 1;
    }
  }
  for (int64_t k = k0; k < k1; ++k)
    for (int64_t r = 0; r < runs; ++r) {
      const E* p = from.at[start[r]] + k * from.stride;
      A* out = to + (k - k0) * width + start[r];
      for (int64_t l = 0; l < size[r]; l += L) store(out + l, guarded<E, A>(p + l, from.end));
    }
}

// The next `depth` channels of a tile of R rows and W vectors, whose sums stand in `sums`.
template <class A, int R, int W> void tile(int64_t depth, const A* rows, const A* lanes, A* sums) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  V sum[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[r][w] = load(sums + (r * W + w) * L);
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    V v[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) v[w] = in_register(load(lanes + (k * W + w) * L));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V s = broadcast(rows[k * R + r]);
      if (W > 1) s = in_register(s);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[r][w] += s * v[w];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) store(sums + (r * W + w) * L, sum[r][w]);
}

// The whole of R rows and `width` outputs: for so few rows the weights, which are read once, are not packed into memory
// first. Two vectors of outputs take turns, since a sum waits four cycles for every product; with four, rows that lie a
// power of two apart drive each other out of L1 (512 → 512, one column, AVX2: 28 µs and 24).
template <class E, class A, int R> void strip(const Operand<E>& weight, int64_t channels, const A* rows, A* sums,
                                              int64_t width) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  int64_t k = 0;
  for (; k + L <= channels; k += L) {
    const A* row = rows + k * R;
    for (int64_t l = 0; l < width; l += L) {
      V v[L], sum[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r] = load(sums + r * width + l);
      square<E, A>(weight, l, k, v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r] += broadcast(row[i * R + r]) * v[i];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store(sums + r * width + l, sum[r]);
    }
  }
  for (int64_t l = 0; k < channels && l < width; l += L) {
    V v[L];
    short_square<E, A>(weight, l, k, channels - k, v);
    for (int64_t i = 0; i < channels - k; ++i)
      for (int r = 0; r < R; ++r)
        store(sums + r * width + l, load(sums + r * width + l) + broadcast(rows[(k + i) * R + r]) * v[i]);
  }
}

template <class E, class A> void strip_of(const Operand<E>& weight, int64_t channels, int64_t many, const A* rows,
                                          A* sums, int64_t width) {
  switch (many) {
    case 1: return strip<E, A, 1>(weight, channels, rows, sums, width);
    case 2: return strip<E, A, 2>(weight, channels, rows, sums, width);
    case 3: return strip<E, A, 3>(weight, channels, rows, sums, width);
    case 4: return strip<E, A, 4>(weight, channels, rows, sums, width);
  }
}

template <class A, int W, int R = kRows> void tile_of(int64_t rows, int64_t depth, const A* r, const A* l, A* sums) {
  if (rows == R) return tile<A, R, W>(depth, r, l, sums);
  if constexpr (R > 1) tile_of<A, W, R - 1>(rows, depth, r, l, sums);
}

// The first n lanes, finished.
template <class E, class A> INLINE void put(const Gemm& g, E* y, typename Vec<A>::V v, int64_t n) {
  v = activate<A>(v, g.activation);
  if (n == Vec<A>::lanes) {
    store(y, v);
    return;
  }
  E lanes[Vec<A>::lanes];
  store(lanes, v);
  for (int64_t l = 0; l < n; ++l) y[l] = lanes[l];
}

// Columns [first, first + n) of one output; n is at most a vector.
template <class E, class A> INLINE void put_columns(const Gemm& g, int64_t output, int64_t first, int64_t n,
                                                    typename Vec<A>::V v) {
  E* y = (E*)g.y;
  int64_t sample = first / g.steps, t = first % g.steps;
  E* to = y + (sample * g.outputs + output) * g.steps + t;
  if (t + n <= g.steps) return put<E, A>(g, to, v, n);
  E lanes[Vec<A>::lanes];
  store(lanes, activate<A>(v, g.activation));
  for (int64_t l = 0; l < n; ++l) {
    *to++ = lanes[l];
    if (++t == g.steps) {
      t = 0;
      to += (g.outputs - 1) * g.steps;
    }
  }
}

// What the sums of a group's rows and a panel's lanes make of y: sums are `width` lanes a row.
template <class E, class A>
void finish(const Gemm& g, bool along_outputs, int64_t row, int64_t rows, int64_t lane, int64_t lanes, const A* sums,
            int64_t width) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  if (!along_outputs) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < lanes; l += L)
        put_columns<E, A>(g, row + r, lane + l, least(L, lanes - l), load(sums + r * width + l));
    return;
  }
  if (g.steps == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t l = 0; l < lanes; l += L)
        put<E, A>(g, (E*)g.y + (row + r) * g.outputs + lane + l, load(sums + r * width + l), least(L, lanes - l));
    return;
  }
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t l = 0; l < lanes; l += L) {
      V v[L];
      const int64_t high = least(L, rows - r), wide = least(L, lanes - l);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) v[i] = load(sums + (r + (i < high ? i : high - 1)) * width + l);
      transpose<A>(v);
      for (int64_t i = 0; i < wide; ++i) put_columns<E, A>(g, lane + l + i, row + r, high, v[i]);
    }
}

template <class A> GemmPlan plan(const Gemm& g) {
  constexpr int64_t L = Vec<A>::lanes;
  GemmPlan p;
  const int64_t columns = g.samples * g.steps;
  const auto whole = [](int64_t n) { return (n + L - 1) / L * L; };
  // vectors where fewer of their lanes are lost
  p.along_outputs = whole(g.outputs) * columns <= whole(columns) * g.outputs;
  p.rows = p.along_outputs ? columns : g.outputs;
  p.lanes = p.along_outputs ? g.outputs : columns;
  p.few = p.along_outputs && columns <= kFew && g.weight_channel_stride == 1;
  p.panel = least(2 * L, whole(p.lanes));
  p.panels = (p.lanes + p.panel - 1) / p.panel;
  const int64_t fits = most(kGroup / (g.channels * int64_t(sizeof(A))) / kRows, 4) * kRows,
                groups = (p.rows + fits - 1) / fits;
  p.group = (p.rows + groups - 1) / groups;
  p.units = groups * p.panels;
  p.scratch_bytes =
      size_t(p.group * g.channels + 2 * L + (p.few ? 0 : kDepth * p.panel) + L + p.group * p.panel) * sizeof(A);
  return p;
}

template <class E> void run(const Gemm& g, const GemmPlan& p, int64_t first, int64_t last, void* scratch) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  A* lanes = (A*)scratch;
  A* sums = lanes + (p.few ? 0 : kDepth * p.panel) + L;
  A* rows = sums + p.group * p.panel;
  const A* bias = (const A*)g.bias;
  Operand<E> operand;
  int64_t packed = -1;
  for (int64_t u = first; u < last; ++u) {
    const int64_t row = u / p.panels * p.group, high = least(p.group, p.rows - row), lane = u % p.panels * p.panel,
                  wide = least(p.panel, p.lanes - lane);
    const int64_t width = (wide + L - 1) / L * L, blocks = (high + kRows - 1) / kRows;
    // blocks as equal as can be
    const auto edge = [&](int64_t b) { return b * high / blocks; };
    if (packed != row) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = edge(b), many = edge(b + 1) - at;
        if (p.along_outputs) columns<E>(g, row + at, many, operand);
        else weights<E>(g, row + at, many, operand);
        pack<E, A>(operand, 0, g.channels, rows + at * g.channels, many);
      }
      packed = row;
    }
    if (p.along_outputs) {
      A lane_bias[2 * L] = {};
      if (bias) __builtin_memcpy(lane_bias, bias + lane, wide * sizeof(A));
      for (int64_t r = 0; r < high; ++r)
        for (int64_t l = 0; l < width; l += L) store(sums + r * width + l, load(lane_bias + l));
      weights<E>(g, lane, wide, operand);
    } else {
      for (int64_t r = 0; r < high; ++r)
        for (int64_t l = 0; l < width; l += L) store(sums + r * width + l, broadcast(bias ? bias[row + r] : A(0)));
      columns<E>(g, lane, wide, operand);
    }
    if (p.few) strip_of<E, A>(operand, g.channels, high, rows, sums, width);
    for (int64_t k = p.few ? g.channels : 0; k < g.channels; k += kDepth) {
      const int64_t depth = least(kDepth, g.channels - k);
      pack<E, A>(operand, k, k + depth, lanes, width);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = edge(b), many = edge(b + 1) - at;
        const A* r = rows + at * g.channels + k * many;
        if (width > L) tile_of<A, 2>(many, depth, r, lanes, sums + at * width);
        else tile_of<A, 1>(many, depth, r, lanes, sums + at * width);
      }
    }
    finish<E, A>(g, p.along_outputs, row, high, lane, wide, sums, width);
  }
}

}  // namespace

extern const GemmTables gemm;
const GemmTables gemm = {
    {plan<float>, run<float>},
    {plan<double>, run<double>},
    {plan<float>, run<bf16>},
    {plan<float>, run<f16>},
};

}  // namespace ISA
}  // namespace omniconv
