// Dynamic convolution along a sequence: what a kernel is given, and what it promises.
//
//   w = softmax over the taps (or the numbers as they are);  y[c, t] = activation(bias[c] + Σ_i w[i, t]·x[c, t +
//   i·dilation − before])
//
// A call makes outputs of one sample: of one head, `group` channels that share the weights, or of some that have few
// channels and lie side by side. The weights exist a tile of positions at a time. Every sum starts with its bias and
// takes its taps in order, and every weight is made of its own position's numbers in one order: the bits of an output
// depend neither on the length nor on where it stands.
//
// Types: E is the element type of x, y and the kernels (heads, K, positions); biases come in A, what sums are kept in
// (float; double for double). mask has a byte for each position of x, not 0 where x counts as zero; or it is null.
// scratch is 64-byte aligned and as large as the function beside it says; nothing in it need be set. Nothing is read or
// written outside of the tensors.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/padding.h"

namespace omniconv {

struct DynamicGeometry {
  int64_t length, outputs;  // positions of x and of y
  int64_t heads, group;     // heads that a call makes, and channels of each
  int64_t kernel, dilation, before;
  int64_t x_step, x_channel, y_step,
      y_channel;      // elements between positions and between channels: one of each pair is 1
  int64_t positions;  // of the kernels: `outputs`, or 1 for the whole sequence
  bool softmax;
  // A weight is dropped where the hash of its place among all weights of the call is below `dropped`; the others are
  // multiplied by `scale`.
  uint64_t seed, row;  // row: of the first head's first tap, all heads' taps counted
  uint32_t dropped;
  double scale;
  Mode mode;  // of the gradients: kZeros
  Activation activation;
};

struct DynamicKernels {
  // Outputs [first, last), whatever their number.
  size_t (*forward_bytes)(const DynamicGeometry&);
  void (*forward)(const DynamicGeometry&, int64_t first, int64_t last, const void* x, const void* kernels,
                  const void* bias, const uint8_t* mask, void* y, void* scratch);
  // Multiplies one head's (K, positions) weights, in the type of the sums, by `scale`, or by 0 where they are dropped.
  void (*apply_dropout)(const DynamicGeometry&, void* weights);
};

struct DynamicGradKernels {
  // The gradient of positions [first, last) of x. grad_y lies as y does, grad_x as x.
  size_t (*grad_input_bytes)(const DynamicGeometry&);
  void (*grad_input)(const DynamicGeometry&, int64_t first, int64_t last, const void* grad_y, const void* kernels,
                     const uint8_t* mask, void* grad_x, void* scratch);
  // The gradient of the numbers that the weights are made from, at outputs [first, last): all of them where one kernel
  // serves all.
  size_t (*grad_kernels_bytes)(const DynamicGeometry&);
  void (*grad_kernels)(const DynamicGeometry&, int64_t first, int64_t last, const void* grad_y, const void* x,
                       const void* kernels, const uint8_t* mask, void* grad_kernels, void* scratch);
};

// By element type.
struct DynamicTables { DynamicKernels f32, f64, bf16, f16; };
struct DynamicGradTables { DynamicGradKernels f32, f64, bf16, f16; };

}  // namespace omniconv
