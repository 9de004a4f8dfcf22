// What a kernel may ask of the instruction set being compiled besides its vectors' width. Included by kernels only;
// internal linkage.
#pragma once
#include "simd/vec.h"

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

}  // namespace
