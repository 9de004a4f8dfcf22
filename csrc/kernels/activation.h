// The activations that a kernel can end with. Sums kept in double take only those without an exponential: none, relu,
// relu6, hardswish.
#pragma once
#include <cstdint>

namespace omniconv {

enum Activation : int64_t { kNone, kRelu, kRelu6, kSilu, kHardswish, kGelu, kSigmoid };

}  // namespace omniconv
