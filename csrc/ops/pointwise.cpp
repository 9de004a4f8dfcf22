// Pointwise convolution along one axis: checks, threads and registration; it is a matrix product over channels.
#include "kernels/gemm.h"
#include "ops/checks.h"
#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

KERNEL_TABLE(GemmTables, gemm)

namespace {

// Returns a stride in elements; that of an axis of one element, which may be anything, counts as 1.
int64_t stride_of(const Tensor& t, int64_t axis) { return t.size(axis) == 1 ? 1 : t.stride()[axis]; }

// Returns y (N, O, T), contiguous, of x (N, C, T) and weight (O, C, 1), both in any strides.
Tensor pointwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t activation, bool flush) {
  const char* op = "pointwise";
  const GemmKernels& k = kernels_of(gemm_tables(), element_of(op, x.dtype()));
  if (x.dim() != 3 || x.size(1) < 1 || x.size(1) > kMaxSize)
    fail(op, "x must be (N, C, T) with at least one channel and at most 2^31", text(x.size()));
  if (weight.dim() != 3 || weight.size(0) < 1 || weight.size(1) != x.size(1) || weight.size(2) != 1 ||
      weight.dtype() != x.dtype())
    fail(op, "weight must be (O, " + std::to_string(x.size(1)) + ", 1) of the dtype of x", text(weight.size()));
  const int64_t samples = x.size(0), channels = x.size(1), outputs = weight.size(0), steps = x.size(2);
  if (!is_bias(bias, outputs, x.dtype()))
    fail(op, "bias must be (" + std::to_string(outputs) + ",) of the dtype of x or of its sums", text(bias.size()));
  Gemm g{};
  g.activation = check_activation(op, activation, x.dtype());
  Tensor y = new_tensor(op, {samples, outputs, steps}, x.dtype());
  if (!samples || !steps) return y;
  const Buffer packed = pack_bias(op, bias);
  g.samples = samples;
  g.channels = channels;
  g.outputs = outputs;
  g.steps = steps;
  g.x = x.data();
  g.sample_stride = stride_of(x, 0);
  g.channel_stride = stride_of(x, 1);
  g.step_stride = stride_of(x, 2);
  g.weight = weight.data();
  g.weight_output_stride = stride_of(weight, 0);
  g.weight_channel_stride = stride_of(weight, 1);
  g.bias = packed.data();
  g.y = y.data();
  const GemmPlan plan = k.plan(g);
  const Work work{plan.units, grain_of(plan.group * plan.panel * channels / 8), plan.scratch_bytes, flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) { k.run(g, plan, first, last, scratch); });
  return y;
}

const Register<pointwise> kPointwise(
    "pointwise(Tensor x, Tensor weight, Tensor? bias, int activation, bool flush) -> Tensor");

}  // namespace
}  // namespace omniconv
