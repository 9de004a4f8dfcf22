// What several ops check of their arguments.
#pragma once
#include <algorithm>

#include "kernels/activation.h"
#include "kernels/padding.h"
#include "ops/dtype.h"

namespace omniconv {

// The most that an axis, a kernel, a stride, a dilation or a pad may be: their products stay below 2^63.
constexpr int64_t kMaxSize = int64_t(1) << 31;

// Returns whether weights may have this dtype beside inputs of another: the same, or that of the sums.
inline bool is_weight_dtype(int32_t dtype, int32_t input_dtype) {
  return dtype == input_dtype || dtype == accumulator_dtype(input_dtype);
}

// Returns whether a bias is absent, or has one element for each of the outputs, of a dtype that weights may have.
inline bool is_bias(const Tensor& bias, int64_t outputs, int32_t input_dtype) {
  return !bias || (bias.dim() == 1 && bias.size(0) == outputs && is_weight_dtype(bias.dtype(), input_dtype));
}

// Returns the activation of a code; refuses one that the kernels of a dtype cannot end with.
inline Activation check_activation(const char* op, int64_t code, int32_t dtype) {
  const bool exponential = code == kSilu || code == kGelu || code == kSigmoid;
  if (code < kNone || code > kSigmoid || (exponential && dtype == kFloat64))
    fail(op, "the activation must be one that is fused", std::to_string(code));
  return Activation(code);
}

// Returns the padding mode of a code.
inline Mode check_mode(const char* op, int64_t code) {
  if (code < kZeros || code > kCircular) fail(op, "the padding mode must be known", std::to_string(code));
  return Mode(code);
}

// A kernel along one axis, and the padding before and after the input there.
struct AxisWindow { int64_t size, before, after, kernel, dilation; };

// Returns how many positions a window can take: at least 1. Refuses a window that does not fit,
// and pads that the mode does not have.
inline int64_t check_window(const char* op, const AxisWindow& w, Mode mode) {
  const int64_t positions = w.size + w.before + w.after - w.dilation * (w.kernel - 1);
  if (positions < 1)
    fail(op, "the padded input must hold one window",
         text({w.size, w.before, w.after}) + " for kernel " + std::to_string(w.kernel) + " with dilation " +
             std::to_string(w.dilation));
  if (!pad_fits(mode, std::max(w.before, w.after), w.size))
    fail(op, mode == kReflect ? "reflected pads must be below the size" : "circular pads must be at most the size",
         text({w.size, w.before, w.after}));
  return positions;
}

// Returns whether all of n accumulators, of so many bytes each, are finite.
inline bool all_finite(const char* data, int64_t n, int64_t bytes) {
  if (bytes == 8) {
    const double* p = reinterpret_cast<const double*>(data);
    double zero = 0;
    for (int64_t i = 0; i < n; ++i) zero += p[i] * 0;  // NaN once one is not
    return zero == 0;
  }
  uint32_t largest = 0;  // by their exponents: integers are compared a vector at a time
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, data + 4 * i, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

}  // namespace omniconv
