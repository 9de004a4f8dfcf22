// What a kernel may ask of the instruction set being compiled besides its vectors' width. Included by kernels only;
// internal linkage.
#pragma once
#include "simd/vec.h"

namespace {

// Vector registers that a kernel can count on.
constexpr int kVectorRegisters = VECTOR_BYTES == 64 ? 32 : 16;

// Whether one instruction converts a vector of halves; otherwise it takes about twenty.
#if defined(__F16C__)
constexpr bool kConvertsHalves = true;
#else
constexpr bool kConvertsHalves = false;
#endif

}  // namespace
