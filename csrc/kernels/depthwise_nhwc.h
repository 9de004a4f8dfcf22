// How the channels-last depthwise kernels go through a tensor: tiles, strips, rows, and the tap rows that an output row
// reads. Included by their kernel only; internal linkage.
#pragma once
#include "kernels/depthwise.h"
#include "kernels/depthwise_window.h"
#include "simd/registers.h"

namespace omniconv {
namespace {

// Outputs whose sums are in registers at a time; every ImageNet size is a multiple of 7.
constexpr int kBlock = 7;
constexpr int kWideBlock = kVectorRegisters >= 32 ? 14 : kBlock;
constexpr int64_t kNarrowTile = 14;        // columns of a narrow tile
constexpr int64_t kTileBytes = 256 << 10;  // of input and output that a tile may have
constexpr int64_t kTileTapRows = 1024;     // of the rows of a tile, unless one row has more

// A row of input columns and the row of taps that reads it.
template <class E, class A> struct TapRow {
  const E* x;
  const A* w;
};

// What the rows of one call share, and the tap rows of the one at hand.
template <class E, class A> struct Rows {
  const DepthwiseGeometry& g;
  int64_t C;                             // channels
  const int64_t* offset;                 // of padded column p, in elements; below 0 where it is padding
  int64_t interior_begin, interior_end;  // outputs that read no padding
  // With an input dilation, outputs and taps that stand as far apart read neighbouring columns: those of one phase
  // are a convolution of their own.
  int64_t first_column;           // the column that tap 0 of output 0 reads
  int64_t first_tap, taps;        // the phase's first tap, in elements, and how many there are
  int64_t tap_step, output_step;  // elements between taps, and between outputs
  const TapRow<E, A>* tap_rows;
  int64_t count;
};

INLINE int64_t padded_columns(const DepthwiseGeometry& g) {
  return (g.out[2] - 1) * g.stride[2] + (g.kernel[2] - 1) * g.dilation[2] + 1;
}

// Outputs are made in tiles, and in a tile by strips of a cache line of channels.
struct Tiling {
  int64_t strip, rows, columns;
  Tiling(const DepthwiseGeometry& g, int64_t C, int64_t element) {
    const int64_t column = (g.stride[2] + 1) * C * element;
    strip = 64 / element;
    columns = g.out[2];
    rows = max64(1, kTileBytes / (column * g.out[2]));
    // A stride that reaches few of the 64 sets of L1 cannot keep the rows of a strip there. Then tiles are narrow (128
    // channels, 56x56, 3x3, AVX2: 0.160 ms and 0.113), and with still fewer sets strips change before rows do (512
    // channels, 14x14, 3x3: 0.030 and 0.025).
    int64_t sets = 64;
    for (int64_t s = C * element; s % 128 == 0 && sets > 1; s /= 2) sets /= 2;
    const bool crowded = sets <= 8 && g.kernel[0] * g.kernel[1] * g.in[2] > sets * 8;
    if (rows == 1 || (crowded && sets <= 4)) {
      rows = 1;
      columns = min64(columns, kWideBlock);
    } else if (crowded) {
      columns = min64(columns, kNarrowTile);
    }
    rows = min64(rows, max64(1, kTileTapRows / (g.kernel[0] * g.kernel[1])));
    if (rows == 1) strip = C;  // no input row is read again: a row's tap rows are found once for all strips
  }
};

// The rows of one call, set up in scratch.
template <class E, class A> Rows<E, A> make_rows(const DepthwiseGeometry& g, int64_t C, void* scratch) {
  int64_t* offset = (int64_t*)scratch;
  const int64_t S = g.stride[2], before = g.before[2], seen = before + g.in[2] - (g.kernel[2] - 1) * g.dilation[2];
  for (int64_t p = 0; p < padded_columns(g); ++p) {
    const int64_t column = source(p - before, g.in[2], g.spread[2], g.mode);
    offset[p] = column < 0 ? -1 : column * C;
  }
  const int64_t step = g.dilation[2] == 1 ? C * g.spread[2] : C;  // with dilated taps there are no phases
  Rows<E, A> rows{g, C, offset, 0, 0, -before, 0, g.kernel[2], step, step, nullptr, 0};
  if (g.spread[2] == 1 && seen > 0) {
    rows.interior_begin = max64(0, (before + S - 1) / S);
    rows.interior_end = (seen - 1) / S + 1;
  }
  return rows;
}

INLINE size_t scratch_bytes(const DepthwiseGeometry& g) {
  return (padded_columns(g) + kTileTapRows) * sizeof(int64_t) +
         (kTileTapRows + g.kernel[0] * g.kernel[1]) * sizeof(TapRow<void, void>);
}

// Writes the tap rows of output row (od, oh) and returns how many there are; w is (taps, C).
template <class E, class A>
int64_t find_tap_rows(const Rows<E, A>& rows, int64_t od, int64_t oh, const E* x, const A* w, TapRow<E, A>* to) {
  const DepthwiseGeometry& g = rows.g;
  int64_t count = 0;
  for (int64_t kd = 0; kd < g.kernel[0]; ++kd) {
    const int64_t id = source(od * g.stride[0] - g.before[0] + kd * g.dilation[0], g.in[0], g.spread[0], g.mode);
    if (id < 0) continue;
    for (int64_t kh = 0; kh < g.kernel[1]; ++kh) {
      const int64_t ih = source(oh * g.stride[1] - g.before[1] + kh * g.dilation[1], g.in[1], g.spread[1], g.mode);
      if (ih < 0) continue;
      to[count++] = {x + (id * g.in[1] + ih) * g.in[2] * rows.C, w + (kd * g.kernel[1] + kh) * g.kernel[2] * rows.C};
    }
  }
  return count;
}

// Calls f(row, outputs [begin, end), channels [c, until)) with the row's tap rows set, over rows [first, last), their
// outputs [o0, o1) and channels [c0, c1).
template <class E, class A, class F>
INLINE void for_each_row(Rows<E, A>& rows, int64_t first, int64_t last, int64_t o0, int64_t o1, int64_t c0, int64_t c1,
                         const E* x, const A* w, const F& f) {
  const DepthwiseGeometry& g = rows.g;
  const Tiling tile(g, rows.C, sizeof(E));
  const int64_t most = g.kernel[0] * g.kernel[1];
  // in scratch, behind the offsets: how many tap rows each row of a tile has, then the tap rows
  int64_t* counts = (int64_t*)rows.offset + padded_columns(g);
  TapRow<E, A>* tap_rows = (TapRow<E, A>*)(counts + kTileTapRows);
  for (int64_t r0 = first; r0 < last; r0 += tile.rows) {
    const int64_t many = min64(tile.rows, last - r0);
    for (int64_t r = 0; r < many; ++r)
      counts[r] = find_tap_rows(rows, (r0 + r) / g.out[1], (r0 + r) % g.out[1], x, w, tap_rows + r * most);
    for (int64_t o = o0; o < o1; o += tile.columns)
      for (int64_t c = c0; c < c1; c += tile.strip)
        for (int64_t r = 0; r < many; ++r) {
          rows.tap_rows = tap_rows + r * most;
          rows.count = counts[r];
          f(r0 + r, o, min64(o + tile.columns, o1), c, min64(c + tile.strip, c1));
        }
  }
}

}  // namespace
}  // namespace omniconv
