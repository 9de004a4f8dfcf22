// A square of vectors, transposed in registers. Included by kernels only; internal linkage.
#pragma once
#include "simd/vec.h"

namespace {

template <class A> struct Zip;
#if VECTOR_BYTES == 64
template <> struct Zip<float> {
  typedef int32_t I __attribute__((vector_size(64)));
  static constexpr I low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, high = low + 8;
};
template <> struct Zip<double> {
  typedef int64_t I __attribute__((vector_size(64)));
  static constexpr I low = {0, 8, 1, 9, 2, 10, 3, 11}, high = low + 4;
};
#elif VECTOR_BYTES == 32
template <> struct Zip<float> {
  typedef int32_t I __attribute__((vector_size(32)));
  static constexpr I low = {0, 8, 1, 9, 2, 10, 3, 11}, high = low + 4;
};
template <> struct Zip<double> {
  typedef int64_t I __attribute__((vector_size(32)));
  static constexpr I low = {0, 4, 1, 5}, high = low + 2;
};
#else
template <> struct Zip<float> {
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr I low = {0, 4, 1, 5}, high = low + 2;
};
template <> struct Zip<double> {
  typedef int64_t I __attribute__((vector_size(16)));
  static constexpr I low = {0, 2}, high = low + 1;
};
#endif

// Lane j of v[i] becomes lane i of v[j]: what is zipped log₂ L times with what lies half the square away has changed places.
template <class A> INLINE void transpose(typename Vec<A>::V* v) {
  constexpr int L = Vec<A>::lanes;
  typename Vec<A>::V zipped[L];
#pragma GCC unroll 4
  for (int side = 1; side < L; side *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      zipped[2 * i] = __builtin_shuffle(v[i], v[i + L / 2], Zip<A>::low);
      zipped[2 * i + 1] = __builtin_shuffle(v[i], v[i + L / 2], Zip<A>::high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = zipped[i];
  }
}

}  // namespace
