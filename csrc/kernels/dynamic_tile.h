// The edge of a tile of positions, where layouts, element types, pads and masks end: what it reads is copied, widened,
// into scratch, and sums are rounded and stored. Within it only the type of the sums is known. Included by kernels
// only; internal linkage.
#pragma once
#include "kernels/dynamic_weights.h"
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

// ---- which positions the rows of a tile are

// Rows [row, row + count) of a tile are positions from `from` on, or zeros where it is negative.
struct Segment { int64_t row, count, from; };

// The rows of a tile, in order. There are at most as many segments as rows, and 3 for each chunk where nothing is
// masked or mirrored.
struct Segments {
  Segment* segment;
  int64_t count;

  const Segment* begin() const { return segment; }
  const Segment* end() const { return segment + count; }
  void add(int64_t row, int64_t n, int64_t from) {
    if (n <= 0) return;
    if (count) {
      Segment& last = segment[count - 1];
      if (from < 0 ? last.from < 0 : last.from >= 0 && last.from + last.count == from) {
        last.count += n;
        return;
      }
    }
    segment[count++] = {row, n, from};
  }
  // n rows from `row` on, the first of which is position p.
  void add_chunk(int64_t row, int64_t n, int64_t p, int64_t length, Mode mode, const uint8_t* mask) {
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

// How a tile of `outputs` reads: tap i of output t is row t + i·step. Neighbouring taps share their rows unless they
// are further apart than the tile is long.
struct TileInput {
  int64_t step, rows;
  TileInput(int64_t outputs, int64_t K, int64_t dilation)
      : step(min64(outputs, dilation)), rows(outputs + (K - 1) * step) {}
};

INLINE Segments segments_of(const DynamicGeometry& g, int64_t first, int64_t n, int64_t before, int64_t length,
                            const TileInput& input, const uint8_t* mask, Segment* space) {
  Segments s{space, 0};
  if (input.step == g.dilation) {
    s.add_chunk(0, input.rows, first - before, length, g.mode, mask);
    return s;
  }
  for (int64_t i = 0; i < g.kernel; ++i)
    s.add_chunk(i * input.step, n, first + i * g.dilation - before, length, g.mode, mask);
  return s;
}

// The rows of a tile that are not zeros lie in [low, high); all of them where no tap may be skipped.
struct NonzeroRows {
  int64_t low, high, kernel;
  NonzeroRows(const Segments& s, const TileInput& input, int64_t kernel, bool skips)
      : low(skips ? input.rows : 0), high(skips ? 0 : input.rows), kernel(kernel) {
    for (const Segment& at : s)
      if (skips && at.from >= 0) low = min64(low, at.row), high = at.row + at.count;
  }
};

// Taps [first, last) of `count` positions from p on that reach such a row; one at least, in which a weight that is NaN
// shows.
struct Taps { int64_t first, last; };
INLINE Taps taps_of(const TileInput& input, const NonzeroRows& rows, int64_t p, int64_t count) {
  if (rows.low <= p && p + count + (rows.kernel - 1) * input.step <= rows.high) return {0, rows.kernel};
  const int64_t before = max64(0, rows.low - (p + count - 1)), room = max64(0, rows.high - p);
  const int64_t first = min64((before + input.step - 1) / input.step, rows.kernel - 1);
  return {first, max64(first + 1, min64(rows.kernel, (room + input.step - 1) / input.step))};
}

// Pointers to the rows of a tile: to channels side by side, where they lie, or to zeros.
template <class A> INLINE void point_rows(const Segments& s, const A* x, int64_t step, const A* zeros, const A** row) {
  for (const Segment& at : s)
    for (int64_t r = 0; r < at.count; ++r) row[at.row + r] = at.from < 0 ? zeros : x + (at.from + r) * step;
}

// ---- into a tile

// Up to `vectors` of channels [0, channels) side by side in each row, zeros beyond the last.
template <class E>
NOINLINE void pack_rows(const Segments& s, const void* x, int64_t step, int64_t channel, int64_t channels,
                        int64_t vectors, typename Accumulator<E>::type* to) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const int64_t width = vectors * L;
  for (const Segment& at : s) {
    A* row = to + at.row * width;
    if (at.from < 0) {
      for (int64_t i = 0; i < at.count * vectors; ++i) store(row + i * L, V{});
      continue;
    }
    const E* from = (const E*)x + at.from * step;
    if (channel == 1 && vectors == 2 && channels >= width) {
      for (int64_t r = 0; r < at.count; ++r, row += width, from += step) {
        store(row, load(from));
        store(row + L, load(from + L));
      }
      continue;
    }
    if (channel == 1) {
      for (int64_t r = 0; r < at.count; ++r, row += width, from += step)
        for (int64_t v = 0; v < width; v += L)
          store(row + v, channels > v ? load_part<A>(from + v, channels - v) : V{});
      continue;
    }
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t done = 0; done < at.count; done += L) {
        const int64_t r = max64(0, min64(done, at.count - L)),
                      n = min64(L, at.count - r);  // the last goes over some rows twice
        V square[L];
        if (n == L && channels >= (v + 1) * L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load(from + (v * L + i) * channel + r);
        } else {
          for (int i = 0; i < L; ++i)
            square[i] = v * L + i < channels ? load_part<A>(from + (v * L + i) * channel + r, n) : V{};
        }
        ::transpose<A>(square);
        A* out = row + (r * vectors + v) * L;
        if (n == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(out + i * width, square[i]);
        } else {
          for (int i = 0; i < n; ++i) store(out + i * width, square[i]);
        }
      }
  }
}

// `channels` of them one under the other, `row` apart: the positions of each, then zeros, as many as a block may read
// beyond them.
template <class E>
NOINLINE void pack_channels(const Segments& s, const void* xv, int64_t step, int64_t channel, int64_t channels,
                            typename Accumulator<E>::type* to, int64_t row) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  // segments come in order: what a vector writes beyond the end of its own, the next one writes again
  const int64_t filled = s.count ? s.end()[-1].row + s.end()[-1].count : 0, whole = min64(row, filled + 4 * L);
  if (step == 1) {
    for (int64_t c = 0; c < channels; ++c, x += channel, to += row) {
      for (const Segment& at : s) {
        A* out = to + at.row;
        const E* from = x + at.from;
        if (at.from < 0) {
          for (int64_t r = 0; r < at.count; r += L) store(out + r, V{});
          continue;
        }
        int64_t r = 0;
        for (; r + L <= at.count; r += L) store(out + r, load(from + r));
        if (r < at.count) store(out + r, load_part<A>(from + r, at.count - r));
      }
      for (int64_t r = filled; r + L <= whole; r += L) store(to + r, V{});
    }
    return;
  }
  for (const Segment& at : s)
    for (int64_t done = 0; done < at.count; done += L)
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t r = max64(0, min64(done, at.count - L)), n = min64(L, at.count - r), m = min64(L, channels - c);
        V square[L];
        const E* from = x + (at.from + r) * step + c;
        A* out = to + c * row + at.row + r;
        if (at.from < 0) {
          for (int64_t i = 0; i < m; ++i) store(out + i * row, V{});
          continue;
        }
        if (m == L) {  // positions beyond the last are its copies, written over later
          if (n == L) {
#pragma GCC unroll 16
            for (int i = 0; i < L; ++i) square[i] = load(from + i * step);
          } else {
            for (int i = 0; i < L; ++i) square[i] = load(from + min64(i, n - 1) * step);
          }
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

// ---- out of a tile

// A matrix (rows, columns) of sums, whose rows are elements of `to`.
template <class E>
NOINLINE void store_rows(const typename Accumulator<E>::type* from, int64_t from_row, int64_t rows, int64_t columns,
                         void* to, int64_t to_row) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += L)
      store_part<A>((E*)to + r * to_row + c, load(from + r * from_row + c), columns - c);
}

// Squares of a matrix (rows, columns) become squares of its transpose, whose rows are elements; the last ones go over
// some twice.
template <class E>
NOINLINE void store_columns(const typename Accumulator<E>::type* from, int64_t from_row, int64_t rows, int64_t columns,
                            void* tov, int64_t to_row) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  E* to = (E*)tov;
  typename Vec<A>::V square[L];
  for (int64_t done = 0; done < rows; done += L)
    for (int64_t done_columns = 0; done_columns < columns; done_columns += L) {
      const int64_t r = max64(0, min64(done, rows - L)), c = max64(0, min64(done_columns, columns - L));
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

// Positions of `channels` channels that the mask hides become zeros.
template <class E>
void clear_masked(const uint8_t* mask, int64_t n, int64_t channels, void* y, int64_t step, int64_t channel) {
  for (int64_t p = 0; p < n; ++p)
    for (int64_t c = 0; mask[p] && c < channels; ++c) ((E*)y)[p * step + c * channel] = E{};
}

// ---- what knows the element type; A is the type of its sums

template <class A> struct Edges {
  int64_t element;  // bytes
  bool converts;    // to the type of the sums
  void (*make_column)(const DynamicGeometry&, int64_t, const void*, A*);
  void (*make_weights)(const DynamicGeometry&, int64_t, const void*, int64_t, int64_t, A*, int64_t, A*);
  void (*pack_rows)(const Segments&, const void*, int64_t, int64_t, int64_t, int64_t, A*);
  void (*pack_channels)(const Segments&, const void*, int64_t, int64_t, int64_t, A*, int64_t);
  void (*store_rows)(const A*, int64_t, int64_t, int64_t, void*, int64_t);
  void (*store_columns)(const A*, int64_t, int64_t, int64_t, void*, int64_t);
  void (*clear_masked)(const uint8_t*, int64_t, int64_t, void*, int64_t, int64_t);
};
template <class E>
constexpr Edges<typename Accumulator<E>::type> edges{sizeof(E),      sizeof(E) != sizeof(typename Accumulator<E>::type),
                                                     make_column<E>, make_weights<E>,
                                                     pack_rows<E>,   pack_channels<E>,
                                                     store_rows<E>,  store_columns<E>,
                                                     clear_masked<E>};

}  // namespace
}  // namespace omniconv
