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
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  const A* w = (const A*)wv;
  E* y = (E*)yv;
  for (int64_t m = 0; m < g.multiplier; ++m, w += g.kernel[0] * g.kernel[1] * g.kernel[2])
    for (int64_t od = 0; od < g.out[0]; ++od)
      for (int64_t oh = 0; oh < g.out[1]; ++oh)
        for (int64_t ow = 0; ow < g.out[2]; ++ow) {
          A sum = bias ? ((const A*)bias)[m] : A(0);
          const A* tap = w;
          for (int64_t kd = 0; kd < g.kernel[0]; ++kd)
            for (int64_t kh = 0; kh < g.kernel[1]; ++kh)
              for (int64_t kw = 0; kw < g.kernel[2]; ++kw, ++tap) {
                const int64_t a = source(od * g.stride[0] - g.before[0] + kd * g.dilation[0], g.in[0], g.spread[0], g.mode);
                const int64_t b = source(oh * g.stride[1] - g.before[1] + kh * g.dilation[1], g.in[1], g.spread[1], g.mode);
                const int64_t c = source(ow * g.stride[2] - g.before[2] + kw * g.dilation[2], g.in[2], g.spread[2], g.mode);
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

extern const NaiveTables depthwise_naive;
const NaiveTables depthwise_naive = {forward<float>, forward<double>, forward<bf16>, forward<f16>};

}  // namespace ISA
}  // namespace omniconv
