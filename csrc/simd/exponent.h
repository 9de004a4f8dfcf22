// The exponential of what is not above zero, as a softmax needs it. Included by kernels only; internal linkage.
#pragma once
#include "simd/vec.h"

namespace omniconv {
namespace {

typedef uint64_t VL __attribute__((vector_size(VECTOR_BYTES)));

// The larger of two; `b` where either is NaN.
INLINE VF larger(VF a, VF b) {
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  return (VF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__) && VECTOR_BYTES == 32
  return (VF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE Vec<double>::V larger(Vec<double>::V a, Vec<double>::V b) { return a > b ? a : b; }

// e^x for x ≤ 0 within 2 units in the last place; exactly 1 for 0 and exactly 0 for −inf. x = n·ln 2 + r; the
// polynomial is the one of degree 5 with least relative error that begins with 1 + r (1.8 roundoffs;
// tests/engines/test_dynamic.py tries it).
INLINE VF exponential_below(VF x) {
  const VF magic = broadcast(12582912.0f);  // 1.5·2^23: what is added to it is rounded to a whole number
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  const VF v = larger(broadcast(-200.0f), x);  // 2^-288 is 0
#else
  const VF low = broadcast(-87.0f), v = larger(low, x);
#endif
  const VF shifted = v * 1.44269504088896341f + magic;
  const VF n = shifted - magic;
  const VF r = v - n * 0.693359375f + n * 2.12194440e-4f;
  VF p = broadcast(8.312520571e-03f);
  p = p * r + 4.189015552e-02f;
  p = p * r + 1.666711420e-01f;
  p = p * r + 4.999923110e-01f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  return (VF)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const VF y = p * (VF)(((VI)shifted + 127u - 0x4b400000u) << 23);
  return x < low ? VF{} : y;
#endif
}

// The same in double, by the Taylor polynomial of degree 13.
INLINE Vec<double>::V exponential_below(Vec<double>::V x) {
  typedef Vec<double>::V V;
  const V magic = broadcast(6755399441055744.0);  // 1.5·2^52
  const V low = broadcast(-708.0), v = larger(low, x);
  const V shifted = v * 1.4426950408889634074 + magic;
  const V n = shifted - magic;
  const V r = v - n * 0.693145751953125 - n * 1.42860682030941723212e-6;
  V p = broadcast(1.0 / 6227020800.0);
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const V y = p * (V)(((VL)shifted + 1023u - 0x4338000000000000u) << 52);
  return x < low ? V{} : y;
}

}  // namespace
}  // namespace omniconv
