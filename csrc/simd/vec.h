// The vector type of the instruction set being compiled: VECTOR_BYTES wide, by the vector extensions of GCC and Clang.
// Included by kernels only; everything has internal linkage, so no copy built for one instruction set can serve
// another.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__F16C__)
#include <immintrin.h>
#endif

// for a reader's tools; the build names both
#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif
#ifndef ISA
#define ISA isa_base
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// What a sum of elements E is kept in.
template <class E> struct Accumulator { typedef float type; };
template <> struct Accumulator<double> { typedef double type; };

template <class A> struct Vec;
template <> struct Vec<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int lanes = VECTOR_BYTES / 4;
};
template <> struct Vec<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int lanes = VECTOR_BYTES / 8;
};
typedef Vec<float>::V VF;
typedef Vec<float>::I VI;
typedef uint16_t VH __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t UH __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
constexpr int FL = Vec<float>::lanes;

// x − 0 is a broadcast; 0 + x is an addition, since −0 + 0 is +0.
template <class A> INLINE typename Vec<A>::V broadcast(A x) { return x - typename Vec<A>::V{}; }

// The same vector, in a register: the compiler otherwise folds one load into every operation that uses it, and loads
// become the limit (3x3 channels-last, AVX-512: 175 GFLOP/s with the loads folded, 240 without).
template <class V> INLINE V in_register(V v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__SSE__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}
// The same pointer, computed once: GCC otherwise keeps one for each of the vectors loaded from it, in memory.
template <class E> INLINE const E* in_register(const E* p) {
  __asm__("" : "+r"(p));
  return p;
}

INLINE VF load(const float* p) { return *(const Vec<float>::U*)p; }
INLINE Vec<double>::V load(const double* p) { return *(const Vec<double>::U*)p; }
// Between 16 and 32 bits by intrinsics where there are any: GCC 12 makes twice as many instructions of
// __builtin_convertvector.
#if defined(__AVX512F__) && VECTOR_BYTES == 64
INLINE VI widen(const void* p) {
  return (VI)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
INLINE VH narrow(VI v) { return (VH)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v); }
#elif defined(__AVX2__) && VECTOR_BYTES == 32
INLINE VI widen(const void* p) { return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE VH narrow(VI v) {
  return (VH)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
INLINE VI widen(const void* p) { return __builtin_convertvector((VH) * (const UH*)p, VI); }
INLINE VH narrow(VI v) { return __builtin_convertvector(v, VH); }
#endif
INLINE VF load(const bf16* p) { return (VF)(widen(p) << 16); }
INLINE void store(float* p, VF v) { *(Vec<float>::U*)p = v; }
INLINE void store(double* p, Vec<double>::V v) { *(Vec<double>::U*)p = v; }
// To nearest even; a NaN stays one.
INLINE void store(bf16* p, VF v) {
  const VI u = (VI)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  *(UH*)p = narrow(((v == v) ? rounded : (u | 0x400000)) >> 16);
}
#if defined(__F16C__) && VECTOR_BYTES == 64
INLINE VF load(const f16* p) { return (VF)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
INLINE void store(f16* p, VF v) { _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, 0)); }
#elif defined(__F16C__) && VECTOR_BYTES == 32
INLINE VF load(const f16* p) { return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store(f16* p, VF v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
// By integers: exponents are moved, subnormals made by one subtraction of normal numbers, so that flushing denormals
// does no harm.
INLINE VF load(const f16* p) {
  VI h = __builtin_convertvector((VH) * (const UH*)p, VI);
  VI sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
  VI exponent = rest & 0x0f800000;
  VF normal = (VF)(rest + (112u << 23));
  VF special = (VF)(rest + (224u << 23));  // inf and NaN
  VF small = (VF)(rest + (113u << 23)) - broadcast<float>(6.103515625e-05f);
  VF r = exponent == 0x0f800000 ? special : normal;
  r = exponent == 0 ? small : r;
  return (VF)((VI)r | sign);
}
INLINE void store(f16* p, VF v) {
  VI u = (VI)v, sign = (u >> 16) & 0x8000;
  VI a = u & 0x7fffffff;
  VI normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  VI small = (VI)((VF)a + broadcast<float>(0.5f)) - 0x3f000000u;  // rounds to units of 2^-24
  VI special = (a > 0x7f800000u) ? (VI{} + 0x7e00u) : (VI{} + 0x7c00u);
  VI r = a < (113u << 23) ? small : normal;
  r = a >= 0x477ff000u ? special : r;
  *(UH*)p = __builtin_convertvector(r | sign, VH);
}
#endif

}  // namespace
