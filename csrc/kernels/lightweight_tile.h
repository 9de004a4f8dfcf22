// What the lightweight kernels share: how a call is tiled, and the edge of a tile, where layouts, element types and
// padding end: the input is copied, widened, into scratch, and sums are activated, rounded and stored. Between these
// only the type of the sums is known. Included by kernels only; internal linkage.
#pragma once
#include "kernels/depthwise_window.h"
#include "kernels/lightweight.h"
#include "simd/activate_rows.h"
#include "simd/part.h"
#include "simd/registers.h"
#include "simd/transpose.h"

namespace omniconv {
namespace {

constexpr int kBlock = kVectorRegisters == 32 ? 16 : 8;  // outputs whose sums are held at once
constexpr int kTaps = kVectorRegisters == 32 ? 8 : 4;    // taps whose weights are held at once
constexpr int64_t kTileBytes = 24 << 10;                 // of one vector of channels: half of L1
constexpr int64_t kVectors = 8;    // of channels, copied side by side, so that whole cache lines are read
constexpr int64_t kMaxHalo = 512;  // from the first tap to the last: beyond it outputs are taken in dilated phases

// Outputs q + r·phases, r = 0, 1 …, are phase q; where there are several phases, the window within one is dense.
struct Tiling {
  int64_t phases, dilation, halo, outputs, rows;  // outputs of a tile, and the rows of x that they meet
  explicit Tiling(const LightweightGeometry& g) {
    const bool in_phases = g.dilation > 1 && g.dilation * (g.kernel - 1) > kMaxHalo;
    phases = in_phases ? g.dilation : 1;
    dilation = in_phases ? 1 : g.dilation;
    halo = dilation * (g.kernel - 1);
    const int64_t of_phase = (g.outputs + phases - 1) / phases;
    const int64_t limit = max64(kTileBytes / VECTOR_BYTES - halo, max64(halo, 8 * kBlock));
    const int64_t tiles = (of_phase + limit - 1) / limit;
    outputs = round_up((of_phase + tiles - 1) / tiles, kBlock);
    rows = outputs + halo;
  }
};

// One axis of memory: elements between positions and between channels.
struct Strides { int64_t step, channel, length; };

// ---- into a tile

// Positions first + r·step, r in [0, count), of `lanes` channels: row r of `to`, or zeros where there is nothing or the
// mask is set.
template <class E>
NOINLINE void load_tile(const Strides& s, Mode mode, const uint8_t* mask, const void* xv, int64_t lanes, int64_t first,
                        int64_t step, int64_t count, typename Accumulator<E>::type* to) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  int64_t lo = 0, hi = 0;  // rows of NCT that are transposed in squares
  if (s.step == 1 && step == 1) {
    lo = min64(max64(-first, 0), count);
    hi = max64(lo, min64(s.length - first, count));
    const bool overlaps = lanes == L && hi - lo >= L;  // the last square goes over some positions twice
    for (int64_t at = lo; at < hi; at += L) {
      const int64_t r = overlaps ? min64(at, hi - L) : at, n = min64(L, hi - r);
      const E* from = x + first + r;
      V square[L];
      if (overlaps) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) square[l] = load(from + l * s.channel);
        transpose<A>(square);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store(to + (r + l) * L, square[l]);
        continue;
      }
      for (int64_t l = 0; l < L; ++l) square[l] = l < lanes ? load_part<A>(from + l * s.channel, n) : V{};
      transpose<A>(square);
      for (int64_t l = 0; l < n; ++l) store(to + (r + l) * L, square[l]);
    }
    if (mask)
      for (int64_t r = lo; r < hi; ++r)
        if (mask[first + r]) store(to + r * L, V{});
  }
  for (int64_t r = 0; r < count; ++r) {
    if (r == lo) r = hi;
    if (r >= count) break;
    const int64_t p = source(first + r * step, s.length, 1, mode);
    if (p < 0 || (mask && mask[p])) {
      store(to + r * L, V{});
    } else if (s.channel == 1) {
      store(to + r * L, load_part<A>(x + p * s.step, lanes));
    } else {
      E column[L] = {};
      for (int64_t l = 0; l < lanes; ++l) column[l] = x[p * s.step + l * s.channel];
      store(to + r * L, load(column));
    }
  }
}

// The same of channels-last, `channels` of them, position by position: vector v of them is at to + v·vector_stride.
template <class E>
NOINLINE void load_rows(const Strides& s, Mode mode, const uint8_t* mask, const void* xv, int64_t channels,
                        int64_t first, int64_t step, int64_t count, typename Accumulator<E>::type* to,
                        int64_t vector_stride) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  for (int64_t r = 0; r < count; ++r, to += L) {
    const int64_t p = source(first + r * step, s.length, 1, mode), whole = channels / L * L;
    A* out = to;
    if (p < 0 || (mask && mask[p])) {
      for (int64_t c = 0; c < channels; c += L, out += vector_stride) store(out, typename Vec<A>::V{});
      continue;
    }
    const E* from = x + p * s.step;
    for (int64_t c = 0; c < whole; c += L, out += vector_stride) store(out, load(from + c));
    if (whole < channels) store(out, load_part<A>(from + whole, channels - whole));
  }
}

// ---- out of a tile

// Where the outputs of one vector of channels go: elements between outputs and between channels.
struct OutputTile {
  char* y;
  int64_t step, channel, lanes;
  const uint8_t* zeroed;  // by output, `zeroed_step` apart, or null
  int64_t zeroed_step;
  Activation activation;
  bool direct;  // whole vectors of sums are stored from their registers
};

// Outputs [r, r + n), from as many rows of sums, and room for a whole square of them.
template <class E>
NOINLINE void store_block(typename Accumulator<E>::type* sums, int64_t r, int64_t n, const OutputTile& to) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  activate_rows(sums, 1, 0, n, to.activation);
  for (int64_t j = 0; to.zeroed && j < n; ++j)
    if (to.zeroed[(r + j) * to.zeroed_step]) store(sums + j * L, V{});
  E* y = (E*)to.y + r * to.step;
  if (to.channel == 1) {
    for (int64_t j = 0; j < n; ++j) store_part<A>(y + j * to.step, load(sums + j * L), to.lanes);
  } else if (to.step == 1) {
    for (int64_t b = 0; b < n; b += L) {
      V square[L];
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l) square[l] = load(sums + (b + l) * L);
      transpose<A>(square);
      if (n - b >= L && to.lanes == L) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < L; ++l) store(y + b + l * to.channel, square[l]);
      } else {
        for (int64_t l = 0; l < to.lanes; ++l) store_part<A>(y + b + l * to.channel, square[l], min64(L, n - b));
      }
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      E row[L];
      store(row, load(sums + j * L));
      for (int64_t l = 0; l < to.lanes; ++l) y[j * to.step + l * to.channel] = row[l];
    }
  }
}

// Row t + j of y, j in [0, n), becomes `sums` + j·stride, of `channels` channels, a vector at least; the last vector
// goes over some channels twice. Rows that are `zeroed` become zeros.
template <class E>
NOINLINE void store_rows(typename Accumulator<E>::type* sums, int64_t stride, int64_t t, int64_t n, int64_t c,
                         int64_t vectors, int64_t channels, const OutputTile& to) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  activate_rows(sums, n, stride, vectors, to.activation);
  const int64_t whole = min64(vectors, (channels - c) / L);
  for (int64_t j = 0; j < n; ++j, sums += stride) {
    E *row = (E*)to.y + (t + j) * to.step, *last = row + channels - L;
    if (to.zeroed && to.zeroed[t + j]) {
      for (int64_t v = 0; v < whole; ++v) store(row + c + v * L, V{});
      if (whole < vectors) store(last, V{});
      continue;
    }
    for (int64_t v = 0; v < whole; ++v) store(row + c + v * L, load(sums + v * L));
    if (whole < vectors) store(last, load(sums + whole * L));
  }
}

// The edges of a tile for one element type; A is the type of its sums.
template <class A> struct Edges {
  int64_t element;  // bytes
  void (*load_tile)(const Strides&, Mode, const uint8_t*, const void*, int64_t, int64_t, int64_t, int64_t, A*);
  void (*load_rows)(const Strides&, Mode, const uint8_t*, const void*, int64_t, int64_t, int64_t, int64_t, A*, int64_t);
  void (*store_block)(A*, int64_t, int64_t, const OutputTile&);
};
template <class E>
constexpr Edges<typename Accumulator<E>::type> edges{sizeof(E), load_tile<E>, load_rows<E>, store_block<E>};

// ---- weights

// The weights of channels [c, c + lanes), a vector for each tap; `head` is the one whose weights are there already, or
// −1.
template <class A>
NOINLINE void expand_weights(const LightweightGeometry& g, const A* weight, int64_t c, int64_t lanes, A* w,
                             int64_t& head) {
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t K = g.kernel, first = c / g.group, last = (c + lanes - 1) / g.group;
  if (first == last) {
    if (head == first) return;
    for (int64_t i = 0; i < K; ++i) store(w + i * L, broadcast(weight[first * K + i]));
    head = first;
    return;
  }
  head = -1;
  int64_t row[L];
  for (int64_t l = 0; l < L; ++l) row[l] = (c + min64(l, lanes - 1)) / g.group * K;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t l = 0; l < L; ++l) w[i * L + l] = weight[row[l] + i];
}

}  // namespace
}  // namespace omniconv
