// Causal depthwise convolution with state: y[d, t] = f(bias[d] + Σ_i weight[i, d]·past[d, t + i]), past = what came
// before, then x.
//
// E is the element type of x, y and the state; weights (W, D) and bias (D) come in the type that sums are kept in.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/activation.h"

namespace omniconv {

struct CausalFilter {
  int64_t channels, width;
  const void *weight, *bias;  // bias may be null
  Activation activation;
};

struct CausalState {
  void* data;
  int64_t size, channel_stride, step_stride;  // the latest input last; size ≥ width − 1
};

struct CausalKernels {
  size_t (*scratch_bytes)(int64_t width);
  // The next `steps` positions of one sequence, channels [first, last): x and y (D, steps); the state is updated.
  void (*update)(const CausalFilter&, int64_t first, int64_t last, int64_t steps, const void* x, const CausalState&,
                 void* y, void* scratch);
  // Computes `positions` [0, count) of one channel again: tap i counts where owner[t + i − (W − 1)] is owner[t] ≥ 0; x
  // and y (steps).
  void (*fixup_boundaries)(const CausalFilter&, int64_t channel, const int64_t* owner, const int64_t* positions,
                           int64_t count, const void* x, void* y);
};

struct CausalTables { CausalKernels f32, f64, bf16, f16; };

}  // namespace omniconv
