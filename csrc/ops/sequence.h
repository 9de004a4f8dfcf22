// What the ops over sequences share: layouts, and the checks of a window along time.
#pragma once
#include "kernels/depthwise.h"
#include "ops/operand.h"

namespace omniconv {

struct Axes { size_t batch, channel, time; };

inline Axes axes_of(const char* op, int64_t layout) {
  constexpr Axes kLayouts[] = {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}};
  if (layout < 0 || layout > 2) fail(op, "layout must be 0 (N, C, T), 1 (N, T, C) or 2 (T, N, C)", std::to_string(layout));
  return kLayouts[layout];
}

inline Ints in_layout(const Axes& axes, int64_t batch, int64_t channels, int64_t length) {
  Ints size(3);
  size[axes.batch] = batch;
  size[axes.channel] = channels;
  size[axes.time] = length;
  return size;
}

// The length of the result of an input of `size` under a kernel (`named` so) of `heads` heads and K taps; pads are (before, after).
inline int64_t outputs_of(const char* op, const Axes& axes, const Ints& size, const char* named, int64_t heads, int64_t K, const Ints& pads, int64_t dilation, int64_t mode) {
  constexpr int64_t kMost = int64_t(1) << 31, kFarthest = int64_t(1) << 24;  // a tile may copy as many positions
  const int64_t channels = size[axes.channel], length = size[axes.time];
  if (heads < 1 || channels < 1 || channels % heads)
    fail(op, "the heads of " + std::string(named) + " must divide the input's channels", std::to_string(heads) + " for " + text(size));
  if (pads.size() != 2) fail(op, "pads must be (before, after)", text(pads));
  const int64_t before = pads[0], after = pads[1];
  if (length < 1 || length > kMost || K < 1 || K > kMost || dilation < 1 || dilation > kMost || before < 0 || before > kMost || after < 0 || after > kMost)
    fail(op, "length, kernel and dilation must be at least 1 and pads at least 0", text({length, K, dilation, before, after}));
  if (mode < kZeros || mode > kCircular) fail(op, "the padding mode must be known", std::to_string(mode));
  const int64_t reach = dilation * (K - 1), outputs = length + before + after - reach;
  if (outputs < 1) fail(op, "the padded input must hold one window", text({length, before, after}) + " for kernel " + std::to_string(K) + " with dilation " + std::to_string(dilation));
  if (reach > kFarthest) fail(op, "a window must cover at most 2^24 positions", std::to_string(reach));
  if (mode == kReflect && (before >= length || after >= length)) fail(op, "reflected pads must be below the size", text({length, before, after}));
  if (mode == kCircular && (before > length || after > length)) fail(op, "circular pads must be at most the size", text({length, before, after}));
  return outputs;
}

inline void check_mask(const char* op, const Tensor& mask, int64_t batch, int64_t length) {
  if (mask && (mask.dim() != 2 || mask.size(0) != batch || mask.size(1) != length || mask.dtype() != aoti_torch_dtype_bool()))
    fail(op, "mask must be bool (N, T)", text(mask.size()));
}

inline void check_grad(const char* op, const Ints& size, const Tensor& grad_y) {
  if (grad_y.size() != size) fail(op, "grad_y must have the size of the output " + text(size), text(grad_y.size()));
}

}  // namespace omniconv
