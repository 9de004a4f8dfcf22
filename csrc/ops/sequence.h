// What the ops over sequences share: layouts, and the checks of a window along time.
#pragma once
#include "ops/checks.h"
#include "ops/operand.h"

namespace omniconv {

// The axes of a layout.
struct Axes { size_t batch, channel, time; };

inline Axes check_layout(const char* op, int64_t layout) {
  constexpr Axes kLayouts[] = {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}};
  if (layout < 0 || layout > 2)
    fail(op, "layout must be 0 (N, C, T), 1 (N, T, C) or 2 (T, N, C)", std::to_string(layout));
  return kLayouts[layout];
}

// Contiguous sequences in some layout.
struct Sequences {
  int64_t batch, channels, length;
  Ints size;
  int64_t step, channel, sample;  // elements between positions, channels and samples

  Sequences(const Axes& axes, int64_t batch, int64_t channels, int64_t length)
      : batch(batch), channels(channels), length(length), size(3) {
    size[axes.batch] = batch;
    size[axes.channel] = channels;
    size[axes.time] = length;
    const Ints strides = contiguous_strides(size);
    step = strides[axes.time];
    channel = strides[axes.channel];
    sample = strides[axes.batch];
  }
};

// Returns the sequences of an input's size.
inline Sequences check_input(const char* op, const Axes& axes, const Ints& size) {
  if (size.size() != 3) fail(op, "the input must have 3 axes", text(size));
  return Sequences(axes, size[axes.batch], size[axes.channel], size[axes.time]);
}

// Returns the sequences of an input from the size of the output's gradient and its own length.
inline Sequences check_input_of_grad(const char* op, const Axes& axes, const Ints& size, const Ints& length) {
  if (size.size() != 3 || length.size() != 1)
    fail(op, "grad_y must have 3 axes, and length be one number", text(size) + " and " + text(length));
  return Sequences(axes, size[axes.batch], size[axes.channel], length[0]);
}

// A kernel of so many heads and taps, with padding (before, after), as an op was given it.
struct SequenceWindow {
  const char* weights;  // what the op calls them
  int64_t heads, taps;
  const Ints& pads;
  int64_t dilation;
  Mode mode;
};

// Returns the length of the result.
inline int64_t check_window(const char* op, const Sequences& x, const SequenceWindow& w) {
  constexpr int64_t kMaxReach = int64_t(1) << 24;  // a tile may copy as many positions
  if (w.heads < 1 || x.channels < 1 || x.channels % w.heads)
    fail(op, "the heads of " + std::string(w.weights) + " must divide the input's channels",
         std::to_string(w.heads) + " for " + text(x.size));
  if (w.pads.size() != 2) fail(op, "pads must be (before, after)", text(w.pads));
  const int64_t before = w.pads[0], after = w.pads[1];
  if (x.length < 1 || x.length > kMaxSize || w.taps < 1 || w.taps > kMaxSize || w.dilation < 1 ||
      w.dilation > kMaxSize || before < 0 || before > kMaxSize || after < 0 || after > kMaxSize)
    fail(op, "length, kernel and dilation must be at least 1 and pads at least 0",
         text({x.length, w.taps, w.dilation, before, after}));
  const int64_t outputs = check_window(op, AxisWindow{x.length, before, after, w.taps, w.dilation}, w.mode);
  const int64_t reach = w.dilation * (w.taps - 1);
  if (reach > kMaxReach) fail(op, "a window must cover at most 2^24 positions", std::to_string(reach));
  return outputs;
}

inline void check_mask(const char* op, const Tensor& mask, const Sequences& x) {
  if (mask && (mask.dim() != 2 || mask.size(0) != x.batch || mask.size(1) != x.length || mask.dtype() != kBool))
    fail(op, "mask must be bool (N, T)", text(mask.size()));
}

// Returns the mask of a sample; null without a mask.
inline const uint8_t* mask_of(const Tensor& mask, int64_t sample) {
  return mask ? static_cast<const uint8_t*>(mask.data()) + sample * mask.size(1) : nullptr;
}

inline void check_grad(const char* op, const Tensor& grad_y, const Sequences& y) {
  if (grad_y.size() != y.size) fail(op, "grad_y must have the size of the output " + text(y.size), text(grad_y.size()));
}

}  // namespace omniconv
