// The gradient through an activation; compiled once per instruction set.
#include "kernels/activation_grad.h"

#include "simd/activate.h"

namespace omniconv {
namespace ISA {
namespace {

// The derivative of gelu, Φ(x) + x·φ(x); erf as in gelu itself. φ of what is far out is 0, so that an infinite x makes
// NaN as in torch.
INLINE VF gelu_slope(VF x) {
  const VF z = x * 0.70710678118654752f;
  const VF size = z < VF{} ? -z : z;
  const VF t = 1.0f / (1.0f + 0.3275911f * size);
  VF p = broadcast(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const VF square = z * z, far = broadcast(87.0f);
  const VF bell = square > far ? VF{} : exponential(-square);
  const VF tail = 0.5f * (p * t * bell);
  return (x < VF{} ? tail : 1.0f - tail) + x * (0.39894228040143268f * bell);
}

INLINE VF curved_slope(VF v, Activation a) {
  if (a == kGelu) return gelu_slope(v);
  if (a == kSigmoid) return v * (1.0f - v);
  const VF s = 1.0f / (1.0f + exponential(-v));
  return s * (1.0f + v * (1.0f - s));
}
INLINE Vec<double>::V curved_slope(Vec<double>::V v, Activation) { return v; }  // not offered: see kernels/activation.h

template <class A> INLINE typename Vec<A>::V gradient(typename Vec<A>::V g, typename Vec<A>::V v, Activation a) {
  typedef typename Vec<A>::V V;
  const V zero{}, three = broadcast(A(3)), six = broadcast(A(6));
  switch (a) {
    case kNone: return g;
    case kRelu:
      return v <= zero ? zero : g;  // where NaN was, relu lets the gradient pass and relu6 does not, as in torch
    case kRelu6: {
      const V r = v > zero ? g : zero;
      return v < six ? r : zero;
    }
    case kHardswish: {
      const V middle = g * (v / three + A(0.5));
      const V r = v >= three ? g : middle;
      return v <= -three ? zero : r;
    }
    default: return g * curved_slope(v, a);
  }
}

template <class E> void multiply_slope(const void* gv, const void* vv, int64_t n, Activation a, void* outv) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E *g = (const E*)gv, *v = (const E*)vv;
  E* out = (E*)outv;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, gradient<A>(load(g + i), load(v + i), a));
  if (i == n) return;
  // what is left goes through the same vectors, so that its bits do not depend on where it stands
  const size_t rest = (n - i) * sizeof(E);
  E gs[L] = {}, vs[L] = {}, outs[L];
  __builtin_memcpy(gs, g + i, rest);
  __builtin_memcpy(vs, v + i, rest);
  store(outs, gradient<A>(load(gs), load(vs), a));
  __builtin_memcpy(out + i, outs, rest);
}

}  // namespace

extern const ActivationGradTables activation_grad;
const ActivationGradTables activation_grad = {multiply_slope<float>, multiply_slope<double>, multiply_slope<bf16>,
                                              multiply_slope<f16>};

}  // namespace ISA
}  // namespace omniconv
