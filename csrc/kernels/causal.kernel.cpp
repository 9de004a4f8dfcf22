// Causal depthwise kernels; compiled once per instruction set. Lanes are channels, since a step has one position and
// many channels.
#include "kernels/causal.h"

#include "simd/activate.h"
#include "simd/vec.h"

namespace omniconv {
namespace ISA {
namespace {

constexpr int64_t kTile = 64;  // steps at a time, so that scratch does not grow with the chunk

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

size_t scratch_bytes(int64_t width) { return (width - 1 + kTile) * int64_t(sizeof(VF)); }

// Column t of `n` channels, widened, from rows `stride` apart.
template <class E, class A> INLINE void column(const E* x, int64_t stride, int64_t n, A* to) {
  E lanes[Vec<A>::lanes] = {};
  for (int64_t c = 0; c < n; ++c) lanes[c] = x[c * stride];
  store(to, load(lanes));
}

template <class E>
void update(const CausalFilter& f, int64_t first, int64_t last, int64_t steps, const void* xv, const CausalState& s,
            void* yv, void* scratch) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const A *w = (const A*)f.weight, *bias = (const A*)f.bias;
  const int64_t past = f.width - 1;
  A* window = (A*)scratch;  // (past + kTile, L)
  for (int64_t c0 = first; c0 < last; c0 += L) {
    const int64_t n = least(L, last - c0);
    const E* x = (const E*)xv + c0 * steps;
    E *y = (E*)yv + c0 * steps, *state = (E*)s.data + c0 * s.channel_stride;
    A taps[L] = {}, channel_bias[L] = {};
    if (bias) __builtin_memcpy(channel_bias, bias + c0, n * sizeof(A));
    for (int64_t i = 0; i < past; ++i)
      column<E, A>(state + (s.size - past + i) * s.step_stride, s.channel_stride, n, window + i * L);
    for (int64_t t0 = 0; t0 < steps; t0 += kTile) {
      const int64_t many = least(kTile, steps - t0);
      for (int64_t t = 0; t < many; ++t) column<E, A>(x + t0 + t, steps, n, window + (past + t) * L);
      for (int64_t t = 0; t < many; ++t) {
        V sum = load(channel_bias);
        for (int64_t i = 0; i < f.width; ++i) {
          const A* at = w + i * f.channels + c0;
          if (n < L) {
            __builtin_memcpy(taps, at, n * sizeof(A));
            at = taps;
          }
          sum += load(at) * load(window + (t + i) * L);
        }
        E made[L];
        store(made, activate<A>(sum, f.activation));
        for (int64_t c = 0; c < n; ++c) y[c * steps + t0 + t] = made[c];
      }
      for (int64_t i = 0; i < past; ++i) store(window + i * L, load(window + (many + i) * L));
    }
    for (int64_t c = 0; c < n; ++c)
      for (int64_t i = 0; i < s.size; ++i) {
        const int64_t from = i + steps;
        state[c * s.channel_stride + i * s.step_stride] =
            from < s.size ? state[c * s.channel_stride + from * s.step_stride] : x[c * steps + from - s.size];
      }
  }
}

template <class E> void fixup_boundaries(const CausalFilter& f, int64_t channel, const int64_t* owner,
                                         const int64_t* at, int64_t count, const void* xv, void* yv) {
  typedef typename Accumulator<E>::type A;
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const A *w = (const A*)f.weight + channel, channel_bias = f.bias ? ((const A*)f.bias)[channel] : A(0);
  const E* x = (const E*)xv;
  E* y = (E*)yv;
  for (int64_t k = 0; k < count; k += L) {
    const int64_t n = least(L, count - k);
    V sum = broadcast(channel_bias);
    for (int64_t i = 0; i < f.width; ++i) {
      E lanes[L] = {};
      for (int64_t l = 0; l < n; ++l) {
        const int64_t t = at[k + l], p = t + i - (f.width - 1);
        if (p >= 0 && owner[p] == owner[t]) lanes[l] = x[p];
      }
      sum += broadcast(w[i * f.channels]) * load(lanes);
    }
    E made[L];
    store(made, activate<A>(sum, f.activation));
    for (int64_t l = 0; l < n; ++l) y[at[k + l]] = owner[at[k + l]] < 0 ? E{} : made[l];
  }
}

}  // namespace

extern const CausalTables causal;
const CausalTables causal = {
    {scratch_bytes, update<float>, fixup_boundaries<float>},
    {scratch_bytes, update<double>, fixup_boundaries<double>},
    {scratch_bytes, update<bf16>, fixup_boundaries<bf16>},
    {scratch_bytes, update<f16>, fixup_boundaries<f16>},
};

}  // namespace ISA
}  // namespace omniconv
