// What a kernel may count on in the instruction set being compiled. Included by kernels only; internal linkage.
#pragma once
#include "simd/vec.h"

#define NOINLINE __attribute__((noinline, noclone))  // one copy, of its own for its registers

namespace omniconv {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// A vector fills a line of the cache.
constexpr bool kVectorIsLine = VECTOR_BYTES == 64;

// Half types become float32, and back, in an instruction or a few.
#if defined(__F16C__)
constexpr bool kConvertsHalves = true;
#else
constexpr bool kConvertsHalves = false;
#endif

}  // namespace
}  // namespace omniconv
