// Lightweight convolution along a sequence: what a kernel is given, and what it promises.
//
//   y[c, t] = activation(bias[c] + Σ_i weight[c / group, i]·x[c, t + i·dilation − before])
//
// Every sum starts with its bias and takes its taps in order, in fused multiply-adds: the bits of an output depend
// neither on the length nor on where it stands. The input gradient is the same with the taps reversed; `before` may be
// negative there.
//
// Types: E is the element type of x and y; weights (H, K), biases and their gradients come in A, what sums are kept in
// (float; double for double). mask has a byte for each position of x, not 0 where x counts as zero; or it is null.
// scratch is 64-byte aligned and as large as scratch_bytes says; nothing in it need be set. Nothing is read or written
// outside of the tensors.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/padding.h"

namespace omniconv {

struct LightweightGeometry {
  int64_t length, outputs, channels;  // positions of x and of y
  int64_t group;                      // channels of a head
  int64_t kernel, dilation, before;
  int64_t x_step, x_channel, x_sample, y_step, y_channel,
      y_sample;  // elements between positions, channels, samples; of step and channel one is 1
  Mode mode;     // of the gradients: kZeros
  Activation activation;
  bool finite;  // all weights are: what they meet of padding adds nothing
};

struct LightweightKernels {
  size_t (*scratch_bytes)(const LightweightGeometry&);
  // Channels [c0, c1) and outputs [t0, t1) of one sample; outputs where `zeroed`, if it is not null, is not 0 are made
  // 0.
  void (*forward)(const LightweightGeometry&, int64_t c0, int64_t c1, int64_t t0, int64_t t1, const void* x,
                  const void* weight, const void* bias, const uint8_t* mask, const uint8_t* zeroed, void* y,
                  void* scratch);
  // Whole heads, channels [c0, c1), of so many samples: their rows of grad_weight (H, K), and of grad_bias (C) if it is
  // not null, are added to.
  void (*grad_weight)(const LightweightGeometry&, int64_t c0, int64_t c1, int64_t samples, const void* x,
                      const void* grad_y, const uint8_t* mask, void* grad_weight, void* grad_bias, void* scratch);
  // Rows of logits become their softmax; gradients of these rows become those of the logits.
  void (*softmax)(int64_t heads, int64_t taps, void* weight);
  void (*softmax_gradient)(int64_t heads, int64_t taps, const void* weight, void* grad_weight);
};

// By element type.
struct LightweightTables { LightweightKernels f32, f64, bf16, f16; };

}  // namespace omniconv
