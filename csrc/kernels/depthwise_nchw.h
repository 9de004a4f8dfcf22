// What the contiguous depthwise kernels share: how planes are cut into tiles, and how a tile is filled. Included by
// kernels only; internal linkage.
//
// A plane is cut into tiles that fit half of a small L2 (most planes are one tile). Of each the padded input is copied
// into scratch, widened, and what follows is arithmetic without a case.
#pragma once
#include "kernels/depthwise.h"
#include "kernels/depthwise_window.h"
#include "simd/part.h"
#include "simd/shuffle.h"

namespace omniconv {
namespace {

constexpr int64_t kTileBytes =
    131072;  // of padded input: with 32 KB 3-D took 1.3 times as long, as more slices are copied twice
constexpr int64_t kRowMost = 4096;  // positions in a row of a tile, unless a window is as wide
constexpr int kTaps = 5;            // kernel rows that are held in registers at once
constexpr int64_t kRows = 7;        // output rows that share their input rows

INLINE int64_t ceil_div(int64_t a, int64_t b) { return b == 1 ? a : (a + b - 1) / b; }
INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return min64(max64(x, low), high); }

// ---- geometry

// One axis of a convolution without spread: output j and tap k meet position j·stride + from + k·dilation of the input.
// A spread axis is `spread` such convolutions, one for each residue of the output, with those taps that meet elements:
// none of the zeros is multiplied.
struct Phase { int64_t outputs, taps, tap, tap_step, from, dilation; };

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

// The tiles of a plane and how one lies in scratch: rows packed into `stride` phases, position p at phase p % stride,
// index p / stride.
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

// A plane with one row a slice is one slice: rows are what a tile shares. Axis by axis from the caller's: swapped in a
// fresh copy, it waited for that copy's stores (6 ns of the 100 that the gradient of a 7x7 plane takes).
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
struct Arena {
  uintptr_t at;
  template <class T> T* take(int64_t n) {
    T* p = (T*)at;
    at += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

// ---- filling a tile

template <class A> INLINE void zero(A* p, int64_t n) {
  const typename Vec<A>::V none = in_register(typename Vec<A>::V{});  // not a call of memset: it is mostly a vector
  for (int64_t i = 0; i < n; i += Vec<A>::lanes) store(p + i, none);
}

// What a row of a tile reads: positions [left, inside) are elements, from x[left + origin] on.
struct Span {
  int64_t origin, width, left, inside;
  Span(const Cut& c, int64_t at, int64_t n)
      : origin(at * c.stride + c.low),
        width(c.extent(n)),
        left(clamp(-origin, 0, width)),
        inside(clamp(c.in - origin, left, width)) {}
};

// Rows of n elements; zeros are stored beyond them, in the last vector. Functions of their own for their registers:
// inside of what calls them these loops took half of the time of a 14x14 plane, three times what they do now.
template <class E, class A> __attribute__((noinline)) void copy_rows(const E* x, int64_t x_row, int64_t n, int64_t rows,
                                                                     const E* end, A* dst, int64_t dst_row) {
  constexpr int L = Vec<A>::lanes;
  const int64_t whole = n - n % L;
  for (; rows > 0; --rows, x += x_row, dst += dst_row) {
    for (int64_t p = 0; p < whole; p += L) store(dst + p, load(x + p));
    if (whole < n) store(dst + whole, load_first<A>(x + whole, n - whole, end));
  }
}

// The same, packed into even and odd positions; the first element comes to position `left`.
template <class E, class A>
__attribute__((noinline)) void copy_rows_by_parity(const E* x, int64_t x_row, int64_t n, int64_t left, int64_t rows,
                                                   const E* end, A* dst, int64_t dst_row, int64_t phase) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const int64_t lone = left % 2 && n > 0;  // an element at an odd position before all pairs
  const int64_t pairs = n - lone, whole = pairs - pairs % (2 * L);
  for (; rows > 0; --rows, x += x_row, dst += dst_row) {
    A *even = dst + (left + lone) / 2, *odd = even + phase;
    if (lone) odd[-1] = load_scalar(x);
    const E* from = x + lone;
    for (int64_t p = 0; p < whole; p += 2 * L, even += L, odd += L, from += 2 * L) {
      const V a = load(from), b = load(from + L);
      store(even, even_lanes(a, b));
      store(odd, odd_lanes(a, b));
    }
    const int64_t rest = pairs - whole;
    if (!rest) continue;
    const V a = rest >= L ? load(from) : load_first<A>(from, rest, end),
            b = rest > L ? load_first<A>(from + L, rest - L, end) : V{};
    store(even, even_lanes(a, b));
    store(odd, odd_lanes(a, b));
  }
}

// A row of any mode and spread, not packed.
template <class E, class A> void straight_row(const Cut& c, Mode mode, const Span& s, const E* x, const E* end,
                                              A* dst) {
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
    dst[p] = i < 0 ? A(0) : load_scalar(x + i);
  }
}

template <class E, class A> void any_row(const Layout<A>& l, const Span& s, const E* x, const E* end, A* dst,
                                         A* straight) {
  const int64_t step = l.cut[2].stride;
  if (step == 1) return straight_row(l.cut[2], l.mode, s, x, end, dst);
  straight_row(l.cut[2], l.mode, s, x, end, straight);
  if (step == 2) return copy_rows_by_parity(straight, 0, s.width, 0, 1, straight + s.width, dst, 0, l.phase);
  for (int64_t q = 0; q < step; ++q)
    for (int64_t k = 0, p = q; p < s.width; ++k, p += step) dst[q * l.phase + k] = straight[p];
}

// Rows of zeros and elements, zeros around them.
template <class E, class A> void plain_rows(const Layout<A>& l, const Span& rows, const Span& s, bool kept, const E* x,
                                            const E* end, A* dst) {
  const Cut& c = l.cut[2];
  const int64_t n = s.inside - s.left, count = rows.inside - rows.left;
  const E* from = x + (rows.left + rows.origin) * c.in + s.left + s.origin;
  if (c.stride == 2) {
    if (!kept) zero(dst, rows.width * l.row);
    return copy_rows_by_parity(from, c.in, n, s.left, count, end, dst + rows.left * l.row, l.row, l.phase);
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
template <class E, class A> void fill(const Layout<A>& l, const int64_t* at, const int64_t* n, bool kept, const E* x,
                                      const E* end, A* tile, A* straight) {
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
struct Tap { int64_t x, w; };

// Taps that are read alike: kernel rows of `columns` taps.
struct Part { int64_t x, w, rows, columns; };

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
  Arena arena;

  Plan(const DepthwiseGeometry& of, void* scratch, bool by_residue) : g(flat(of)), arena{(uintptr_t)scratch} {
    l.mode = g.mode;
    for (int i = 0; i < 3; ++i) cut(i, by_residue);
    l.choose();
    // A long kernel over a single row, seen as rows of one vector: taps a vector apart read the same x. Loads are
    // halved at 31 taps and 16 lanes, quartered at 8.
    const int64_t d = g.dilation[2], k = g.kernel[2];
    // (The weight's gradient needs eight lanes for it: with four, 3 of 31 taps are left over in each row.)
    folded = !g.ordered && (by_residue || L >= 8) &&
             g.spread[0] * g.spread[1] * g.out[0] * g.out[1] * g.kernel[0] * g.kernel[1] == 1 && g.stride[2] == 1 &&
             g.spread[2] == 1 && L % d == 0 && k > L / d && l.cut[2].tile >= L;
    columns = arena.take<Tap>(residues[2] * k);
    count = folded ? 2 : g.kernel[0];
    parts = arena.take<Part>(residues[0] * residues[2] * count);
    tile = arena.take<A>(l.size);
    straight = arena.take<A>(l.cut[2].extent(l.cut[2].tile) + 2 * L);
  }
  Phase phase(int i, int64_t residue) const {
    if (residues[i] == g.spread[i]) return phase_of(g, i, residue);
    return {g.out[i], g.kernel[i], 0, 1, -g.before[i], g.dilation[i]};  // the tile holds the zeros
  }
  void cut(int i, bool by_residue) {
    residues[i] = by_residue ? g.spread[i] : 1;
    phases[i] = arena.take<Phase>(residues[i]);
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t r = 0; r < residues[i]; ++r) {
      const Phase p = phase(i, r);
      if (!p.taps || !p.outputs) continue;
      low = min64(low, p.from);
      high = max64(high, p.from + (p.taps - 1) * p.dilation);
    }
    if (low > high) low = high = 0;
    l.cut[i] = {g.in[i], g.spread[i] / residues[i], g.stride[i], low, high - low + 1, ceil_div(g.out[i], residues[i]),
                0};
  }
  // What scratch must hold; apart from the sizes above, so that those can be asked for without any.
  void prepare() {
    for (int i = 0; i < 3; ++i)
      for (int64_t r = 0; r < residues[i]; ++r) phases[i][r] = phase(i, r);
    for (int64_t r = 0; r < residues[2]; ++r) {
      const Phase& p = phases[2][r];
      for (int64_t t = 0; t < p.taps; ++t)
        columns[r * g.kernel[2] + t] = {l.column(p.from - l.cut[2].low + t * p.dilation), p.tap + t * p.tap_step};
    }
    if (folded) {
      const int64_t of_row = L / g.dilation[2], rows = ceil_div(g.kernel[2], of_row),
                    last = g.kernel[2] - (rows - 1) * of_row;
      parts[0] = {0, 0, rows, last};
      parts[1] = {last * g.dilation[2], last, rows - 1, of_row - last};
      return;
    }
    for (int64_t r = 0; r < residues[0]; ++r)
      for (int64_t q = 0; q < residues[2]; ++q)
        for (int64_t t = 0; t < count; ++t) {
          const Phase& p = phases[0][r];
          parts[(r * residues[2] + q) * count + t] = {
              t * p.dilation * l.slice, t * p.tap_step * g.kernel[1] * g.kernel[2], g.kernel[1], phases[2][q].taps};
        }
  }
};

// Rows of outputs that lie `dilation` apart meet input rows that do: how far apart are rows that share them, and how
// many of those input rows does one output row come after the other.
struct Sharing {
  int64_t classes, step;
  Sharing(int64_t stride, int64_t dilation) : classes(1) {
    if (dilation > 1)
      while (classes * stride % dilation) ++classes;
    step = dilation > 1 ? classes * stride / dilation : stride;
  }
};

}  // namespace
}  // namespace omniconv
