// Vectors of fewer elements than lanes. Included by kernels only; internal linkage.
#pragma once
#include "simd/vec.h"

namespace omniconv {
namespace {

// n < 2·h elements between memory and a buffer, by halves.
template <class E, int L> INLINE void copy_part(E* to, const E* from, int64_t n) {
#pragma GCC unroll 8
  for (int h = L / 2; h; h /= 2)
    if (n & h) {
      __builtin_memcpy(to, from, h * sizeof(E));
      to += h;
      from += h;
    }
}

// GCC's AddressSanitizer does not see masked loads and stores: they are shown to it.
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_loadN(const void*, uint64_t);
extern "C" void __asan_storeN(const void*, uint64_t);
INLINE void shown_load(const void* p, int64_t bytes) { __asan_loadN(p, bytes); }
INLINE void shown_store(const void* p, int64_t bytes) { __asan_storeN(p, bytes); }
#else
INLINE void shown_load(const void*, int64_t) {}
INLINE void shown_store(const void*, int64_t) {}
#endif

// The first n ≤ lanes elements, widened, and zeros after them; nothing beyond is read.
template <class A, class E> INLINE typename Vec<A>::V load_part(const E* p, int64_t n) {
  constexpr int L = Vec<A>::lanes;
  if (n >= L) return load(p);
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  shown_load(p, n * sizeof(E));
  if constexpr (sizeof(E) == 8) return (typename Vec<A>::V)_mm512_maskz_loadu_pd((1u << n) - 1, p);
  if constexpr (sizeof(E) == 4) return (typename Vec<A>::V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (sizeof(E) == 2) {
    E whole[L];
    _mm256_storeu_si256((__m256i*)whole, _mm256_maskz_loadu_epi16((1u << n) - 1, p));
    return load(whole);
  }
#endif
  E whole[L] = {};
  copy_part<E, L>(whole, p, n);
  return load(whole);
}

// Stores the first n ≤ lanes, rounded.
template <class A, class E> INLINE void store_part(E* p, typename Vec<A>::V v, int64_t n) {
  constexpr int L = Vec<A>::lanes;
  if (n >= L) return store(p, v);
#if defined(__AVX512F__) && VECTOR_BYTES == 64
  shown_store(p, n * sizeof(E));
  if constexpr (sizeof(E) == 8) return _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
  if constexpr (sizeof(E) == 4) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
  if constexpr (sizeof(E) == 2) {
    E whole[L];
    store(whole, v);
    return _mm256_mask_storeu_epi16(p, (1u << n) - 1, _mm256_loadu_si256((const __m256i*)whole));
  }
#endif
  E whole[L];
  store(whole, v);
  copy_part<E, L>(p, whole, n);
}

// Which lanes are before lane n.
template <class A> INLINE auto lane_mask(int64_t n) {
  typedef typename Vec<A>::V V;
  decltype(V{} < V{}) lane;
  for (int i = 0; i < Vec<A>::lanes; ++i) lane[i] = i;
  return lane < (lane - lane) + int(n);
}

template <class A> INLINE typename Vec<A>::V first(typename Vec<A>::V v, int64_t n) {
  typedef typename Vec<A>::V V;
  return (V)((decltype(v < v))v & lane_mask<A>(n));
}

// The first n elements, zeros after them; nothing is read at `end` or beyond.
#if defined(__AVX512F__) && VECTOR_BYTES == 64
template <class A> INLINE Vec<float>::V load_first(const float* p, int64_t n, const float*) {
  shown_load(p, n * sizeof(*p));
  return (Vec<float>::V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
}
template <class A> INLINE Vec<double>::V load_first(const double* p, int64_t n, const double*) {
  shown_load(p, n * sizeof(*p));
  return (Vec<double>::V)_mm512_maskz_loadu_pd((1u << n) - 1, p);
}
#elif defined(__AVX2__) && VECTOR_BYTES == 32
template <class A> INLINE Vec<float>::V load_first(const float* p, int64_t n, const float*) {
  shown_load(p, n * sizeof(*p));
  return (Vec<float>::V)_mm256_maskload_ps(p, (__m256i)lane_mask<A>(n));
}
template <class A> INLINE Vec<double>::V load_first(const double* p, int64_t n, const double*) {
  shown_load(p, n * sizeof(*p));
  return (Vec<double>::V)_mm256_maskload_pd(p, (__m256i)lane_mask<A>(n));
}
#endif
template <class A, class E> INLINE typename Vec<A>::V load_first(const E* p, int64_t n, const E* end) {
  constexpr int L = Vec<A>::lanes;
  if (p + L <= end) return first<A>(load(p), n);
  E part[L] = {};
  copy_part<E, L>(part, p, n);
  return load(part);
}

INLINE float load_scalar(const float* p) { return *p; }
INLINE double load_scalar(const double* p) { return *p; }
template <class E> INLINE float load_scalar(const E* p) {
  E whole[FL] = {*p};
  float wide[FL];
  store(wide, load(whole));
  return wide[0];
}

}  // namespace
}  // namespace omniconv
