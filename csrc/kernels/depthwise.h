// Depthwise convolution over up to three axes (outer, row, column): what a kernel is given, and what it promises.
//
// Rank 1 is (1, 1, T), rank 2 (H, 1, W), rank 3 (D, H, W). Along each axis output o and tap t meet position o·stride −
// before + t·dilation of the input as if spread − 1 zeros stood between its elements (spread = 1: the input itself). So
// the input gradient of a strided convolution is a convolution with stride 1 of the output gradient spread by that
// stride, with its kernel flipped; `before` is negative there where the convolution padded by more than its kernel
// reaches.
//
// Types: E is the element type of x and y; weights, biases and weight gradients come in A, what sums are kept in
// (float; double for double). scratch is 64-byte aligned and as large as scratch_bytes says; nothing in it need be set.
// Nothing is read or written outside the tensors.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"
#include "kernels/padding.h"

namespace omniconv {

struct DepthwiseGeometry {
  int64_t in[3], out[3], kernel[3], stride[3], dilation[3], before[3], spread[3];
  int64_t multiplier;  // outputs per input channel
  bool ordered;        // every sum takes its taps in order, whatever the sizes: for sequences that come in chunks
  Mode mode;
  Activation activation;
};

// Contiguous planes. Weights are finite, where there is padding: it is multiplied.
struct NchwKernels {
  size_t (*scratch_bytes)(const DepthwiseGeometry&);
  // `planes` channels of x (in…) one after the other to `planes`·multiplier channels of y (out…); weight
  // (planes·multiplier, taps).
  void (*forward)(const DepthwiseGeometry&, int64_t planes, const void* x, const void* weight, const void* bias,
                  void* y, void* scratch);
};
struct NchwGradKernels {
  size_t (*scratch_bytes)(const DepthwiseGeometry&);
  // One channel of one sample: grad_weight (multiplier, taps) is added to.
  void (*grad_weight)(const DepthwiseGeometry&, const void* x, const void* grad_y, void* grad_weight, void* scratch);
};

// Channels last, multiplier 1, at least a vector of channels.
struct NhwcKernels {
  size_t (*scratch_bytes)(const DepthwiseGeometry&);
  // Columns [begin, end) of rows [first, last) of out[0]·out[1] of one sample of C channels; weight (taps, C).
  void (*forward)(const DepthwiseGeometry&, int64_t channels, int64_t first, int64_t last, int64_t begin, int64_t end,
                  const void* x, const void* weight, const void* bias, void* y, void* scratch);
  // Channels [c0, c1), whole vectors of them, of one sample; grad_weight (taps, C), and grad_bias (C) unless it is
  // null, are added to.
  void (*grad_weight)(const DepthwiseGeometry&, int64_t channels, int64_t c0, int64_t c1, const void* x,
                      const void* grad_y, void* grad_weight, void* grad_bias, void* scratch);
};

// One channel of x (in…) to its channels of y (out…), contiguous, whatever the weights (multiplier, taps) are: padding
// is never multiplied.
typedef void (*NaiveKernel)(const DepthwiseGeometry&, const void* x, const void* weight, const void* bias, void* y);

// By element type.
struct NchwTables { NchwKernels f32, f64, bf16, f16; };
struct NchwGradTables { NchwGradKernels f32, f64, bf16, f16; };
struct NaiveTables { NaiveKernel f32, f64, bf16, f16; };
struct NhwcTables { NhwcKernels f32, f64, bf16, f16; };

}  // namespace omniconv
