// Depthwise kernels on contiguous planes; compiled once per instruction set (CMake defines ISA, the namespace, and VECTOR_BYTES).
//
// A plane is cut into tiles that fit half of a small L2 (most planes are one tile). Of each the padded input is copied into scratch, widened,
// and what follows is arithmetic without a case: up to seven output rows share the input rows that they load, a vector of columns at a time.
// Seven, as 7, 14, 28, 56 and 112 are its multiples. A load over the end of a cache line costs two, so loads and not sums bound 64-byte vectors.
#include "kernels/depthwise.h"

#include "kernels/depthwise_window.h"

#ifndef ISA
#define ISA isa_base
#endif

namespace omniconv {
namespace ISA {
namespace {

constexpr int64_t kTileBytes = 131072;  // of padded input: with 32 KB 3-D took 1.3 times as long, as more slices are copied twice
constexpr int64_t kRowMost = 4096;      // positions in a row of a tile, unless a window is as wide
constexpr int kTaps = 5;                // kernel rows that are held in registers at once
constexpr int64_t kRows = 7;            // output rows that share their input rows

INLINE int64_t ceil_div(int64_t a, int64_t b) { return b == 1 ? a : (a + b - 1) / b; }
INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return min64(max64(x, low), high); }

// ---- geometry

// One axis of a convolution without spread: output j and tap k meet position j·stride + from + k·dilation of the input. A spread axis is
// `spread` such convolutions, one for each residue of the output, with those taps that meet elements: none of the zeros is multiplied.
struct Phase {
  int64_t outputs, taps, tap, tap_step, from, dilation;
};

INLINE Phase phase_of(const DepthwiseGeometry& g, int i, int64_t residue) {
  const int64_t s = g.spread[i], n = g.out[i], k = g.kernel[i], d = g.dilation[i];
  if (s == 1) return {n, k, 0, 1, -g.before[i], d};
  const int64_t start = residue * g.stride[i] - g.before[i];
  int64_t step = 1, tap = 0;
  while (step * d % s) ++step;
  while (tap < step && (start + tap * d) % s) ++tap;
  if (tap == step || tap >= k) return {ceil_div(n - residue, s), 0, 0, step, 0, step * d / s};
  return {ceil_div(n - residue, s), ceil_div(k - tap, step), tap, step, (start + tap * d) / s, step * d / s};
}

// How an axis is cut: outputs (of each residue) [at, at + n) of a tile read `extent(n)` positions from at·stride + low.
struct Cut {
  int64_t in, spread, stride, low, reach, steps, tile;
  int64_t extent(int64_t n) const { return (n - 1) * stride + reach; }
};

// The tiles of a plane and how one lies in scratch: rows dealt into `stride` phases, position p at phase p % stride, index p / stride.
template <class A> struct Layout {
  static constexpr int L = Vec<A>::lanes;
  Cut cut[3];
  Mode mode;
  int64_t phase, row, slice, size;
  bool whole;  // one tile is the plane

  int64_t column(int64_t p) const { return cut[2].stride == 1 ? p : p % cut[2].stride * phase + p / cut[2].stride; }

  void choose() {
    Cut &c = cut[0], &b = cut[1], &a = cut[2];
    for (Cut& i : cut) i.tile = i.steps;
    if (a.extent(a.steps) > kRowMost) {
      const int64_t most = max64((kRowMost - a.reach) / a.stride, max64(a.reach / a.stride, 4 * L));
      a.tile = ceil_div(a.steps, ceil_div(a.steps, most));
    }
    // a whole vector past the last even position may be written to the first phase, before the second begins
    phase = a.stride == 1 ? round_up(a.extent(a.tile), L) : round_up(a.extent(a.tile) / a.stride + 1 + L, L);
    row = a.stride * phase;
    const int64_t row_bytes = row * int64_t(sizeof(A));
    if (c.extent(c.steps) * b.extent(b.steps) * row_bytes > kTileBytes) cut_rows(kTileBytes / row_bytes);
    slice = b.extent(b.tile) * row;
    size = c.extent(c.tile) * slice + 2 * L;
    whole = a.tile == a.steps && b.tile == b.steps && c.tile == c.steps;
  }
  // Slices and rows of a tile of at most `room` rows such that the fewest rows are copied twice.
  void cut_rows(int64_t room) {
    Cut &c = cut[0], &b = cut[1];
    double least = 0;
    for (int64_t d = 1; d <= min64(c.steps, 8); ++d) {
      const int64_t fit = (room / c.extent(d) - b.reach) / b.stride + 1;
      const int64_t r = min64(b.steps, max64(fit, max64(b.reach / b.stride, 1)));
      const double cost = double(c.extent(d)) * double(b.extent(r)) / double(d * r);
      if (d > 1 && (cost >= least || c.extent(d) * b.extent(r) > room)) continue;
      least = cost;
      c.tile = d;
      b.tile = r;
    }
    c.tile = ceil_div(c.steps, ceil_div(c.steps, c.tile));
    b.tile = ceil_div(b.steps, ceil_div(b.steps, b.tile));
  }
};

// A plane with one row a slice is one slice: rows are what a tile shares. Axis by axis from the caller's: swapped in a fresh copy, it waited
// for that copy's stores (6 ns of the 100 that the gradient of a 7x7 plane takes).
INLINE DepthwiseGeometry flat(const DepthwiseGeometry& g) {
  const bool one_row = g.in[1] == 1 && g.out[1] == 1 && g.kernel[1] == 1 && !g.before[1];
  DepthwiseGeometry to = g;
  for (int i = 0; i < 3; ++i) {
    const int from = one_row && i < 2 ? 1 - i : i;
    to.in[i] = g.in[from];
    to.out[i] = g.out[from];
    to.kernel[i] = g.kernel[from];
    to.stride[i] = g.stride[from];
    to.dilation[i] = g.kernel[from] == 1 ? 1 : g.dilation[from];
    to.before[i] = g.before[from];
    to.spread[i] = g.spread[from];
  }
  return to;
}

// Memory handed out from scratch; from null, only its size.
struct Shelf {
  uintptr_t at;
  template <class T> T* take(int64_t n) {
    T* p = (T*)at;
    at += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

// ---- vectors

// In a register from here on: GCC would load it again for each use, and a load over a line's end costs two.
template <class V> INLINE V held(V v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// Which lanes are before lane n.
template <class A> INLINE auto before(int64_t n) {
  typedef typename Vec<A>::V V;
  decltype(V{} < V{}) lane;
  for (int i = 0; i < Vec<A>::lanes; ++i) lane[i] = i;
  return lane < (lane - lane) + int(n);
}

template <class A> INLINE typename Vec<A>::V first(typename Vec<A>::V v, int64_t n) {
  typedef typename Vec<A>::V V;
  return (V)((decltype(v < v))v & before<A>(n));
}

// n < L elements between memory and a buffer, by halves.
template <class E, int L> INLINE void copy_first(E* to, const E* from, int64_t n) {
#pragma GCC unroll 8
  for (int h = L / 2; h; h /= 2)
    if (n & h) {
      __builtin_memcpy(to, from, h * sizeof(E));
      to += h;
      from += h;
    }
}

// GCC's AddressSanitizer does not see masked loads and stores: they are shown to it.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(const void*, uint64_t);
extern "C" void __asan_storeN(const void*, uint64_t);
template <class E> INLINE void reads(const E* p, int64_t n) { __asan_loadN(p, n * sizeof(E)); }
template <class E> INLINE void writes(const E* p, int64_t n) { __asan_storeN(p, n * sizeof(E)); }
#else
template <class E> INLINE void reads(const E*, int64_t) {}
template <class E> INLINE void writes(const E*, int64_t) {}
#endif

// The first n elements, zeros after them; nothing is read at `end` or beyond.
#if defined(__AVX512F__) && VECTOR_BYTES == 64
template <class A> INLINE Vec<float>::V load_first(const float* p, int64_t n, const float*) { reads(p, n); return (Vec<float>::V)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
template <class A> INLINE Vec<double>::V load_first(const double* p, int64_t n, const double*) { reads(p, n); return (Vec<double>::V)_mm512_maskz_loadu_pd((1u << n) - 1, p); }
#elif defined(__AVX2__) && VECTOR_BYTES == 32
template <class A> INLINE Vec<float>::V load_first(const float* p, int64_t n, const float*) { reads(p, n); return (Vec<float>::V)_mm256_maskload_ps(p, (__m256i)before<A>(n)); }
template <class A> INLINE Vec<double>::V load_first(const double* p, int64_t n, const double*) { reads(p, n); return (Vec<double>::V)_mm256_maskload_pd(p, (__m256i)before<A>(n)); }
#endif
template <class A, class E> INLINE typename Vec<A>::V load_first(const E* p, int64_t n, const E* end) {
  constexpr int L = Vec<A>::lanes;
  if (p + L <= end) return first<A>(load(p), n);
  E part[L] = {};
  copy_first<E, L>(part, p, n);
  return load(part);
}

template <class A, class E> INLINE void store_first(E* p, typename Vec<A>::V v, int64_t n) {
  constexpr int L = Vec<A>::lanes;
  if (n >= L) return store(p, v);
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  if constexpr (sizeof(E) >= 4) writes(p, n);
  if constexpr (sizeof(E) == 4) return _mm512_mask_storeu_ps((float*)p, (1u << n) - 1, (__m512)v);
  if constexpr (sizeof(E) == 8) return _mm512_mask_storeu_pd((double*)p, (1u << n) - 1, (__m512d)v);
#endif
  E part[L];
  store(part, v);
  copy_first<E, L>(p, part, n);
}

INLINE float one(const float* p) { return *p; }
INLINE double one(const double* p) { return *p; }
template <class E> INLINE float one(const E* p) {
  E whole[FL] = {*p};
  float wide[FL];
  store(wide, load(whole));
  return wide[0];
}

// ---- filling a tile

template <class A> INLINE void zero(A* p, int64_t n) {
  const typename Vec<A>::V none = held(typename Vec<A>::V{});  // not a call of memset: it is mostly a vector
  for (int64_t i = 0; i < n; i += Vec<A>::lanes) store(p + i, none);
}

// What a row of a tile reads: positions [left, inside) are elements, from x[left + origin] on.
struct Span {
  int64_t origin, width, left, inside;
  Span(const Cut& c, int64_t at, int64_t n) : origin(at * c.stride + c.low), width(c.extent(n)), left(clamp(-origin, 0, width)), inside(clamp(c.in - origin, left, width)) {}
};

// Rows of n elements; zeros are stored beyond them, in the last vector. Functions of their own for their registers: inside of what calls
// them these loops took half of the time of a 14x14 plane, three times what they do now.
template <class E, class A> __attribute__((noinline)) void copy_rows(const E* x, int64_t x_row, int64_t n, int64_t rows, const E* end, A* dst, int64_t dst_row) {
  constexpr int L = Vec<A>::lanes;
  const int64_t whole = n - n % L;
  for (; rows > 0; --rows, x += x_row, dst += dst_row) {
    for (int64_t p = 0; p < whole; p += L) store(dst + p, load(x + p));
    if (whole < n) store(dst + whole, load_first<A>(x + whole, n - whole, end));
  }
}

// The same, dealt into even and odd positions; the first element comes to position `left`.
template <class E, class A>
__attribute__((noinline)) void deal_rows(const E* x, int64_t x_row, int64_t n, int64_t left, int64_t rows, const E* end, A* dst, int64_t dst_row, int64_t phase) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  decltype(V{} < V{}) evens, odds;
  for (int i = 0; i < L; ++i) {
    evens[i] = 2 * i;
    odds[i] = 2 * i + 1;
  }
  const int64_t lone = left % 2 && n > 0;  // an element at an odd position before all pairs
  const int64_t pairs = n - lone, whole = pairs - pairs % (2 * L);
  for (; rows > 0; --rows, x += x_row, dst += dst_row) {
    A *even = dst + (left + lone) / 2, *odd = even + phase;
    if (lone) odd[-1] = one(x);
    const E* from = x + lone;
    for (int64_t p = 0; p < whole; p += 2 * L, even += L, odd += L, from += 2 * L) {
      const V a = load(from), b = load(from + L);
      store(even, __builtin_shuffle(a, b, evens));
      store(odd, __builtin_shuffle(a, b, odds));
    }
    const int64_t rest = pairs - whole;
    if (!rest) continue;
    const V a = rest >= L ? load(from) : load_first<A>(from, rest, end), b = rest > L ? load_first<A>(from + L, rest - L, end) : V{};
    store(even, __builtin_shuffle(a, b, evens));
    store(odd, __builtin_shuffle(a, b, odds));
  }
}

// A row of any mode and spread, not dealt.
template <class E, class A> void straight_row(const Cut& c, Mode mode, const Span& s, const E* x, const E* end, A* dst) {
  if (c.spread == 1) {
    zero(dst, s.left);
    copy_rows(x + s.left + s.origin, 0, s.inside - s.left, 1, end, dst + s.left, 0);
    zero(dst + s.inside, s.width - s.inside);
    if (mode == kZeros) return;
  }
  for (int64_t p = 0; p < s.width; ++p) {
    if (c.spread == 1 && p == s.left) p = s.inside;
    if (p == s.width) return;
    const int64_t i = source(p + s.origin, c.in, c.spread, mode);
    dst[p] = i < 0 ? A(0) : one(x + i);
  }
}

template <class E, class A> void any_row(const Layout<A>& l, const Span& s, const E* x, const E* end, A* dst, A* straight) {
  const int64_t step = l.cut[2].stride;
  if (step == 1) return straight_row(l.cut[2], l.mode, s, x, end, dst);
  straight_row(l.cut[2], l.mode, s, x, end, straight);
  if (step == 2) return deal_rows(straight, 0, s.width, 0, 1, straight + s.width, dst, 0, l.phase);
  for (int64_t q = 0; q < step; ++q)
    for (int64_t k = 0, p = q; p < s.width; ++k, p += step) dst[q * l.phase + k] = straight[p];
}

// Rows of zeros and elements, zeros around them.
template <class E, class A> void plain_rows(const Layout<A>& l, const Span& rows, const Span& s, bool kept, const E* x, const E* end, A* dst) {
  const Cut& c = l.cut[2];
  const int64_t n = s.inside - s.left, count = rows.inside - rows.left;
  const E* from = x + (rows.left + rows.origin) * c.in + s.left + s.origin;
  if (c.stride == 2) {
    if (!kept) zero(dst, rows.width * l.row);
    return deal_rows(from, c.in, n, s.left, count, end, dst + rows.left * l.row, l.row, l.phase);
  }
  A* inside = dst + rows.left * l.row;
  if (!kept) {
    zero(dst, rows.left * l.row);
    zero(dst + rows.inside * l.row, (rows.width - rows.inside) * l.row);
    for (int64_t j = 0; j < count; ++j) {
      zero(inside + j * l.row, s.left);
      zero(inside + j * l.row + s.inside, s.width - s.inside);
    }
  }
  copy_rows(from, c.in, n, count, end, inside + s.left, l.row);
}

// The tile of outputs [at, at + n) from plane x. `kept`: what is zero there has been left so by the plane before.
template <class E, class A> void fill(const Layout<A>& l, const int64_t* at, const int64_t* n, bool kept, const E* x, const E* end, A* tile, A* straight) {
  const Cut &c = l.cut[0], &b = l.cut[1], &a = l.cut[2];
  const Span slices(c, at[0], n[0]), rows(b, at[1], n[1]), columns(a, at[2], n[2]);
  const bool plain = l.mode == kZeros && b.spread * a.spread == 1 && a.stride <= 2;
  for (int64_t i = 0; i < slices.width; ++i) {
    const int64_t from = source(i + slices.origin, c.in, c.spread, l.mode);
    A* dst = tile + i * l.slice;
    if (from < 0) {
      if (!kept) zero(dst, rows.width * l.row);
      continue;
    }
    const E* plane = x + from * b.in * a.in;
    if (plain) {
      plain_rows(l, rows, columns, kept, plane, end, dst);
    } else {
      for (int64_t j = 0; j < rows.width; ++j) {
        const int64_t row = source(j + rows.origin, b.in, b.spread, l.mode);
        if (row >= 0) any_row(l, columns, plane + row * a.in, end, dst + j * l.row, straight);
        else if (!kept) zero(dst + j * l.row, l.row);
      }
    }
  }
}

// ---- a call

// Where a column tap reads, and its weight.
struct Tap {
  int64_t x, w;
};

// Taps that are read alike: kernel rows of `columns` taps.
struct Part {
  int64_t x, w, rows, columns;
};

template <class A> struct Plan {
  static constexpr int L = Vec<A>::lanes;
  DepthwiseGeometry g;
  int64_t residues[3];
  Layout<A> l;
  Phase* phases[3];
  Tap* columns;   // [residue][tap]
  Part* parts;    // [residue of the slice][residue of the column][part]
  int64_t count;  // of parts
  bool folded;
  A *tile, *straight;
  Shelf rest;

  Plan(const DepthwiseGeometry& of, void* scratch, bool by_residue) : g(flat(of)), rest{(uintptr_t)scratch} {
    l.mode = g.mode;
    for (int i = 0; i < 3; ++i) cut(i, by_residue);
    l.choose();
    // A long kernel over a single row, seen as rows of one vector: taps a vector apart read the same x. Loads are halved at 31 taps and
    // 16 lanes, quartered at 8.
    const int64_t d = g.dilation[2], k = g.kernel[2];
    // (The weight's gradient needs eight lanes for it: with four, 3 of 31 taps are left over in each row.)
    folded = !g.ordered && (by_residue || L >= 8) && g.spread[0] * g.spread[1] * g.out[0] * g.out[1] * g.kernel[0] * g.kernel[1] == 1 && g.stride[2] == 1 && g.spread[2] == 1 && L % d == 0 && k > L / d && l.cut[2].tile >= L;
    columns = rest.take<Tap>(residues[2] * k);
    count = folded ? 2 : g.kernel[0];
    parts = rest.take<Part>(residues[0] * residues[2] * count);
    tile = rest.take<A>(l.size);
    straight = rest.take<A>(l.cut[2].extent(l.cut[2].tile) + 2 * L);
  }
  Phase phase(int i, int64_t residue) const {
    if (residues[i] == g.spread[i]) return phase_of(g, i, residue);
    return {g.out[i], g.kernel[i], 0, 1, -g.before[i], g.dilation[i]};  // the tile holds the zeros
  }
  void cut(int i, bool by_residue) {
    residues[i] = by_residue ? g.spread[i] : 1;
    phases[i] = rest.take<Phase>(residues[i]);
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t r = 0; r < residues[i]; ++r) {
      const Phase p = phase(i, r);
      if (!p.taps || !p.outputs) continue;
      low = min64(low, p.from);
      high = max64(high, p.from + (p.taps - 1) * p.dilation);
    }
    if (low > high) low = high = 0;
    l.cut[i] = {g.in[i], g.spread[i] / residues[i], g.stride[i], low, high - low + 1, ceil_div(g.out[i], residues[i]), 0};
  }
  // What scratch must hold; apart from the sizes above, so that those can be asked for without any.
  void prepare() {
    for (int i = 0; i < 3; ++i)
      for (int64_t r = 0; r < residues[i]; ++r) phases[i][r] = phase(i, r);
    for (int64_t r = 0; r < residues[2]; ++r) {
      const Phase& p = phases[2][r];
      for (int64_t t = 0; t < p.taps; ++t) columns[r * g.kernel[2] + t] = {l.column(p.from - l.cut[2].low + t * p.dilation), p.tap + t * p.tap_step};
    }
    if (folded) {
      const int64_t of_row = L / g.dilation[2], rows = ceil_div(g.kernel[2], of_row), last = g.kernel[2] - (rows - 1) * of_row;
      parts[0] = {0, 0, rows, last};
      parts[1] = {last * g.dilation[2], last, rows - 1, of_row - last};
      return;
    }
    for (int64_t r = 0; r < residues[0]; ++r)
      for (int64_t q = 0; q < residues[2]; ++q)
        for (int64_t t = 0; t < count; ++t) {
          const Phase& p = phases[0][r];
          parts[(r * residues[2] + q) * count + t] = {t * p.dilation * l.slice, t * p.tap_step * g.kernel[1] * g.kernel[2], g.kernel[1], phases[2][q].taps};
        }
  }
};

// Rows of outputs that lie `dilation` apart meet input rows that do: how far apart are rows that share them, and how many of those
// input rows does one output row come after the other.
struct Sharing {
  int64_t classes, step;
  Sharing(int64_t stride, int64_t dilation) : classes(1) {
    if (dilation > 1)
      while (classes * stride % dilation) ++classes;
    step = dilation > 1 ? classes * stride / dilation : stride;
  }
};

// ---- forward

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
INLINE void meet(const A* x, int64_t x_row, const Tap* tap, int64_t count, const A* w, int64_t w_row, typename Vec<A>::V (*acc)[N]) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  for (const Tap* end = tap + count; tap != end; ++tap) {
    V weight[K];
#pragma GCC unroll 8
    for (int m = 0; m < K; ++m) weight[m] = broadcast(w[tap->w + m * w_row]);
    const A* p = x + tap->x;
#if defined(__x86_64__)
    __asm__("" : "+r"(p));  // one pointer: GCC would keep one for each of N vectors, in memory
#endif
#pragma GCC unroll 32
    for (int r = 0; r < STEP * (R - 1) + K; ++r, p += x_row) {
      V v[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) v[i] = K > 1 ? held(load(p + i * L)) : load(p + i * L);
#pragma GCC unroll 8
      for (int m = 0; m < K; ++m)
        if (r >= m && (r - m) % STEP == 0 && (r - m) / STEP < R) {
#pragma GCC unroll 8
          for (int i = 0; i < N; ++i) acc[(r - m) / STEP][i] += weight[m] * v[i];
        }
    }
  }
}

// R rows of N vectors end. The last vector of a row holds n outputs: it is written whole where what follows will be written after it, not
// beyond `limit`.
template <class A, int R, int N> INLINE void put(typename Vec<A>::V (*acc)[N], Activation activation, A* y, int64_t y_row, int64_t n, const A* limit) {
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
      else store_first<A>(y, acc[q][i], n);
    }
  }
}

// Kernel rows [top, bottom) of every part.
template <class A, int R, int N, int STEP>
INLINE void block(const Window<A>& o, int64_t top, int64_t bottom, const A* x, A* y, int64_t y_row, int64_t n, const A* limit) {
  typename Vec<A>::V acc[R][N];
#pragma GCC unroll 8
  for (int q = 0; q < R; ++q)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) acc[q][i] = broadcast(o.bias);
  for (int64_t p = o.first; p < o.last; ++p) {
    const Part& part = o.parts[p];
    const A* px = x + part.x + top * o.x_row;
    const A* pw = o.w + part.w + top * o.w_row;
    for (int64_t left = min64(bottom, part.rows) - top; left > 0; left -= kTaps, px += kTaps * o.x_row, pw += kTaps * o.w_row) {
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

template <class A, int N> INLINE void line(const Window<A>& o, const Part& part, const A* x, const A* w, A* y, int64_t n, const A* limit) {
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
      for (; at + 4 * L <= n; at += 4 * L) block<A, 1, 4, 1>(o, top, bottom, rows.x + at, rows.y + at, 0, L, rows.limit);
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
template <class E, class A> __attribute__((noinline)) void narrow_rows(const A* of, int64_t of_row, int64_t n, int64_t rows, E* y, int64_t y_row, const E* limit) {
  constexpr int L = Vec<A>::lanes;
  for (; rows > 0; --rows, of += of_row, y += y_row) {
    for (int64_t o = 0; o + L <= n; o += L) store(y + o, load(of + o));
    if (n >= L) store(y + n - L, load(of + n - L));
    else if (y + L <= limit) store(y, load(of));
    else store_first<A>(y, load(of), n);
  }
}

// n outputs from the rows of their residues.
template <class E, class A> void weave(const A* of, int64_t size, int64_t residues, int64_t n, E* y, A* line) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  if (residues == 2) {
    decltype(V{} < V{}) low, high;
    for (int i = 0; i < L; ++i) {
      low[i] = i / 2 + i % 2 * L;
      high[i] = L / 2 + i / 2 + i % 2 * L;
    }
    for (int64_t o = 0; o < n; o += 2 * L) {
      const V a = load(of + o / 2), b = load(of + size + o / 2);
      store_first<A>(y + o, __builtin_shuffle(a, b, low), n - o);
      if (n > o + L) store_first<A>(y + o + L, __builtin_shuffle(a, b, high), n - o - L);
    }
    return;
  }
  for (int64_t r = 0; r < residues; ++r)
    for (int64_t o = r, j = 0; o < n; o += residues, ++j) line[o] = of[r * size + j];
  for (int64_t o = 0; o < n; o += L) store_first<A>(y + o, load(line + o), n - o);
}

// Rows of a tile that share what they read: where, apart from the plane, they are read, multiplied and written.
struct Job {
  const Part* parts;
  int64_t first, last, x_row, w_row, x, x_step, low, high, w, y, y_row, run, count, step, taps;
};

template <class E> struct Forward : Plan<typename Sum<E>::type> {
  typedef typename Sum<E>::type A;
  static constexpr int L = Vec<A>::lanes;
  // 16-bit outputs are narrowed from rows of sums, as residues are woven: half of the code, and never less than 0.67 of the speed of float
  static constexpr bool kStraight = sizeof(E) == sizeof(A);
  using P = Plan<A>;
  using P::g, P::l, P::residues, P::phases, P::rest;
  int64_t size;  // of a row of one residue
  A *woven, *straight_line;
  Job* jobs;

  Forward(const DepthwiseGeometry& of, void* scratch) : P(of, scratch, true) {
    size = round_up(l.cut[2].tile, L) + L;
    const bool weaving = !kStraight || residues[2] > 1;
    woven = rest.template take<A>(weaving ? kRows * residues[2] * size : 0);
    straight_line = rest.template take<A>(weaving ? residues[2] * size : 0);
    jobs = rest.template take<Job>(residues[0] * l.cut[0].tile * residues[1] * min64(g.dilation[1], l.cut[1].tile));
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
    const Rows<A> rows{P::tile + j.x, j.x_step, j.low, j.high, (A*)to, j.y_row, n[2], !j.run ? nullptr : (const A*)(l.whole ? end : to + j.run)};
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
               {from.x, from.x_step, from.low, from.high, woven + r * size, residues[2] * size, max64(min64(from.n, phases[2][r].outputs - at), 0), straight_line});
      }
      if (residues[2] == 1) narrow_rows<E>(woven, size, n, rows, y, j.y_row, limit);
      else
        for (int64_t i = 0; i < rows; ++i) weave<E, A>(woven + i * residues[2] * size, size, residues[2], n, y + i * j.y_row, straight_line);
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
    const int64_t in = g.in[0] * g.in[1] * g.in[2], out = g.out[0] * g.out[1] * g.out[2], taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
    const E *x_end = x + count * in, *y_end = y + count * g.multiplier * out;
    auto make = [&](int64_t p, int64_t jobs_of, const int64_t* at, const int64_t* n) {
      for (int64_t m = 0, q = p * g.multiplier; m < g.multiplier; ++m, ++q)
        for (int64_t i = 0; i < jobs_of; ++i) outputs(jobs[i], at, n, w + q * taps, bias ? bias[q] : A(0), y + q * out, y_end);
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
            const int64_t at[3] = {i, j, min64(k, a.steps - a.tile)}, n[3] = {min64(c[0].tile, c[0].steps - i), min64(c[1].tile, c[1].steps - j), a.tile};
            fill<E, A>(l, at, n, false, x + p * in, x_end, P::tile, P::straight);
            make(p, prepare_tile(at, n), at, n);
          }
  }
};

template <class E> void forward(const DepthwiseGeometry& g, int64_t planes, const void* x, const void* w, const void* b, void* y, void* scratch) {
  typedef typename Sum<E>::type A;
  Forward<E> f(g, scratch);
  f.prepare();
  f.planes(planes, (const E*)x, (const A*)w, (const A*)b, (E*)y);
}

// ---- gradient of the weight

// R rows of grad_y, STEP input rows apart, meet KH·KW taps. PART: only n columns, and no NaN beyond them.
template <class A, int KH, int KW, int R, int STEP, bool PART>
INLINE void touch(const A* gy, int64_t gy_step, const A* x, int64_t x_row, const Tap* columns, int64_t n, typename Vec<A>::V (*acc)[KW]) {
  typedef typename Vec<A>::V V;
  V g[R];
#pragma GCC unroll 8
  for (int q = 0; q < R; ++q) g[q] = load(gy + q * gy_step);
#pragma GCC unroll 16
  for (int r = 0; r < STEP * (R - 1) + KH; ++r, x += x_row)
#pragma GCC unroll 8
    for (int t = 0; t < KW; ++t) {
      V v = KH > 1 ? held(load(x + columns[t].x)) : load(x + columns[t].x);
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
INLINE void correlate_rows(const Field<A>& f, const A* gy, const A* x, const Tap* columns, typename Vec<A>::V (*acc)[KW]) {
  constexpr int L = Vec<A>::lanes;
  const int64_t gy_step = f.classes * f.gy_row;
  int64_t o = 0;
  for (; o + L <= f.n; o += L) touch<A, KH, KW, R, STEP, false>(gy + o, gy_step, x + o, f.x_row, columns, L, acc);
  if (o < f.n) touch<A, KH, KW, R, STEP, true>(gy + o, gy_step, x + o, f.x_row, columns, f.n - o, acc);
}

// The sum over lanes of each of T vectors: pairs of vectors become one, of the sums of pairs of lanes, until a lane is a vector's sum.
template <class A, int T> INLINE void add_lanes(const typename Vec<A>::V* v, A* sums) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  decltype(V{} < V{}) evens, odds;
  for (int i = 0; i < L; ++i) {
    evens[i] = 2 * i;
    odds[i] = 2 * i + 1;
  }
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
        if (2 * i < left) s[i] = __builtin_shuffle(s[2 * i], s[2 * i + 1], evens) + __builtin_shuffle(s[2 * i], s[2 * i + 1], odds);
        else s[i] = V{};
      left = (left + 1) / 2;
    }
    store(all + from, s[0]);
  }
  for (int t = 0; t < T; ++t) sums[t] = all[t];
}

// sums[m][t] of taps m, t over a tile. STEP 0: rows that share nothing.
template <class A, int KH, int KW, int STEP> void correlate(const Field<A>& f, const A* gy, const A* x, const Tap* columns, A* sums) {
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
        for (; i + 3 * f.classes < f.rows; i += 4 * f.classes, of += 4 * f.classes * f.gy_row, from += 4 * f.classes * f.x_step)
          correlate_rows<A, KH, KW, 4, STEP>(f, of, from, columns, acc);
        if (i + f.classes < f.rows) {
          correlate_rows<A, KH, KW, 2, STEP>(f, of, from, columns, acc);
          i += 2 * f.classes, of += 2 * f.classes * f.gy_row, from += 2 * f.classes * f.x_step;
        }
      }
      for (; i < f.rows; i += f.classes, of += f.classes * f.gy_row, from += f.classes * f.x_step) correlate_rows<A, KH, KW, 1, 1>(f, of, from, columns, acc);
    }
  if (f.rest) touch<A, KH, KW, 1, 1, true>(gy + f.rows * f.gy_row, 0, x + f.rows * f.x_step, f.x_row, columns, f.rest, acc);
  add_lanes<A, KH * KW>(acc[0], sums);
}

template <class A> struct GradWeight : Plan<A> {
  static constexpr int L = Vec<A>::lanes;
  using P = Plan<A>;
  using P::g, P::l, P::rest;
  int64_t gy_row;
  A* gy;

  GradWeight(const DepthwiseGeometry& of, void* scratch) : P(of, scratch, false) {
    gy_row = round_up(l.cut[2].tile, L);
    gy = rest.template take<A>(l.cut[0].tile * l.cut[1].tile * gy_row);
  }

  template <class E> void fill_gy(const int64_t* at, const int64_t* n, const E* from, const E* end) const {
    for (int64_t i = 0; i < n[0]; ++i)
      copy_rows(from + ((at[0] + i) * g.out[1] + at[1]) * g.out[2] + at[2], g.out[2], n[2], n[1], end, gy + i * n[1] * gy_row, gy_row);
  }

  template <int KH, int KW, int STEP> static void add(const Field<A>& f, const A* x, const Tap* columns, A* gw, int64_t w_row, int64_t made) {
    A sums[KH * KW];
    correlate<A, KH, KW, STEP>(f, f.gy, x, columns, sums);
    for (int m = 0; m < KH; ++m)
      for (int64_t t = made; t < KW; ++t) gw[m * w_row + t] += sums[m * KW + t];
  }
  // KH kernel rows; one or two last columns are taken with some before them, which are dropped.
  template <int KH, int STEP> static void kernel_rows(const Field<A>& f, const A* x, const Tap* columns, int64_t count, A* gw, int64_t w_row) {
    for (int64_t t = 0; t < count;) {
      const int64_t left = count - t, wide = KH > 1 || left < 4 ? 3 : left < 7 || VECTOR_BYTES == 16 ? 4 : 7;
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
    Field<A> f{n[0], s.classes, n[1], n[2], 0, gy, n[1] * gy_row, gy_row, P::tile, g.stride[0] * l.slice, g.stride[1] * l.row, g.dilation[1] * l.row};
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
    const int64_t in = g.in[0] * g.in[1] * g.in[2], out = g.out[0] * g.out[1] * g.out[2], taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
    const Cut* c = l.cut;
    for (int64_t i = 0; i < c[0].steps; i += c[0].tile)
      for (int64_t j = 0; j < c[1].steps; j += c[1].tile)
        for (int64_t k = 0; k < c[2].steps; k += c[2].tile) {
          const int64_t at[3] = {i, j, k}, n[3] = {min64(c[0].tile, c[0].steps - i), min64(c[1].tile, c[1].steps - j), min64(c[2].tile, c[2].steps - k)};
          fill<E, A>(l, at, n, false, x, x + in, P::tile, P::straight);
          for (int64_t m = 0; m < g.multiplier; ++m) {
            fill_gy(at, n, from + m * out, from + g.multiplier * out);
            tile(n, gw + m * taps);
          }
        }
  }
};

template <class E> void grad_weight(const DepthwiseGeometry& g, const void* x, const void* grad_y, void* grad_weight, void* scratch) {
  typedef typename Sum<E>::type A;
  GradWeight<A> w(g, scratch);
  w.prepare();
  w.plane((const E*)x, (const E*)grad_y, (A*)grad_weight);
}

template <class E> size_t scratch_bytes(const DepthwiseGeometry& g) {
  const Forward<E> f(g, nullptr);
  const GradWeight<typename Sum<E>::type> w(g, nullptr);
  return max64(f.rest.at, w.rest.at);
}

}  // namespace

extern const PlanesTables depthwise_planes;
const PlanesTables depthwise_planes = {
    {scratch_bytes<float>, forward<float>, grad_weight<float>},
    {scratch_bytes<double>, forward<double>, grad_weight<double>},
    {scratch_bytes<bf16>, forward<bf16>, grad_weight<bf16>},
    {scratch_bytes<f16>, forward<f16>, grad_weight<f16>},
};

}  // namespace ISA
}  // namespace omniconv
