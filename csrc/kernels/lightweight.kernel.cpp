// Lightweight kernels; compiled once per instruction set. Lanes are channels: a tile of the input is copied, widened
// and where it must be transposed, into scratch, so that every load of a sum is aligned and serves several outputs.
//
// A clean build is paid by instantiations: the element type is known at the edges of a tile only, sums are activated in
// one place, and few K have a body of their own (GCC 12, Zen 3: see docs/decisions/0006-sequence-engine.md).
#include "kernels/lightweight_grad.h"
#include "kernels/lightweight_rows.h"

namespace omniconv {
namespace ISA {
namespace {

template <class E> size_t scratch_bytes(const LightweightGeometry& g) {
  const Tiling tiling(g);
  // the tiles of x and of y or its gradient, and a vector for each tap and for the bias
  const size_t tiles = size_t(tiling.rows + tiling.outputs + g.kernel + 1) * kVectors * VECTOR_BYTES;
  // a row of zeros, a vector for each tap and each vector of channels, and pointers to them and to the rows of a block
  const size_t vectors = g.channels / Vec<typename Accumulator<E>::type>::lanes + 1;
  const size_t rows = size_t(g.channels) * sizeof(E) + 64 + vectors * (g.kernel * VECTOR_BYTES + sizeof(void*)) +
                      (kBlock + g.kernel) * sizeof(void*);
  return reads_in_place<E>(g) && rows > tiles ? rows : tiles;
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
template <class A, int P> INLINE void add_tile(typename Vec<A>::V* sum, const A* x, const A* w, int64_t K, int64_t D) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  int64_t i = 0;
  if (D == 1) {
    for (; i + kTaps <= K; i += kTaps) add_taps<A, P, kTaps>(sum, x + i * L, w + i * L);
    if (kTaps > 4 && i + 4 <= K) {
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

// Outputs [r, r + P) of a tile of which `count` are wanted, where they belong (true) or as rows of `sums`.
template <class E, class A, int P>
INLINE bool tile_block(const A* x, const A* w, int64_t K, int64_t D, typename Vec<A>::V bias, int64_t r, int64_t count,
                       const OutputTile& to, A* sums) {
  typedef typename Vec<A>::V V;
  constexpr int L = Vec<A>::lanes;
  V sum[P];
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j) sum[j] = bias;
  add_tile<A, P>(sum, x + r * L, w, K, D);
  if (to.direct && count - r >= P) {
    E* y = (E*)to.y + r * to.step;
    if (to.channel == 1) {
#pragma GCC unroll 16
      for (int j = 0; j < P; ++j) store(y + j * to.step, sum[j]);
      return true;
    }
    if constexpr (P % L == 0) {
#pragma GCC unroll 4
      for (int b = 0; b < P; b += L) {
        transpose<A>(sum + b);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store(y + b + l * to.channel, sum[b + l]);
      }
      return true;
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < P; ++j) store(sums + j * L, sum[j]);
  return false;
}

// Half types are stored from registers too: by way of memory, channels-first took 1.09 times as long (AVX2, float16, N8
// C512 T512 K31).
template <class E, class A>
NOINLINE void forward_tile(const A* x, const A* w, int64_t K, int64_t D, const A* bias, int64_t count,
                           const OutputTile& to, const Edges<A>& edges) {
  constexpr int64_t L = Vec<A>::lanes, kStaged = 4 * kBlock;
  const typename Vec<A>::V b = bias ? load_part<A>(bias, to.lanes) : typename Vec<A>::V{};
  A sums[kStaged * L] __attribute__((aligned(64)));
  for (int64_t r = 0, staged = 0, P; r < count;) {
    A* at = sums + (r - staged) * L;
    bool stored;
    if (to.channel != 1 || count - r >= kBlock) {
      P = kBlock;
      stored = tile_block<E, A, kBlock>(x, w, K, D, b, r, count, to, at);
    } else if (kBlock > 8 && count - r >= 8) {
      P = 8;
      stored = tile_block<E, A, 8>(x, w, K, D, b, r, count, to, at);
    } else {
      P = 4;
      stored = tile_block<E, A, 4>(x, w, K, D, b, r, count, to, at);
    }
    r += P;
    if (!stored) {
      if (r < count && r - staged < kStaged) continue;
      edges.store_block(sums, staged, min64(r, count) - staged, to);
    }
    staged = r;
  }
}

template <class A>
using ForwardTile = void (*)(const A*, const A*, int64_t, int64_t, const A*, int64_t, const OutputTile&,
                             const Edges<A>&);

// `forward_tile` stores elements of so many bytes from registers, all others by `edges`.
template <class A>
void forward_tiles(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t t0, int64_t t1, const char* x,
                   const A* weight, const A* bias, const uint8_t* mask, const uint8_t* zeroed, char* y, void* scratch,
                   const Edges<A>& edges, ForwardTile<A> forward_tile, int64_t stored_element) {
  constexpr int64_t L = Vec<A>::lanes;
  const Tiling tiling(g);
  A *tile = (A*)scratch, *w = tile + (tiling.rows + tiling.outputs) * kVectors * L;
  char* staging = (char*)(tile + tiling.rows * kVectors * L);  // (outputs, kVectors·L)
  const Strides from{g.x_step, g.x_channel, g.length};
  const bool channels_last = g.x_channel == 1 && g.y_channel == 1;
  const int64_t element = edges.element, y_step = tiling.phases * g.y_step;
  const bool unchanged = element == stored_element && g.activation == kNone && !zeroed;
  int64_t head = -1;
  for (int64_t q = 0; q < min64(tiling.phases, t1); ++q) {
    // outputs q + r·phases in [t0, t1)
    const int64_t r0 = max64(0, (t0 - q + tiling.phases - 1) / tiling.phases),
                  r1 = (t1 - q + tiling.phases - 1) / tiling.phases;
    for (int64_t r = r0; r < r1; r += tiling.outputs) {
      const int64_t count = min64(tiling.outputs, r1 - r), t = q + r * tiling.phases, first = t - g.before,
                    rows = count + tiling.halo;
      const uint8_t* zero = zeroed ? zeroed + t : nullptr;
      for (int64_t b = c0; b < c1; b += kVectors * L) {
        const int64_t end = min64(b + kVectors * L, c1);
        if (channels_last)
          edges.load_rows(from, g.mode, mask, x + b * element, end - b, first, tiling.phases, rows, tile,
                          tiling.rows * L);
        for (int64_t c = b; c < end; c += L) {
          const int64_t lanes = min64(L, end - c);
          const bool direct = unchanged && lanes == L;
          const A* at = tile + (channels_last ? (c - b) / L * tiling.rows * L : 0);
          if (!channels_last)
            edges.load_tile(from, g.mode, mask, x + c * g.x_channel * element, lanes, first, tiling.phases, rows, tile);
          expand_weights(g, weight, c, lanes, w, head);
          // rows of channels are put together before they are written: see kernels/lightweight_rows.h
          OutputTile to{staging + (c - b) * element, kVectors * L, 1, lanes, zero, tiling.phases, g.activation, direct};
          if (!channels_last) {
            to.y = y + (c * g.y_channel + t * g.y_step) * element;
            to.step = y_step;
            to.channel = g.y_channel;
            to.direct = direct && (y_step == 1 || g.y_channel == 1);
          }
          forward_tile(at, w, g.kernel, tiling.dilation, bias ? bias + c : nullptr, count, to, edges);
        }
        for (int64_t i = 0; channels_last && i < count; ++i)
          __builtin_memcpy(y + ((t + i * tiling.phases) * g.y_step + b) * element, staging + i * kVectors * L * element,
                           (end - b) * element);
      }
    }
  }
}

// What is stored from registers: E itself, or only the type of its sums.
template <class E, bool converts> struct StoredDirectly { typedef E type; };
template <class E> struct StoredDirectly<E, false> { typedef typename Accumulator<E>::type type; };

template <class E>
void forward(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t t0, int64_t t1, const void* x,
             const void* weight, const void* bias, const uint8_t* mask, const uint8_t* zeroed, void* y, void* scratch) {
  typedef typename Accumulator<E>::type A;
  typedef typename StoredDirectly<E, kConvertsHalves>::type Stored;
  if constexpr (kConvertsHalves || sizeof(E) == sizeof(A))
    if (reads_in_place<E>(g) && c1 - c0 >= Vec<A>::lanes)
      return forward_rows<E>(g, c0, c1, t0, t1, (const E*)x, (const A*)weight, (const A*)bias, mask, zeroed, (E*)y,
                             scratch);
  forward_tiles<A>(g, c0, c1, t0, t1, (const char*)x, (const A*)weight, (const A*)bias, mask, zeroed, (char*)y, scratch,
                   edges<E>, forward_tile<Stored, A>, sizeof(Stored));
}

template <class E>
void grad_weight(const LightweightGeometry& g, int64_t c0, int64_t c1, int64_t samples, const void* x,
                 const void* grad_y, const uint8_t* mask, void* grad_weight, void* grad_bias, void* scratch) {
  typedef typename Accumulator<E>::type A;
  grad_weight_tiles<A>(g, c0, c1, samples, (const char*)x, (const char*)grad_y, mask, (A*)grad_weight, (A*)grad_bias,
                       (A*)scratch, edges<E>);
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
