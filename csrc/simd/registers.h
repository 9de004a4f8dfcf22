// What a kernel may ask of the instruction set being compiled besides its vectors' width. Included by kernels only;
// internal linkage.
#pragma once
#include "simd/vec.h"

// One copy of a function, with registers of its own.
#if defined(__clang__)
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE __attribute__((noinline, noclone))
#endif

namespace {

// Vector registers that a kernel can count on. (The 64-byte kernels are tested without AVX-512 too, as they are.)
#if VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// Whether a sum takes a product in one instruction; otherwise the product needs a register of its own.
#if VECTOR_BYTES > 16 || defined(__aarch64__)
constexpr bool kFusesMultiplyAdd = true;
#else
constexpr bool kFusesMultiplyAdd = false;
#endif

// Whether a vector fills a line of the cache.
constexpr bool kVectorIsLine = VECTOR_BYTES == 64;

// Whether one instruction converts a vector of halves; otherwise it takes about twenty.
#if defined(__F16C__)
constexpr bool kConvertsHalves = true;
#else
constexpr bool kConvertsHalves = false;
#endif

}  // namespace
