// A matrix product over channels, y[n, o, t] = f(bias[o] + Σ_c weight[o, c]·x[n, c, t]), in which the bits of an output
// depend on its own column of x and its own row of the weight alone.
//
// Each output is one chain of multiply-adds in the type of the sums, from the bias (0 without one) through c = 0 … C −
// 1 in order, whatever the tile, the tail, the thread and the number of columns. E is the element type of x, weight and
// y; the bias comes in the type of the sums.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"

namespace omniconv {

struct Gemm {
  int64_t samples, channels, outputs, steps;  // N, C, O, T, all at least 1
  const void* x;                              // any strides that are not negative, in elements
  int64_t sample_stride, channel_stride, step_stride;
  const void* weight;  // (O, C), any such strides
  int64_t weight_output_stride, weight_channel_stride;
  const void* bias;  // (O) or null
  void* y;           // (N, O, T) contiguous
  Activation activation;
};

// The two operands of a call as the kernels see them: vectors lie along the outputs or along the columns (n, t), rows
// along the other; the rows are packed in groups that stay in L2, and a unit of work is a group with one panel of
// vectors.
struct GemmPlan {
  bool along_outputs, few;  // few rows: weights go straight from where they lie into the sums
  int64_t rows, lanes, group, panel, panels, units;
  size_t scratch_bytes;
};

struct GemmKernels {
  GemmPlan (*plan)(const Gemm&);
  void (*run)(const Gemm&, const GemmPlan&, int64_t first, int64_t last,
              void* scratch);  // units [first, last); scratch 64-byte aligned
};

struct GemmTables { GemmKernels f32, f64, bf16, f16; };

}  // namespace omniconv
