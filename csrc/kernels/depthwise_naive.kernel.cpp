// Depthwise convolution of one channel by the letter of its definition: for weights that are not finite. The contiguous
// kernels multiply the zeros of the padding, which such weights make NaN. Compiled once per instruction set.
#include "kernels/depthwise.h"

#include "kernels/depthwise_window.h"

namespace omniconv {
namespace ISA {
namespace {

template <class E>
void forward(const DepthwiseGeometry& g, const void* xv, const void* wv, const void* bias, void* yv) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  const A* w = (const A*)wv;
  E* y = (E*)yv;
  // where along an axis tap k of output o reads
  auto read = [&](int axis, int64_t o, int64_t k) {
    return source(o * g.stride[axis] - g.before[axis] + k * g.dilation[axis], g.in[axis], g.spread[axis], g.mode);
  };
  for (int64_t m = 0; m < g.multiplier; ++m, w += g.kernel[0] * g.kernel[1] * g.kernel[2])
    for (int64_t od = 0; od < g.out[0]; ++od)
      for (int64_t oh = 0; oh < g.out[1]; ++oh)
        for (int64_t ow = 0; ow < g.out[2]; ++ow) {
          A sum = bias ? ((const A*)bias)[m] : A(0);
          const A* tap = w;
          for (int64_t kd = 0; kd < g.kernel[0]; ++kd)
            for (int64_t kh = 0; kh < g.kernel[1]; ++kh)
              for (int64_t kw = 0; kw < g.kernel[2]; ++kw, ++tap) {
                const int64_t id = read(0, od, kd), ih = read(1, oh, kh), iw = read(2, ow, kw);
                if (id < 0 || ih < 0 || iw < 0) continue;
                E element[L] = {x[(id * g.in[1] + ih) * g.in[2] + iw]};
                sum += *tap * load(element)[0];
              }
          E result[L];
          store(result, activate<A>(broadcast(sum), g.activation));
          *y++ = result[0];
        }
}

}  // namespace

extern const NaiveTables depthwise_naive;
const NaiveTables depthwise_naive = {forward<float>, forward<double>, forward<bf16>, forward<f16>};

}  // namespace ISA
}  // namespace omniconv
