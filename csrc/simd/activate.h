// Activations on vectors of sums. Included by kernels only; internal linkage.
#pragma once
#include "kernels/activation.h"
#include "simd/vec.h"

namespace omniconv {
namespace {

// e^x within 2 units in the last place: x = n·ln 2 + r, a Taylor polynomial of r, and n put into the exponent.
INLINE VF exponential(VF x) {
  const VF low = broadcast(-87.0f), high = broadcast(88.7f);
  VF v = x < low ? low : x;
  v = v > high ? high : v;
  const VF magic = broadcast(12582912.0f);  // 1.5·2^23: what is added to it is rounded to a whole number
  const VF shifted = v * 1.44269504088896341f + magic;
  const VF n = shifted - magic;
  const VF r = v - n * 0.693359375f + n * 2.12194440e-4f;
  VF p = broadcast(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VF y = p * (VF)(((VI)shifted + 127u - 0x4b400000u) << 23);
  return x > high ? broadcast(__builtin_inff()) : y;
}

// x·Φ(x); erf by Abramowitz & Stegun 7.1.26, whose error is below 1.5e-7.
INLINE VF gelu(VF x) {
  const VF z = x * 0.70710678118654752f;
  const VF size = z < VF{} ? -z : z;
  const VF t = 1.0f / (1.0f + 0.3275911f * size);
  VF p = broadcast(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const VF tail = p * t * exponential(-z * z);  // 1 − erf(|z|)
  return 0.5f * x * (x < VF{} ? tail : 2.0f - tail);
}

INLINE VF curved(VF v, Activation a) {
  if (a == kGelu) return gelu(v);
  const VF below = 1.0f + exponential(-v);
  return a == kSilu ? v / below : 1.0f / below;
}
INLINE Vec<double>::V curved(Vec<double>::V v, Activation) { return v; }  // not offered: see kernels/activation.h

template <class A> INLINE typename Vec<A>::V activate(typename Vec<A>::V v, Activation a) {
  typedef typename Vec<A>::V V;
  const V zero{}, six = broadcast(A(6));
  switch (a) {
    case kNone: return v;
    case kRelu: return v < zero ? zero : v;  // NaN is not below zero: it stays
    case kRelu6: {
      const V r = v < zero ? zero : v;
      return r > six ? six : r;
    }
    case kHardswish: {
      V r = v + A(3);
      r = r < zero ? zero : r;
      r = r > six ? six : r;
      return v * r / A(6);
    }
    default: return curved(v, a);
  }
}

}  // namespace
}  // namespace omniconv
