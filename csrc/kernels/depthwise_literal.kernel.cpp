// Depthwise convolution of one channel by the letter of its definition: for weights that are not finite. The contiguous kernels multiply
// the zeros of the padding, which such weights make NaN. Compiled once per instruction set.
#include "kernels/depthwise.h"

#include "kernels/depthwise_window.h"

#ifndef ISA
#define ISA isa_base
#endif

namespace omniconv {
namespace ISA {
namespace {

template <class E> void forward(const DepthwiseGeometry& g, const void* xv, const void* wv, const void* bias, void* yv) {
  typedef typename Sum<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  const A* w = (const A*)wv;
  E* y = (E*)yv;
  for (int64_t m = 0; m < g.multiplier; ++m, w += g.kernel[0] * g.kernel[1] * g.kernel[2])
    for (int64_t oa = 0; oa < g.out[0]; ++oa)
      for (int64_t ob = 0; ob < g.out[1]; ++ob)
        for (int64_t oc = 0; oc < g.out[2]; ++oc) {
          A sum = bias ? ((const A*)bias)[m] : A(0);
          const A* tap = w;
          for (int64_t ka = 0; ka < g.kernel[0]; ++ka)
            for (int64_t kb = 0; kb < g.kernel[1]; ++kb)
              for (int64_t kc = 0; kc < g.kernel[2]; ++kc, ++tap) {
                const int64_t a = source(oa * g.stride[0] - g.before[0] + ka * g.dilation[0], g.in[0], g.spread[0], g.mode);
                const int64_t b = source(ob * g.stride[1] - g.before[1] + kb * g.dilation[1], g.in[1], g.spread[1], g.mode);
                const int64_t c = source(oc * g.stride[2] - g.before[2] + kc * g.dilation[2], g.in[2], g.spread[2], g.mode);
                if (a < 0 || b < 0 || c < 0) continue;
                E lanes[L] = {x[(a * g.in[1] + b) * g.in[2] + c]};
                sum += *tap * load(lanes)[0];
              }
          E made[L];
          store(made, activate<A>(broadcast(sum), g.activation));
          *y++ = made[0];
        }
}

}  // namespace

extern const LiteralTables depthwise_literal;
const LiteralTables depthwise_literal = {forward<float>, forward<double>, forward<bf16>, forward<f16>};

}  // namespace ISA
}  // namespace omniconv
