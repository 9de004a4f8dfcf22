// Depthwise convolution of contiguous planes; compiled once per instruction set (CMake defines ISA, the namespace, and
// the width).
//
// Up to seven output rows share the input rows that they load, a vector of columns at a time. Seven, as 7, 14, 28, 56
// and 112 are its multiples. A load over the end of a cache line costs two, so loads and not sums bound 64-byte
// vectors.
#include "kernels/depthwise_nchw.h"

namespace omniconv {
namespace ISA {
namespace {

// What a block of outputs sees besides its place.
template <class A> struct Window {
  const Part* parts;
  int64_t first, last;  // parts that read elements
  const Tap* columns;
  int64_t x_row, w_row;
  const A* w;
  A bias;
  Activation activation;
};

// R output rows of N vectors, STEP input rows apart, take in K kernel rows.
template <class A, int K, int R, int N, int STEP>
INLINE void meet(const A* x, int64_t x_row, const Tap* tap, int64_t count, const A* w, int64_t w_row,
                 typename Vec<A>::V (*acc)[N]) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  for (const Tap* end = tap + count; tap != end; ++tap) {
    V weight[K];
#pragma GCC unroll 8
    for (int m = 0; m < K; ++m) weight[m] = broadcast(w[tap->w + m * w_row]);
    const A* p = in_register(x + tap->x);
#pragma GCC unroll 32
    for (int r = 0; r < STEP * (R - 1) + K; ++r, p += x_row) {
      V v[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) v[i] = K > 1 ? in_register(load(p + i * L)) : load(p + i * L);
#pragma GCC unroll 8
      for (int m = 0; m < K; ++m)
        if (r >= m && (r - m) % STEP == 0 && (r - m) / STEP < R) {
#pragma GCC unroll 8
          for (int i = 0; i < N; ++i) acc[(r - m) / STEP][i] += weight[m] * v[i];
        }
    }
  }
}

// R rows of N vectors end. The last vector of a row holds n outputs: it is written whole where what follows will be
// written after it, not beyond `limit`.
template <class A, int R, int N> INLINE void put(typename Vec<A>::V (*acc)[N], Activation activation, A* y,
                                                 int64_t y_row, int64_t n, const A* limit) {
  constexpr int L = Vec<A>::lanes;
  if (activation != kNone) {
#pragma GCC unroll 8
    for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) acc[q][i] = activate<A>(acc[q][i], activation);
  }
#pragma GCC unroll 8
  for (int q = 0; q < R; ++q, y += y_row) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (N > 1 || n >= L || y + L <= limit) store(y + i * L, acc[q][i]);
      else store_part<A>(y, acc[q][i], n);
    }
  }
}

// Kernel rows [top, bottom) of every part.
template <class A, int R, int N, int STEP>
INLINE void block(const Window<A>& o, int64_t top, int64_t bottom, const A* x, A* y, int64_t y_row, int64_t n,
                  const A* limit) {
  typename Vec<A>::V acc[R][N];
#pragma GCC unroll 8
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) acc[q][i] = broadcast(o.bias);
  for (int64_t p = o.first; p < o.last; ++p) {
    const Part& part = o.parts[p];
    const A* px = x + part.x + top * o.x_row;
    const A* pw = o.w + part.w + top * o.w_row;
    for (int64_t left = min64(bottom, part.rows) - top; left > 0;
         left -= kTaps, px += kTaps * o.x_row, pw += kTaps * o.w_row) {
      switch (left) {
        case 1: meet<A, 1, R, N, STEP>(px, o.x_row, o.columns, part.columns, pw, o.w_row, acc); break;
        case 2: meet<A, 2, R, N, STEP>(px, o.x_row, o.columns, part.columns, pw, o.w_row, acc); break;
        case 3: meet<A, 3, R, N, STEP>(px, o.x_row, o.columns, part.columns, pw, o.w_row, acc); break;
        case 4: meet<A, 4, R, N, STEP>(px, o.x_row, o.columns, part.columns, pw, o.w_row, acc); break;
        default: meet<A, 5, R, N, STEP>(px, o.x_row, o.columns, part.columns, pw, o.w_row, acc);
      }
    }
  }
  put<A, R, N>(acc, o.activation, y, y_row, n, limit);
}

// Where rows of n outputs are read and written; kernel rows [low, high) of the first read elements.
template <class A> struct Rows {
  const A* x;
  int64_t x_step, low, high;
  A* y;
  int64_t y_row, n;
  const A* limit;
};

template <class A, int N> INLINE void line(const Window<A>& o, const Part& part, const A* x, const A* w, A* y,
                                           int64_t n, const A* limit) {
  typename Vec<A>::V acc[1][N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) acc[0][i] = broadcast(o.bias);
  meet<A, 1, 1, N, 1>(x, 0, o.columns, part.columns, w, 0, acc);
  put<A, 1, N>(acc, o.activation, y, 0, n, limit);
}

// A row that meets one kernel row, as in 1-D: without the loops of a block, which took as long as four taps do.
template <class A> INLINE void run_line(const Window<A>& o, int64_t top, const Rows<A>& rows) {
  constexpr int L = Vec<A>::lanes;
  const Part& part = o.parts[o.first];
  const A* x = rows.x + part.x + top * o.x_row;
  const A* w = o.w + part.w + top * o.w_row;
  const int64_t n = rows.n;
  int64_t at = 0;
  for (; at + 8 * L <= n; at += 8 * L) line<A, 8>(o, part, x + at, w, rows.y + at, L, rows.limit);
  for (; at + 4 * L <= n; at += 4 * L) line<A, 4>(o, part, x + at, w, rows.y + at, L, rows.limit);
  for (; at < n; at += L) {
    const int64_t last = max64(min64(at, n - L), 0);
    line<A, 1>(o, part, x + last, w, rows.y + last, n, rows.limit);
  }
}

template <class A, int R, int STEP> void run_rows(const Window<A>& o, int64_t step, int64_t taps, Rows<A>& rows) {
  constexpr int L = Vec<A>::lanes;
  const int64_t n = rows.n, top = max64(0, rows.low - step * (R - 1)), bottom = min64(taps, rows.high);
  if (R == 1 && bottom - top == 1 && o.last - o.first == 1) {
    run_line(o, top, rows);
  } else {
    int64_t at = 0;
    if constexpr (R == 1) {
      for (; at + 4 * L <= n; at += 4 * L)
        block<A, 1, 4, 1>(o, top, bottom, rows.x + at, rows.y + at, 0, L, rows.limit);
    }
    for (; at < n; at += L) {
      // the last vector ends where the row does: some outputs are made twice
      const int64_t last = max64(min64(at, n - L), 0);
      block<A, R, 1, STEP>(o, top, bottom, rows.x + last, rows.y + last, rows.y_row, n, rows.limit);
    }
  }
  rows.x += R * rows.x_step;
  rows.y += R * rows.y_row;
  rows.low -= R * step;
  rows.high -= R * step;
}

template <class A, int STEP> void run_shared(const Window<A>& o, int64_t count, int64_t taps, Rows<A>& rows) {
  while (count) {
    const int64_t r = count >= kRows && count != 8 ? kRows : count >= 4 ? 4 : count >= 2 ? 2 : 1;
    if (r == kRows) run_rows<A, kRows, STEP>(o, STEP, taps, rows);
    else if (r == 4) run_rows<A, 4, STEP>(o, STEP, taps, rows);
    else if (r == 2) run_rows<A, 2, STEP>(o, STEP, taps, rows);
    else run_rows<A, 1, 1>(o, STEP, taps, rows);
    count -= r;
  }
}

template <class A> void run(const Window<A>& o, int64_t count, int64_t step, int64_t taps, Rows<A> rows) {
  if (step == 1) return run_shared<A, 1>(o, count, taps, rows);
  if (step == 2) return run_shared<A, 2>(o, count, taps, rows);
  for (; count; --count) run_rows<A, 1, 1>(o, step, taps, rows);
}

// Rows of n sums to rows of outputs; what is beyond a row shorter than a vector as in put().
template <class E, class A> __attribute__((noinline)) void narrow_rows(const A* of, int64_t of_row, int64_t n,
                                                                       int64_t rows, E* y, int64_t y_row,
                                                                       const E* limit) {
  constexpr int L = Vec<A>::lanes;
  for (; rows > 0; --rows, of += of_row, y += y_row) {
    for (int64_t o = 0; o + L <= n; o += L) store(y + o, load(of + o));
    if (n >= L) store(y + n - L, load(of + n - L));
    else if (y + L <= limit) store(y, load(of));
    else store_part<A>(y, load(of), n);
  }
}

// n outputs from the rows of their residues.
template <class E, class A> void weave(const A* of, int64_t size, int64_t residues, int64_t n, E* y, A* line) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  if (residues == 2) {
    for (int64_t o = 0; o < n; o += 2 * L) {
      const V a = load(of + o / 2), b = load(of + size + o / 2);
      store_part<A>(y + o, interleave_low(a, b), n - o);
      if (n > o + L) store_part<A>(y + o + L, interleave_high(a, b), n - o - L);
    }
    return;
  }
  for (int64_t r = 0; r < residues; ++r)
    for (int64_t o = r, j = 0; o < n; o += residues, ++j) line[o] = of[r * size + j];
  for (int64_t o = 0; o < n; o += L) store_part<A>(y + o, load(line + o), n - o);
}

// Rows of a tile that share what they read: where, apart from the plane, they are read, multiplied and written.
struct Job {
  const Part* parts;
  int64_t first, last, x_row, w_row, x, x_step, low, high, w, y, y_row, run, count, step, taps;
};

template <class E> struct Forward : Plan<typename Accumulator<E>::type> {
  typedef typename Accumulator<E>::type A;
  static constexpr int L = Vec<A>::lanes;
  // 16-bit outputs are narrowed from rows of sums, as residues are woven: half of the code, and never less than 0.67 of
  // the speed of float
  static constexpr bool kStraight = sizeof(E) == sizeof(A);
  using P = Plan<A>;
  using P::g, P::l, P::residues, P::phases, P::arena;
  int64_t size;  // of a row of one residue
  A *woven, *straight_line;
  Job* jobs;

  Forward(const DepthwiseGeometry& of, void* scratch) : P(of, scratch, true) {
    size = round_up(l.cut[2].tile, L) + L;
    const bool weaving = !kStraight || residues[2] > 1;
    woven = arena.template take<A>(weaving ? kRows * residues[2] * size : 0);
    straight_line = arena.template take<A>(weaving ? residues[2] * size : 0);
    jobs = arena.template take<Job>(residues[0] * l.cut[0].tile * residues[1] * min64(g.dilation[1], l.cut[1].tile));
  }

  // The jobs of the outputs [at, at + n) of a channel, of every residue.
  int64_t prepare_tile(const int64_t* at, const int64_t* n) const {
    int64_t count = 0;
    for (int64_t r = 0; r < residues[0]; ++r) {
      const Phase& p = phases[0][r];
      for (int64_t d = 0; d < min64(n[0], p.outputs - at[0]); ++d) {
        const int64_t from = (at[0] + d) * g.stride[0] + p.from;
        Job j;
        j.parts = P::parts + r * residues[2] * P::count;
        j.first = g.mode == kZeros ? max64(ceil_div(-from, p.dilation), 0) : 0;
        j.last = P::folded ? 2 : g.mode == kZeros ? min64(ceil_div(g.in[0] - from, p.dilation), p.taps) : p.taps;
        j.x = (d * g.stride[0] + p.from - l.cut[0].low) * l.slice;
        j.w = p.tap * g.kernel[1] * g.kernel[2];
        j.y = (r + residues[0] * (at[0] + d)) * g.out[1] * g.out[2] + residues[2] * at[2];
        for (int64_t q = 0; q < residues[1]; ++q) count = prepare_rows(j, q, at, n, count);
      }
    }
    return count;
  }
  int64_t prepare_rows(Job slice, int64_t q, const int64_t* at, const int64_t* n, int64_t count) const {
    const Phase& p = phases[1][q];
    const Sharing s(g.stride[1], p.dilation);
    const int64_t rows = min64(n[1], p.outputs - at[1]);
    slice.step = s.step;
    slice.taps = p.taps;
    slice.w += p.tap * g.kernel[2];
    slice.w_row = p.tap_step * g.kernel[2];
    slice.x_row = p.dilation * l.row;
    slice.x_step = s.classes * g.stride[1] * l.row;
    slice.y_row = residues[1] * s.classes * g.out[2];
    for (int64_t c = 0; c < min64(s.classes, rows); ++c) {
      const int64_t j = at[1] + c, from = j * g.stride[1] + p.from;
      Job& job = jobs[count++] = slice;
      job.x += (c * g.stride[1] + p.from - l.cut[1].low) * l.row;
      job.low = g.mode == kZeros ? ceil_div(-from, p.dilation) : 0;
      job.high = g.mode == kZeros ? ceil_div(g.in[1] - from, p.dilation) : INT64_MAX;
      job.y += (q + residues[1] * j) * g.out[2];
      job.count = ceil_div(rows - c, s.classes);
      job.run = job.y_row == g.out[2] && residues[0] == 1 ? rows * g.out[2] : 0;
      if (P::folded) {  // n outputs as rows of a vector, the last of them shorter
        job.x_row = job.x_step = job.y_row = L;
        job.w_row = L / g.dilation[2];
        job.low = 0;
        job.high = INT64_MAX;
        job.taps = P::parts[0].rows;
        job.count = (n[2] + L - 1) / L;
      }
    }
    return count;
  }

  void outputs(const Job& j, const int64_t* at, const int64_t* n, const A* w, A bias, E* y, const E* end) const {
    Window<A> o{j.parts, j.first, j.last, P::columns, j.x_row, j.w_row, w + j.w, bias, g.activation};
    E* to = y + j.y;
    const Rows<A> rows{P::tile + j.x, j.x_step, j.low, j.high,
                       (A*)to,        j.y_row,  n[2],  !j.run ? nullptr : (const A*)(l.whole ? end : to + j.run)};
    if (P::folded) return folded_row(o, j, n[2], rows, to);
    if constexpr (kStraight) {
      if (residues[2] == 1) return run<A>(o, j.count, j.step, j.taps, rows);
    }
    apart(o, j, at[2], rows, to, !j.run ? nullptr : l.whole ? end : to + j.run);
  }
  // Rows whose residues are made apart, and woven.
  void apart(Window<A>& o, const Job& j, int64_t at, Rows<A> from, E* y, const E* limit) const {
    for (int64_t count = j.count; count > 0; count -= kRows) {
      const int64_t rows = min64(count, kRows), n = min64(residues[2] * from.n, g.out[2] - residues[2] * at);
      for (int64_t r = 0; r < residues[2]; ++r) {
        o.parts = j.parts + r * P::count;
        o.columns = P::columns + r * g.kernel[2];
        run<A>(o, rows, j.step, j.taps,
               {from.x, from.x_step, from.low, from.high, woven + r * size, residues[2] * size,
                max64(min64(from.n, phases[2][r].outputs - at), 0), straight_line});
      }
      if (residues[2] == 1) narrow_rows<E>(woven, size, n, rows, y, j.y_row, limit);
      else
        for (int64_t i = 0; i < rows; ++i)
          weave<E, A>(woven + i * residues[2] * size, size, residues[2], n, y + i * j.y_row, straight_line);
      from.x += rows * j.x_step;
      from.low -= rows * j.step;
      from.high -= rows * j.step;
      y += rows * j.y_row;
    }
  }
  void folded_row(const Window<A>& o, const Job& j, int64_t n, Rows<A> rows, E* y) const {
    if (!kStraight) rows.y = woven;
    rows.limit = rows.y + n;
    rows.n = n - (j.count - 1) * L;
    run<A>(o, j.count, 1, j.taps, rows);
    if (!kStraight) narrow_rows<E>(woven, 0, n, 1, y, 0, nullptr);
  }

  void planes(int64_t count, const E* x, const A* w, const A* bias, E* y) const {
    const int64_t in = g.in[0] * g.in[1] * g.in[2], out = g.out[0] * g.out[1] * g.out[2],
                  taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
    const E *x_end = x + count * in, *y_end = y + count * g.multiplier * out;
    auto make = [&](int64_t p, int64_t jobs_of, const int64_t* at, const int64_t* n) {
      for (int64_t m = 0, q = p * g.multiplier; m < g.multiplier; ++m, ++q)
        for (int64_t i = 0; i < jobs_of; ++i)
          outputs(jobs[i], at, n, w + q * taps, bias ? bias[q] : A(0), y + q * out, y_end);
    };
    const Cut *c = l.cut, &a = c[2];
    if (l.whole) {
      const int64_t at[3] = {0, 0, 0}, n[3] = {c[0].steps, c[1].steps, a.steps}, jobs_of = prepare_tile(at, n);
      zero(P::tile, l.size);
      for (int64_t p = 0; p < count; ++p) {
        fill<E, A>(l, at, n, true, x + p * in, x_end, P::tile, P::straight);
        make(p, jobs_of, at, n);
      }
      return;
    }
    for (int64_t p = 0; p < count; ++p)
      for (int64_t i = 0; i < c[0].steps; i += c[0].tile)
        for (int64_t j = 0; j < c[1].steps; j += c[1].tile)
          for (int64_t k = 0; k < a.steps; k += a.tile) {
            // the last tile of a row is a whole one that ends with it
            const int64_t at[3] = {i, j, min64(k, a.steps - a.tile)},
                          n[3] = {min64(c[0].tile, c[0].steps - i), min64(c[1].tile, c[1].steps - j), a.tile};
            fill<E, A>(l, at, n, false, x + p * in, x_end, P::tile, P::straight);
            make(p, prepare_tile(at, n), at, n);
          }
  }
};

template <class E> void forward(const DepthwiseGeometry& g, int64_t planes, const void* x, const void* w, const void* b,
                                void* y, void* scratch) {
  typedef typename Accumulator<E>::type A;
  Forward<E> f(g, scratch);
  f.prepare();
  f.planes(planes, (const E*)x, (const A*)w, (const A*)b, (E*)y);
}

template <class E> size_t scratch_bytes(const DepthwiseGeometry& g) {
  const Forward<E> f(g, nullptr);
  return f.arena.at;
}

}  // namespace

extern const NchwTables depthwise_nchw;
const NchwTables depthwise_nchw = {
    {scratch_bytes<float>, forward<float>},
    {scratch_bytes<double>, forward<double>},
    {scratch_bytes<bf16>, forward<bf16>},
    {scratch_bytes<f16>, forward<f16>},
};

}  // namespace ISA
}  // namespace omniconv
