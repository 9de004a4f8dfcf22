// What the dynamic kernels share: the weights of a tile of positions, and the positions that it reads, copied into scratch.
// Included by kernels only; internal linkage.
#pragma once
#include "kernels/depthwise_window.h"
#include "kernels/dynamic.h"
#include "simd/exponent.h"
#include "simd/part.h"
#include "simd/transpose.h"

namespace omniconv {
namespace {

// Memory handed out from scratch; from null, only its size.
struct Arena {
  uintptr_t at;
  template <class T> T* take(int64_t n) {
    T* p = (T*)at;
    at += round_up(n * int64_t(sizeof(T)), 64);
    return p;
  }
};

// ---- weights

// Well mixed bits of 64.
INLINE uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 32) * 0xd6e8feb86659fd93u;
  x = (x ^ x >> 29) * 0xa0761d6478bd642fu;
  return x ^ x >> 32;
}

// Drops of a row of n numbers, the first of which is at position `from`: nothing is stored, and every pass draws the same.
template <class A> void drop(const DynamicGeometry& g, uint64_t row, int64_t from, int64_t n, A* numbers) {
  const uint64_t key = mixed(g.seed + mixed(row + 1));
  const uint32_t low = uint32_t(key), high = uint32_t(key >> 32), dropped = g.dropped;
  const A scale = A(g.scale);
  for (int64_t t = 0; t < n; ++t) {
    uint32_t x = uint32_t(from + t) * 0x9e3779b1u + low;
    x = (x ^ x >> 16) * 0x7feb352du ^ high;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x ^= x >> 16;
    numbers[t] *= x < dropped ? A(0) : scale;
  }
}

INLINE bool has_dropout(const DynamicGeometry& g) { return g.scale != 1; }

// The one column of head h as weights: column[0, K), and whole vectors beyond.
template <class E, class A> INLINE void weigh_one(const DynamicGeometry& g, int64_t h, const E* kernels, A* column) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const int64_t K = g.kernel;
  const E* numbers = kernels + h * K;
  for (int64_t i = 0; i < K; i += L) store(column + i, load_part<A>(numbers + i, K - i));
  if (!g.softmax) return;
  A most = column[0], sum = 0;
  for (int64_t i = 1; i < K; ++i) most = column[i] > most ? column[i] : most;
  for (int64_t i = 0; i < K; i += L) store(column + i, exponential_below(load(column + i) - broadcast(most)));
  for (int64_t i = 0; i < K; ++i) sum += column[i];
  const V share = broadcast(A(1) / sum);
  for (int64_t i = 0; i < K; i += L) store(column + i, load(column + i) * share);
}
template <class A> INLINE void drop_one(const DynamicGeometry& g, int64_t h, A* column) {
  for (int64_t i = 0; has_dropout(g) && i < g.kernel; ++i) drop(g, g.row + h * g.kernel + i, 0, 1, column + i);
}

// Weights of head h at positions [from, from + n), in rows, `stride` apart, of whole vectors; `most` holds a number for each position.
template <class E, class A>
void weigh(const DynamicGeometry& g, int64_t h, const E* kernels, int64_t from, int64_t n, A* table, int64_t stride, A* most) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const int64_t K = g.kernel;
  const E* numbers = kernels + h * K * g.positions + from;
  // row by row: of a column of 512·4 bytes a step, L1 holds 24
  for (int64_t i = 0; i < K; ++i)
    for (int64_t t = 0; t < n; t += L) {
      const V v = load_part<A>(numbers + i * g.positions + t, n - t);
      store(table + i * stride + t, v);
      if (g.softmax) store(most + t, i ? larger(v, load(most + t)) : v);
    }
  for (int64_t t = 0; g.softmax && t < n; t += L) {
    const V m = load(most + t);
    V sum{};
    for (A* at = table + t; at < table + K * stride; at += stride) {
      const V e = exponential_below(load(at) - m);
      sum += e;
      store(at, e);
    }
    const V share = A(1) / sum;
    for (A* at = table + t; at < table + K * stride; at += stride) store(at, load(at) * share);
  }
}
template <class A> INLINE void drop_rows(const DynamicGeometry& g, int64_t h, int64_t from, int64_t n, A* table, int64_t stride) {
  for (int64_t i = 0; has_dropout(g) && i < g.kernel; ++i) drop(g, g.row + h * g.kernel + i, from, n, table + i * stride);
}

// ---- positions

// Rows [row, row + count) of a tile are positions from `from` on, or zeros where it is negative.
struct Span { int64_t row, count, from; };

// The rows of a tile, span by span. There are at most as many spans as rows, and 3 for each stretch where nothing is masked or mirrored.
struct Spans {
  Span* span;
  int64_t count;

  void add(int64_t row, int64_t n, int64_t from) {
    if (n <= 0) return;
    if (count) {
      Span& last = span[count - 1];
      if (from < 0 ? last.from < 0 : last.from >= 0 && last.from + last.count == from) {
        last.count += n;
        return;
      }
    }
    span[count++] = {row, n, from};
  }
  // n rows from `row` on, the first of which is position p.
  void stretch(int64_t row, int64_t n, int64_t p, int64_t length, Mode mode, const uint8_t* mask) {
    if (mode == kZeros && !mask) {
      const int64_t left = min64(max64(-p, 0), n), inside = min64(max64(length - p, left), n);
      add(row, left, -1);
      add(row + left, inside - left, p + left);
      add(row + inside, n - inside, -1);
      return;
    }
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = source(p + r, length, 1, mode);
      add(row + r, 1, at < 0 || (mask && mask[at]) ? -1 : at);
    }
  }
};

// How a tile of `outputs` reads: tap i of output t is row t + i·step. Neighbouring taps share their rows unless they are further apart than the tile is long.
struct Reach {
  int64_t step, rows;
  Reach(int64_t outputs, int64_t K, int64_t dilation) : step(min64(outputs, dilation)), rows(outputs + (K - 1) * step) {}
};

INLINE Spans spans_of(const DynamicGeometry& g, int64_t first, int64_t n, int64_t before, int64_t length, const Reach& reach, const uint8_t* mask, Span* space) {
  Spans s{space, 0};
  if (reach.step == g.dilation) {
    s.stretch(0, reach.rows, first - before, length, g.mode, mask);
    return s;
  }
  for (int64_t i = 0; i < g.kernel; ++i) s.stretch(i * reach.step, n, first + i * g.dilation - before, length, g.mode, mask);
  return s;
}

// The rows of a tile that are not zeros, [low, high), or all of them where no tap may be passed over.
struct Seen {
  int64_t low, high, kernel;
  Seen(const Spans& s, const Reach& reach, int64_t kernel, bool skips) : low(skips ? reach.rows : 0), high(skips ? 0 : reach.rows), kernel(kernel) {
    for (const Span* at = s.span; skips && at < s.span + s.count; ++at)
      if (at->from >= 0) low = min64(low, at->row), high = at->row + at->count;
  }
};

// Taps [first, last) of `count` positions from p on that reach a row which is seen; one at least, in which a weight that is NaN shows.
struct Taps { int64_t first, last; };
INLINE Taps taps_of(const Reach& reach, const Seen& seen, int64_t p, int64_t count) {
  if (seen.low <= p && p + count + (seen.kernel - 1) * reach.step <= seen.high) return {0, seen.kernel};
  const int64_t before = max64(0, seen.low - (p + count - 1)), room = max64(0, seen.high - p);
  const int64_t first = min64((before + reach.step - 1) / reach.step, seen.kernel - 1);
  return {first, max64(first + 1, min64(seen.kernel, (room + reach.step - 1) / reach.step))};
}

// Pointers to the rows of a tile: to channels side by side, where they lie, or to zeros.
template <class A> INLINE void point(const Spans& s, const A* x, int64_t step, const A* zeros, const A** row) {
  for (const Span* at = s.span; at < s.span + s.count; ++at)
    for (int64_t r = 0; r < at->count; ++r) row[at->row + r] = at->from < 0 ? zeros : x + (at->from + r) * step;
}

// W·lanes channels from c on side by side in each row, zeros beyond the last.
template <class E, class A, int W> void pack_rows(const Spans& s, const E* x, int64_t step, int64_t channel, int64_t c, int64_t group, A* to) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  for (const Span* at = s.span; at < s.span + s.count; ++at) {
    A* row = to + at->row * W * L;
    if (at->from < 0) {
      for (int64_t i = 0; i < at->count * W; ++i) store(row + i * L, V{});
      continue;
    }
    const E* from = x + at->from * step + c * channel;
    const int64_t channels = group - c;
    if (channel == 1) {
      for (int64_t r = 0; r < at->count; ++r, row += W * L, from += step)
#pragma GCC unroll 4
        for (int v = 0; v < W; ++v) store(row + v * L, channels > v * L ? load_part<A>(from + v * L, channels - v * L) : V{});
      continue;
    }
    for (int v = 0; v < W; ++v)
      for (int64_t r = 0; r < at->count; r += L) {
        const int64_t n = min64(L, at->count - r);
        V square[L];
        if (n == L && channels >= (v + 1) * L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load(from + (v * L + i) * channel + r);
        } else if (channels >= (v + 1) * L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load_part<A>(from + (v * L + i) * channel + r, n);
        } else {
          for (int i = 0; i < L; ++i) square[i] = v * L + i < channels ? load_part<A>(from + (v * L + i) * channel + r, n) : V{};
        }
        ::transpose<A>(square);
        A* out = row + (r * W + v) * L;
        if (n == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(out + i * W * L, square[i]);
        } else {
          for (int i = 0; i < n; ++i) store(out + i * W * L, square[i]);
        }
      }
  }
}

// `channels` of them one under the other, `row` apart: the positions of each, then zeros, as many as a block may read beyond them.
template <class E, class A> void pack_channels(const Spans& s, const E* x, int64_t step, int64_t channel, int64_t channels, A* to, int64_t row) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  // spans come in order: what a vector writes beyond the end of its own, the next one writes again
  const Span* const end = s.span + s.count;
  const int64_t filled = s.count ? end[-1].row + end[-1].count : 0, whole = min64(row, filled + 4 * L);
  if (step == 1) {
    for (int64_t c = 0; c < channels; ++c, x += channel, to += row) {
      for (const Span* at = s.span; at < end; ++at) {
        A* out = to + at->row;
        const E* from = x + at->from;
        if (at->from < 0) {
          for (int64_t r = 0; r < at->count; r += L) store(out + r, V{});
          continue;
        }
        int64_t r = 0;
        for (; r + L <= at->count; r += L) store(out + r, load(from + r));
        if (r < at->count) store(out + r, load_part<A>(from + r, at->count - r));
      }
      for (int64_t r = filled; r + L <= whole; r += L) store(to + r, V{});
    }
    return;
  }
  for (const Span* at = s.span; at < end; ++at)
    for (int64_t r = 0; r < at->count; r += L)
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t n = min64(L, at->count - r), m = min64(L, channels - c);
        V square[L];
        const E* from = x + (at->from + r) * step + c;
        A* out = to + c * row + at->row + r;
        if (at->from < 0) {
          for (int64_t i = 0; i < m; ++i) store(out + i * row, V{});
          continue;
        }
        if (m == L) {  // positions beyond the last are its copies, written over later
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load(from + min64(i, n - 1) * step);
          ::transpose<A>(square);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(out + i * row, square[i]);
          continue;
        }
        for (int i = 0; i < L; ++i) square[i] = load_part<A>(from + min64(i, n - 1) * step, m);
        ::transpose<A>(square);
        for (int i = 0; i < m; ++i) store(out + i * row, square[i]);
      }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t r = filled; r + L <= whole; r += L) store(to + c * row + r, V{});
}

}  // namespace
}  // namespace omniconv
