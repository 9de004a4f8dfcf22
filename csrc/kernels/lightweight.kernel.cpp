// Lightweight kernels; compiled once per instruction set. Lanes are channels: a tile of the input is copied, widened and where it must be
// transposed, into scratch, so that every load of a sum is aligned and serves several outputs.
#include "kernels/lightweight.h"

#include "kernels/depthwise_window.h"
#include "simd/activate.h"
#include "simd/part.h"
#include "simd/transpose.h"

#ifndef ISA
#define ISA isa_base
#endif

namespace omniconv {
namespace ISA {
namespace {

constexpr int kSums = VECTOR_BYTES == 64 ? 16 : 8;  // outputs made at once
constexpr int kHeld = VECTOR_BYTES == 64 ? 8 : 4;   // taps whose weights are held in registers
constexpr int64_t kTileBytes = 24 << 10;            // of one vector of channels: half of L1
constexpr int64_t kGroups = 8;                      // vectors of channels copied side by side, so that whole cache lines are read
constexpr int64_t kReach = 512;                     // from the first tap to the last: beyond it the dilation is taken apart

// How the outputs of a call are cut. With `phases` above 1 output q + r·phases is the r-th of sequence q, whose window is dense.
struct Cut {
  int64_t phases, dilation, reach, tile, rows;
  Cut(const LightweightGeometry& g, int64_t bytes) {
    const bool apart = g.dilation > 1 && g.dilation * (g.kernel - 1) > kReach;
    phases = apart ? g.dilation : 1;
    dilation = apart ? 1 : g.dilation;
    reach = dilation * (g.kernel - 1);
    const int64_t many = (g.outputs + phases - 1) / phases, most = max64(kTileBytes / bytes - reach, max64(reach, 8 * kSums));
    const int64_t tiles = (many + most - 1) / most;
    tile = round_up((many + tiles - 1) / tiles, kSums);
    rows = tile + reach;
  }
};

// Channels-last rows are read where they lie, unless vectors are half a line and taps many: then each half is fetched for every 4 taps
// (AVX2, float32, N8 C1024 T30 K31: 0.39 ms and 0.29 copied; bfloat16, which is widened as it is copied, 2.3 and 8.4 at N8 C512 T512 K31).
template <class E> bool streams(const LightweightGeometry& g) {
  typedef typename Accumulator<E>::type A;
  const bool cheap = VECTOR_BYTES == 64 || sizeof(E) < sizeof(A) || g.kernel <= 8;
  return cheap && g.x_channel == 1 && g.y_channel == 1 && g.dilation == 1 && g.channels >= Vec<A>::lanes;
}

template <class E> size_t scratch_bytes(const LightweightGeometry& g) {
  const Cut cut(g, VECTOR_BYTES);
  // the tiles of x and of y or its gradient, and a vector for each tap and for the bias
  const size_t tiles = size_t(cut.rows + cut.tile + g.kernel + 1) * kGroups * VECTOR_BYTES;
  // a row of zeros, a vector for each tap and each vector of channels, and pointers to them and to the rows of a block
  const size_t vectors = g.channels / Vec<typename Accumulator<E>::type>::lanes + 1;
  const size_t rows = size_t(g.channels) * sizeof(E) + 64 + vectors * (g.kernel * VECTOR_BYTES + sizeof(void*)) + (kSums + g.kernel) * sizeof(void*);
  return streams<E>(g) && rows > tiles ? rows : tiles;
}

// One axis of memory: elements between positions and between channels.
struct Strides { int64_t step, channel, length; };

// Positions first + r·step, r in [0, count), of `lanes` channels: row r of `to`, or zeros where there is nothing or the mask is set.
template <class E, class A>
void fetch(const Strides& lie, Mode mode, const uint8_t* mask, const E* x, int64_t lanes, int64_t first, int64_t step, int64_t count, A* to) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  int64_t lo = 0, hi = 0;  // rows of NCT that are transposed in squares
  if (lie.step == 1 && step == 1) {
    lo = min64(max64(-first, 0), count);
    hi = max64(lo, min64(lie.length - first, count));
    for (int64_t r = lo; r < hi; r += L) {
      const int64_t n = min64(L, hi - r);
      const E* from = x + first + r;
      V square[L];
      if (n == L && lanes == L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) square[l] = load(from + l * lie.channel);
        transpose<A>(square);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store(to + (r + l) * L, square[l]);
        continue;
      }
      for (int64_t l = 0; l < L; ++l) square[l] = l < lanes ? load_part<A>(from + l * lie.channel, n) : V{};
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
    const int64_t p = source(first + r * step, lie.length, 1, mode);
    if (p < 0 || (mask && mask[p])) {
      store(to + r * L, V{});
    } else if (lie.channel == 1) {
      store(to + r * L, load_part<A>(x + p * lie.step, lanes));
    } else {
      E column[L] = {};
      for (int64_t l = 0; l < lanes; ++l) column[l] = x[p * lie.step + l * lie.channel];
      store(to + r * L, load(column));
    }
  }
}

// The same of channels-last, `wide` channels at once, position by position: vector v of them is at to + v·apart.
template <class E, class A>
void fetch_rows(const Strides& lie, Mode mode, const uint8_t* mask, const E* x, int64_t wide, int64_t first, int64_t step, int64_t count, A* to, int64_t apart) {
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t r = 0; r < count; ++r, to += L) {
    const int64_t p = source(first + r * step, lie.length, 1, mode);
    const bool zero = p < 0 || (mask && mask[p]);
    for (int64_t c = 0; c < wide; c += L) store(to + c / L * apart, zero ? typename Vec<A>::V{} : load_part<A>(x + p * lie.step + c, min64(L, wide - c)));
  }
}

// Taps [i, i + Q) of P sums: a row is loaded once for all the taps that meet it.
template <class A, int P, int Q> INLINE void add_taps(typename Vec<A>::V* sum, const A* x, const A* w) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V weight[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) weight[q] = in_register(load(w + q * L));
#pragma GCC unroll 32
  for (int s = 0; s < P + Q - 1; ++s) {
    const V row = in_register(load(x + s * L));
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
      if (s - q >= 0 && s - q < P) sum[s - q] += weight[q] * row;
  }
}

// P sums of rows x, x + 1 …; weights (K, L).
template <class A, int P> INLINE void add_up(typename Vec<A>::V* sum, const A* x, const A* w, int64_t K, int64_t D) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  int64_t i = 0;
  if (D == 1) {
    for (; i + kHeld <= K; i += kHeld) add_taps<A, P, kHeld>(sum, x + i * L, w + i * L);
    if (kHeld > 4 && i + 4 <= K) {
      add_taps<A, P, 4>(sum, x + i * L, w + i * L);
      i += 4;
    }
  }
  for (; i < K; ++i) {
    const V weight = in_register(load(w + i * L));
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) sum[j] += weight * load(x + (j + i * D) * L);
  }
}

// Where outputs go: elements between outputs and between channels; `zeroed` by output, `stride` outputs apart.
template <class E> struct Target {
  E* y;
  int64_t step, channel, lanes;
  const uint8_t* zeroed;
  int64_t stride;
};

// Outputs [r, r + P) of a tile of which `count` are wanted.
template <class E, class A, int P>
INLINE void outputs(const A* x, const A* w, int64_t K, int64_t D, typename Vec<A>::V bias, Activation a, int64_t r, int64_t count, const Target<E>& to) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V sum[P];
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j) sum[j] = bias;
  add_up<A, P>(sum, x + r * L, w, K, D);
  if (a != kNone) {
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) sum[j] = activate<A>(sum[j], a);
  }
  const int64_t n = min64(P, count - r);
  if (to.zeroed)
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j)
      if (j < n && to.zeroed[(r + j) * to.stride]) sum[j] = V{};
  E* y = to.y + r * to.step;
  if (to.channel == 1) {
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j)
      if (j < n) store_part<A>(y + j * to.step, sum[j], to.lanes);
  } else if (P % L == 0 && to.step == 1) {
#pragma GCC unroll 4
    for (int b = 0; b + L <= P; b += L) {
      transpose<A>(sum + b);
      const int64_t wide = n - b;
      if (wide >= L && to.lanes == L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store(y + b + l * to.channel, sum[b + l]);
      } else if (wide > 0) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l)
          if (l < to.lanes) store_part<A>(y + b + l * to.channel, sum[b + l], min64(L, wide));
      }
    }
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j)
      if (j < n) {
        E row[L];
        store(row, sum[j]);
        for (int64_t l = 0; l < to.lanes; ++l) y[j * to.step + l * to.channel] = row[l];
      }
  }
}

template <class E, class A>
void row_of_outputs(const A* x, const A* w, int64_t K, int64_t D, typename Vec<A>::V bias, Activation a, int64_t count, const Target<E>& to) {
  int64_t r = 0;
  for (; r + kSums <= count; r += kSums) outputs<E, A, kSums>(x, w, K, D, bias, a, r, count, to);
  if (to.channel != 1) {
    if (r < count) outputs<E, A, kSums>(x, w, K, D, bias, a, r, count, to);
    return;
  }
  if (kSums > 8 && r + 8 <= count) {
    outputs<E, A, 8>(x, w, K, D, bias, a, r, count, to);
    r += 8;
  }
  for (; r < count; r += 4) outputs<E, A, 4>(x, w, K, D, bias, a, r, count, to);
}

// The weights of channels [c, c + lanes), a vector for each tap; `of` is the head whose weights are there already, or −1.
template <class A> void spread(const LightweightGeometry& g, const A* weight, int64_t c, int64_t lanes, A* w, int64_t& of) {
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t K = g.kernel, first = c / g.group, last = (c + lanes - 1) / g.group;
  if (first == last) {
    if (of == first) return;
    for (int64_t i = 0; i < K; ++i) store(w + i * L, broadcast(weight[first * K + i]));
    of = first;
    return;
  }
  of = -1;
  int64_t head[L];
  for (int64_t l = 0; l < L; ++l) head[l] = (c + min64(l, lanes - 1)) / g.group * K;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t l = 0; l < L; ++l) w[i * L + l] = weight[head[l] + i];
}

// Taps [i, i + Q) of P sums of a vector of channels whose rows are read where they lie: as in `add_taps`.
template <class E, class A, int P, int Q> INLINE void add_rows(typename Vec<A>::V* sum, const E* const* row, int64_t c, const A* w) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V weight[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) weight[q] = in_register(load(w + q * L));
#pragma GCC unroll 32
  for (int s = 0; s < P + Q - 1; ++s) {
    const V at = in_register(load(row[s] + c));
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
      if (s - q >= 0 && s - q < P) sum[s - q] += weight[q] * at;
  }
}

// P outputs of one vector of channels, from K taps; weights (K, L).
template <class E, class A, int P>
INLINE void from_rows(typename Vec<A>::V* sum, const E* const* row, int64_t c, const A* w, int64_t K) {
  constexpr int L = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + kHeld <= K; i += kHeld) add_rows<E, A, P, kHeld>(sum, row + i, c, w + i * L);
  if (kHeld > 4 && i + 4 <= K) {
    add_rows<E, A, P, 4>(sum, row + i, c, w + i * L);
    i += 4;
  }
  if (K - i == 3) add_rows<E, A, P, 3>(sum, row + i, c, w + i * L);
  else if (K - i == 2) add_rows<E, A, P, 2>(sum, row + i, c, w + i * L);
  else if (K - i == 1) add_rows<E, A, P, 1>(sum, row + i, c, w + i * L);
}

// What the blocks of outputs of one call share.
template <class E, class A> struct Stream {
  const LightweightGeometry& g;
  int64_t c0, width, vectors;
  const A* const* weights;  // of each vector of channels: (K, L)
  const A* bias;
  const uint8_t* zeroed;
  E *y, *made;
};

constexpr int64_t kRow = 1024;  // bytes of sums that are put together before they are written

// Outputs [t, t + n), n <= P, of all channels; taps outside [from, to) meet nothing but zeros. K taps, or 0 where they are many.
template <class E, class A, int P, int K>
void block(const Stream<E, A>& s, int64_t t, int64_t n, const E* const* row, int64_t from, int64_t to) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes, kWide = kRow / VECTOR_BYTES;
  const Activation a = s.g.activation;
  for (int64_t v = 0; v < s.vectors; ++v) {
    const int64_t c = min64(v * L, s.width - L);  // the last vector goes over some channels twice
    const V shift = s.bias ? load(s.bias + s.c0 + c) : V{};
    V sum[P];
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) sum[j] = shift;
    if constexpr (K > 0) add_rows<E, A, P, K>(sum, row, c, s.weights[v]);
    else from_rows<E, A, P>(sum, row + from, c, s.weights[v] + from * L, to - from);
    if (a != kNone) {
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) sum[j] = activate<A>(sum[j], a);
    }
    if (s.zeroed) {
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j)
        if (j < n && s.zeroed[t + j]) sum[j] = V{};
    }
    if constexpr (VECTOR_BYTES == 64) {
      E* to = s.y + t * s.g.y_step + s.c0 + c;
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j)
        if (j < n) store(to + j * s.g.y_step, sum[j]);
      continue;
    }
    E* to = s.made + v % kWide * L;
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) store(to + j * kWide * L, sum[j]);
    if (v % kWide == kWide - 1 || v == s.vectors - 1) {
      const int64_t first = v / kWide * kWide;
      for (int64_t j = 0; j < n; ++j) {
        E* out = s.y + (t + j) * s.g.y_step + s.c0;
        for (int64_t u = first; u <= v; ++u) store(out + min64(u * L, s.width - L), load(s.made + (j * kWide + u - first) * L));
      }
    }
  }
}

// Channels-last, dilation 1: the rows that a block of outputs meets are read where they lie, through a pointer a row (zeros for pads and
// masked positions). Lines of rows that lie a power of two apart fall into one set of L1, so that a vector of half a line would fetch its line
// twice: such outputs are put together in rows before they are written (AVX2, N8 C1024 T256 K7: 2.66 ms and 1.66). Whole lines are written
// where they belong (AVX-512, N128 C512 T25 K15, kernels alone: 0.79 ms and 0.63).
template <class E, class A, int K>
void stream(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t t0, int64_t t1, const E* x, const A* weight, const A* bias, const uint8_t* mask,
            const uint8_t* zeroed, E* y, void* scratch) {
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t width = c1 - c0, vectors = (width + L - 1) / L, taps = g.kernel;
  A* table = (A*)scratch;
  const A** weights = (const A**)(table + vectors * taps * L);
  const E** row = (const E**)(weights + vectors);
  E* zeros = (E*)(row + kSums + taps - 1);
  __builtin_memset(zeros, 0, width * sizeof(E));
  int64_t of = -1;
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t c = c0 + min64(v * L, width - L), was = of;
    if (was >= 0 && c / g.group == was && (c + L - 1) / g.group == was) {
      weights[v] = weights[v - 1];
      continue;
    }
    spread(g, weight, c, L, table, of);
    weights[v] = table;
    table += taps * L;
  }
  E made[VECTOR_BYTES == 64 ? 1 : kSums * kRow / VECTOR_BYTES * L] __attribute__((aligned(64)));
  const Stream<E, A> s{g, c0, width, vectors, weights, bias, zeroed, y, made};
  for (int64_t t = t0; t < t1;) {
    const int64_t rest = t1 - t;
    // as few as possible beyond the end: 24 are 12 and 12
    const int P = kSums == 8 ? (rest > 4 ? 8 : 4) : rest > 24 || (rest > 12 && rest <= 16) ? 16 : rest > 8 ? 12 : rest > 4 ? 8 : 4;
    const int64_t n = min64(P, rest);
    int64_t first = P + taps - 1, last = 0;  // rows that are not zeros
    for (int64_t r = 0; r < P + taps - 1; ++r) {
      const int64_t p = r < n + taps - 1 ? source(t - g.before + r, g.length, 1, g.mode) : -1;
      const bool zero = p < 0 || (mask && mask[p]);
      row[r] = zero ? zeros : x + p * g.x_step + c0;
      if (!zero) {
        if (first > r) first = r;
        last = r;
      }
    }
    int64_t from = 0, to = taps;
    if (g.finite) {  // a tap that meets no other row adds nothing
      from = min64(max64(0, first - P + 1), taps);
      to = max64(from, min64(taps, last + 1));
    }
    if (kSums > 8 && P == 16) block<E, A, kSums, K>(s, t, n, row, from, to);
    else if (kSums > 8 && P == 12) block<E, A, 12, K>(s, t, n, row, from, to);
    else if (P == 8) block<E, A, 8, K>(s, t, n, row, from, to);
    else block<E, A, 4, K>(s, t, n, row, from, to);
    t += n;
  }
}

template <class E>
void forward(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t t0, int64_t t1, const void* xv, const void* wv, const void* bv, const uint8_t* mask,
             const uint8_t* zeroed, void* yv, void* scratch) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  E* y = (E*)yv;
  if (streams<E>(g) && c1 - c0 >= L) {
    const auto run = g.kernel == 1 ? stream<E, A, 1> : g.kernel == 2 ? stream<E, A, 2> : g.kernel == 3 ? stream<E, A, 3> : g.kernel == 4 ? stream<E, A, 4>
                   : g.kernel == 5 ? stream<E, A, 5> : g.kernel == 6 ? stream<E, A, 6> : g.kernel == 7 ? stream<E, A, 7> : g.kernel == 8 ? stream<E, A, 8>
                   : stream<E, A, 0>;
    return run(g, c0, c1, t0, t1, x, (const A*)wv, (const A*)bv, mask, zeroed, y, scratch);
  }
  const Cut cut(g, VECTOR_BYTES);
  A *tile = (A*)scratch, *w = tile + (cut.rows + cut.tile) * kGroups * L;
  E* made = (E*)(tile + cut.rows * kGroups * L);  // (tile, kGroups·L)
  const Strides lie{g.x_step, g.x_channel, g.length};
  int64_t of = -1;
  for (int64_t q = 0; q < min64(cut.phases, t1); ++q) {
    // outputs q + r·phases in [t0, t1)
    const int64_t r0 = max64(0, (t0 - q + cut.phases - 1) / cut.phases), r1 = (t1 - q + cut.phases - 1) / cut.phases;
    for (int64_t r = r0; r < r1; r += cut.tile) {
      const int64_t count = min64(cut.tile, r1 - r), t = q + r * cut.phases;
      for (int64_t b = c0; b < c1; b += kGroups * L) {
        const int64_t until = min64(b + kGroups * L, c1);
        const bool last = g.x_channel == 1 && g.y_channel == 1;
        if (last) fetch_rows<E, A>(lie, g.mode, mask, x + b, until - b, t - g.before, cut.phases, count + cut.reach, tile, cut.rows * L);
        for (int64_t c = b; c < until; c += L) {
          const int64_t lanes = min64(L, until - c);
          A* rows = tile + (last ? (c - b) / L * cut.rows * L : 0);
          if (!last) fetch<E, A>(lie, g.mode, mask, x + c * g.x_channel, lanes, t - g.before, cut.phases, count + cut.reach, rows);
          spread(g, (const A*)wv, c, lanes, w, of);
          // rows of channels are put together before they are written: see `stream`
          const Target<E> to = last ? Target<E>{made + (c - b), kGroups * L, 1, lanes, zeroed ? zeroed + t : nullptr, cut.phases}
                                    : Target<E>{y + c * g.y_channel + t * g.y_step, cut.phases * g.y_step, g.y_channel, lanes, zeroed ? zeroed + t : nullptr, cut.phases};
          const typename Vec<A>::V bias = bv ? load_part<A>((const A*)bv + c, lanes) : typename Vec<A>::V{};
          row_of_outputs<E, A>(rows, w, g.kernel, cut.dilation, bias, g.activation, count, to);
        }
        for (int64_t i = 0; last && i < count; ++i)
          __builtin_memcpy(y + (t + i * cut.phases) * g.y_step + b, made + i * kGroups * L, (until - b) * sizeof(E));
      }
    }
  }
}

// Taps [0, Q) of the weight gradient from n outputs: sums (Q, L) are added to. With few taps a tap has several sums, for an addition
// takes four cycles.
template <class A, int Q> INLINE void gather(A* total, const A* x, const A* gy, int64_t n, int64_t D) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes, R = Q > 4 ? 1 : Q > 2 ? 2 : 4;
  V sum[R][Q] = {};
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) sum[0][i] = load(total + i * L);
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) {
    V g[4];
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) g[u] = in_register(load(gy + (t + u) * L));
    if (D == 1) {
#pragma GCC unroll 16
      for (int s = 0; s < Q + 3; ++s) {
        const V row = in_register(load(x + (t + s) * L));
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u)
          if (s - u >= 0 && s - u < Q) sum[u % R][s - u] += g[u] * row;
      }
    } else {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u)
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) sum[u % R][i] += g[u] * load(x + (t + u + i * D) * L);
    }
  }
  for (; t < n; ++t) {
    const V g = load(gy + t * L);
#pragma GCC unroll 8
    for (int i = 0; i < Q; ++i) sum[0][i] += g * load(x + (t + i * D) * L);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Q; ++i) {
    V v = sum[0][i];
#pragma GCC unroll 4
    for (int r = 1; r < R; ++r) v += sum[r][i];
    store(total + i * L, v);
  }
}

template <class A> void gather_taps(A* total, const A* x, const A* gy, int64_t n, int64_t K, int64_t D) {
  constexpr int64_t L = Vec<A>::lanes;
  int64_t i = 0;
  for (; i + 8 <= K; i += 8) gather<A, 8>(total + i * L, x + i * D * L, gy, n, D);
  if (K - i >= 4) {
    gather<A, 4>(total + i * L, x + i * D * L, gy, n, D);
    i += 4;
  }
  A* rest = total + i * L;
  x += i * D * L;
  if (K - i == 3) gather<A, 3>(rest, x, gy, n, D);
  else if (K - i == 2) gather<A, 2>(rest, x, gy, n, D);
  else if (K - i == 1) gather<A, 1>(rest, x, gy, n, D);
}

// The lanes of each of K vectors are added to a number.
template <class A> void add_lanes(const A* rows, int64_t K, A* to) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  for (int64_t i = 0; i < K; i += L) {
    const int64_t n = min64(L, K - i);
    V square[L];
    for (int64_t r = 0; r < L; ++r) square[r] = r < n ? load(rows + (i + r) * L) : V{};
    transpose<A>(square);
#pragma GCC unroll 16
    for (int r = 1; r < L; ++r) square[0] += square[r];
    store_part<A>(to + i, load_part<A>(to + i, n) + square[0], n);
  }
}

template <class E>
void grad_weight(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t samples, const void* xv, const void* gv, const uint8_t* mask, void* gwv, void* gbv,
                 void* scratch) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const Cut cut(g, VECTOR_BYTES);
  const bool last = g.x_channel == 1 && g.y_channel == 1;
  const int64_t width = last ? kGroups * L : L;  // channels at once
  A *rows = (A*)scratch, *grads = rows + cut.rows * width, *total = rows + (cut.rows + cut.tile) * kGroups * L, *shift = total + g.kernel * width;
  const Strides of_x{g.x_step, g.x_channel, g.length}, of_y{g.y_step, g.y_channel, g.outputs};
  for (int64_t b = c0; b < c1; b += width) {
    const int64_t wide = min64(width, c1 - b);
    for (int64_t i = 0; i < (g.kernel + 1) * width; i += L) store(total + i, V{});
    for (int64_t n = 0; n < samples; ++n) {
      const E *x = (const E*)xv + n * g.x_sample + b * g.x_channel, *gy = (const E*)gv + n * g.y_sample + b * g.y_channel;
      const uint8_t* hidden = mask ? mask + n * g.length : nullptr;
      for (int64_t q = 0; q < min64(cut.phases, g.outputs); ++q) {
        const int64_t many = (g.outputs - q + cut.phases - 1) / cut.phases;
        for (int64_t r = 0; r < many; r += cut.tile) {
          const int64_t count = min64(cut.tile, many - r), t = q + r * cut.phases;
          if (last) {
            fetch_rows<E, A>(of_x, kZeros, hidden, x, wide, t - g.before, cut.phases, count + cut.reach, rows, cut.rows * L);
            fetch_rows<E, A>(of_y, kZeros, nullptr, gy, wide, t, cut.phases, count, grads, cut.tile * L);
          } else {
            fetch<E, A>(of_x, kZeros, hidden, x, wide, t - g.before, cut.phases, count + cut.reach, rows);
            fetch<E, A>(of_y, kZeros, nullptr, gy, wide, t, cut.phases, count, grads);
          }
          for (int64_t c = 0; c < wide; c += L) {
            const A* from = grads + c / L * cut.tile * L;
            gather_taps(total + g.kernel * c, rows + c / L * cut.rows * L, from, count, g.kernel, cut.dilation);
            V sum[4] = {load(shift + c)};
            for (int64_t i = 0; gbv && i < count; ++i) sum[i & 3] += load(from + i * L);
            store(shift + c, (sum[0] + sum[1]) + (sum[2] + sum[3]));
          }
        }
      }
    }
    A* gw = (A*)gwv;
    for (int64_t c = 0; c < wide; c += L) {
      const int64_t lanes = min64(L, wide - c), h = (b + c) / g.group;
      const A* sums = total + g.kernel * c;
      if (lanes == L && (b + c + L - 1) / g.group == h) {
        add_lanes(sums, g.kernel, gw + h * g.kernel);
      } else {
        for (int64_t l = 0; l < lanes; ++l)
          for (int64_t i = 0; i < g.kernel; ++i) gw[(b + c + l) / g.group * g.kernel + i] += sums[i * L + l];
      }
    }
    for (int64_t c = 0; gbv && c < wide; ++c) ((A*)gbv)[b + c] += shift[c];
  }
}

INLINE float power_of_e(float x) { return __builtin_expf(x); }
INLINE double power_of_e(double x) { return __builtin_exp(x); }

// NaN and infinite logits make a row of NaN, as in torch: they are left in the sum.
template <class A> void softmax(int64_t heads, int64_t taps, void* weight) {
  A* w = (A*)weight;
  for (int64_t h = 0; h < heads; ++h, w += taps) {
    A most = w[0], sum = 0;
    for (int64_t i = 1; i < taps; ++i) most = most < w[i] ? w[i] : most;
    for (int64_t i = 0; i < taps; ++i) sum += w[i] = power_of_e(w[i] - most);
    for (int64_t i = 0; i < taps; ++i) w[i] /= sum;
  }
}

template <class A> void softmax_gradient(int64_t heads, int64_t taps, const void* weight, void* grad) {
  const A* w = (const A*)weight;
  A* g = (A*)grad;
  for (int64_t h = 0; h < heads; ++h, w += taps, g += taps) {
    double mean = 0;
    for (int64_t i = 0; i < taps; ++i) mean += double(w[i]) * double(g[i]);
    for (int64_t i = 0; i < taps; ++i) g[i] = A(w[i] * (g[i] - mean));
  }
}

}  // namespace

extern const LightweightTables lightweight;
const LightweightTables lightweight = {
    {scratch_bytes<float>, forward<float>, grad_weight<float>, softmax<float>, softmax_gradient<float>},
    {scratch_bytes<double>, forward<double>, grad_weight<double>, softmax<double>, softmax_gradient<double>},
    {scratch_bytes<bf16>, forward<bf16>, grad_weight<bf16>, softmax<float>, softmax_gradient<float>},
    {scratch_bytes<f16>, forward<f16>, grad_weight<f16>, softmax<float>, softmax_gradient<float>},
};

}  // namespace ISA
}  // namespace omniconv
