// A square of vectors, transposed in registers. Included by kernels only; internal linkage.
#pragma once
#include "simd/shuffle.h"
#include "simd/vec.h"

namespace {

// Of each 16 bytes of two vectors the low, or the high halves, interleaved by elements or by pairs of them.
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
// (the masked forms, all lanes chosen: GCC 12 warns of an uninitialised vector in the plain ones)
INLINE VF low(VF a, VF b) { return (VF)_mm512_maskz_unpacklo_ps(0xffff, (__m512)a, (__m512)b); }
INLINE VF high(VF a, VF b) { return (VF)_mm512_maskz_unpackhi_ps(0xffff, (__m512)a, (__m512)b); }
INLINE Vec<double>::V low(Vec<double>::V a, Vec<double>::V b) {
  return (Vec<double>::V)_mm512_maskz_unpacklo_pd(0xff, (__m512d)a, (__m512d)b);
}
INLINE Vec<double>::V high(Vec<double>::V a, Vec<double>::V b) {
  return (Vec<double>::V)_mm512_maskz_unpackhi_pd(0xff, (__m512d)a, (__m512d)b);
}
template <class V> INLINE V even(V a, V b) { return (V)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, 0x88); }
template <class V> INLINE V odd(V a, V b) { return (V)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, 0xdd); }
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
INLINE VF low(VF a, VF b) { return (VF)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
INLINE VF high(VF a, VF b) { return (VF)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
INLINE Vec<double>::V low(Vec<double>::V a, Vec<double>::V b) {
  return (Vec<double>::V)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
}
INLINE Vec<double>::V high(Vec<double>::V a, Vec<double>::V b) {
  return (Vec<double>::V)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
}
template <class V> INLINE V even(V a, V b) { return (V)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20); }
template <class V> INLINE V odd(V a, V b) { return (V)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31); }
#elif VECTOR_BYTES == 16
INLINE VF low(VF a, VF b) { return shuffle(a, b, Indices<0, 4, 1, 5>{}); }
INLINE VF high(VF a, VF b) { return shuffle(a, b, Indices<2, 6, 3, 7>{}); }
INLINE Vec<double>::V low(Vec<double>::V a, Vec<double>::V b) { return shuffle(a, b, Indices<0, 2>{}); }
INLINE Vec<double>::V high(Vec<double>::V a, Vec<double>::V b) { return shuffle(a, b, Indices<1, 3>{}); }
#endif

// v[i][l] and v[l][i] change places: first in every 16 bytes, then the pieces of 16 bytes.
template <class A> INLINE void transpose(typename Vec<A>::V* v) {
  typedef typename Vec<A>::V V;
  typedef Vec<double>::V D;
  constexpr int L = Vec<A>::lanes, Q = 16 / int(sizeof(A));
  V in[L];
#pragma GCC unroll 16
  for (int h = 0; h < L; h += Q) {
    if constexpr (Q == 2) {
      in[h] = low(v[h], v[h + 1]);
      in[h + 1] = high(v[h], v[h + 1]);
    } else {
      const V a = low(v[h], v[h + 1]), b = high(v[h], v[h + 1]), c = low(v[h + 2], v[h + 3]),
              d = high(v[h + 2], v[h + 3]);
      in[h] = (V)low((D)a, (D)c);
      in[h + 1] = (V)high((D)a, (D)c);
      in[h + 2] = (V)low((D)b, (D)d);
      in[h + 3] = (V)high((D)b, (D)d);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
#if VECTOR_BYTES == 16
    v[i] = in[i];
#elif VECTOR_BYTES == 32
    v[i] = even(in[i], in[Q + i]);
    v[Q + i] = odd(in[i], in[Q + i]);
#else
    // pieces (0 2 0 2) and (1 3 1 3) of two, then the same of those
    const V a = even(in[i], in[Q + i]), b = odd(in[i], in[Q + i]), c = even(in[2 * Q + i], in[3 * Q + i]),
            d = odd(in[2 * Q + i], in[3 * Q + i]);
    v[i] = even(a, c);
    v[Q + i] = even(b, d);
    v[2 * Q + i] = odd(a, c);
    v[3 * Q + i] = odd(b, d);
#endif
  }
}

}  // namespace
