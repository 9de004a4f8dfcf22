// Lightweight convolution: checks, layout, threads and registration.
#include "kernels/lightweight.h"

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/sequence.h"
#include "ops/thread.h"

namespace omniconv {

KERNEL_TABLE(LightweightTables, lightweight)

namespace {

// The settings that all ops of the family take.
struct LightweightSettings {
  const Ints& pads;
  int64_t dilation, mode;
};

// One call: what its kernels are given, and what lies around that.
struct LightweightCall {
  Sequences x, y;
  int64_t heads;
  int64_t element_bytes, sum_bytes;
  bool time_fastest;  // positions of a channel lie side by side
  LightweightGeometry g;
};

// Returns the call of an input of a dtype and a weight (H, K).
LightweightCall check_call(const char* op, const Axes& axes, const Sequences& x, int32_t dtype, const Tensor& weight,
                           const LightweightSettings& s) {
  if (weight.dim() != 2) fail(op, "weight must be (H, K)", text(weight.size()));
  if (!is_weight_dtype(weight.dtype(), dtype))
    fail(op, "weight must have the input's dtype, or that of its sums", std::to_string(weight.dtype()));
  const int64_t heads = weight.size(0), taps = weight.size(1);
  const Mode mode = check_mode(op, s.mode);
  const int64_t outputs = check_window(op, x, SequenceWindow{"weight", heads, taps, s.pads, s.dilation, mode});
  const Sequences y(axes, x.batch, x.channels, outputs);
  LightweightGeometry g{};
  g.length = x.length;
  g.outputs = outputs;
  g.channels = x.channels;
  g.group = x.channels / heads;
  g.kernel = taps;
  g.dilation = s.dilation;
  g.before = s.pads[0];
  g.x_step = x.step;
  g.x_channel = x.channel;
  g.x_sample = x.sample;
  g.y_step = y.step;
  g.y_channel = y.channel;
  g.y_sample = y.sample;
  g.mode = mode;
  g.activation = kNone;
  return {x, y, heads, element_size(dtype), element_size(accumulator_dtype(dtype)), axes.time == 2, g};
}

// Returns the weights as they are applied, in the dtype of the sums, their taps reversed where asked.
Buffer effective_weights(const char* op, const LightweightKernels& k, const LightweightCall& c, const Tensor& weight,
                         bool softmax, bool reversed) {
  const Contiguous used(op, weight);
  Buffer packed(op, "the packed weight", c.heads * c.g.kernel, c.sum_bytes);
  // a softmax does not mind the order of its taps
  pack_weights({used->data(), weight.dtype(), c.heads, c.g.kernel}, Packing::row_major, reversed, packed.data());
  if (softmax) k.softmax(c.heads, c.g.kernel, packed.data());
  return packed;
}

// What a convolution is given: an input and its mask, packed weights and biases (null without), where outputs are 0.
struct LightweightOperands {
  const Tensor& x;
  const Tensor& mask;
  const char* weight;
  const char* bias;
  const Tensor& zeroed;
};

// Computes y, all tensors contiguous.
void convolve(const char* op, const LightweightKernels& k, const LightweightCall& c, const LightweightOperands& in,
              bool flush, Tensor& y) {
  LightweightGeometry g = c.g;
  g.finite = all_finite(in.weight, c.heads * g.kernel, c.sum_bytes);
  // What is one thread's at a time; the last block has up to twice as many channels, so that it fills vectors where
  // there are enough. Rows of channels are as long as possible.
  const int64_t kChannels = c.time_fastest ? 64 : 512, kOutputs = c.time_fastest ? 512 : 128;
  const int64_t blocks = std::max<int64_t>(1, g.channels / kChannels);
  const int64_t chunks = std::max<int64_t>(1, g.outputs / std::max(kOutputs, 4 * g.dilation * (g.kernel - 1)));
  const int64_t units = blocks * chunks;
  const Work work{c.x.batch * units, grain_of(g.outputs / chunks * (g.channels / blocks) * g.kernel),
                  k.scratch_bytes(g), flush};
  const char* x_data = address(in.x);
  char* y_data = address(y);
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) {
    for (int64_t u = first; u < last; ++u) {
      const int64_t n = u / units, unit = u % units;
      const int64_t b = c.time_fastest ? unit / chunks : unit % blocks,
                    i = c.time_fastest ? unit % chunks : unit / blocks;
      const int64_t c0 = b * kChannels, c1 = b == blocks - 1 ? g.channels : c0 + kChannels;
      const int64_t t0 = i * g.outputs / chunks, t1 = (i + 1) * g.outputs / chunks;
      k.forward(g, c0, c1, t0, t1, x_data + n * g.x_sample * c.element_bytes, in.weight, in.bias, mask_of(in.mask, n),
                mask_of(in.zeroed, n), y_data + n * g.y_sample * c.element_bytes, scratch);
    }
  });
}

Tensor lightweight(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                   int64_t layout, const Ints& pads, int64_t dilation, int64_t mode, bool softmax, int64_t activation,
                   bool flush) {
  const char* op = "lightweight";
  const LightweightKernels& k = kernels_of(lightweight_tables(), element_of(op, x.dtype()));
  const Axes axes = check_layout(op, layout);
  const Sequences input = check_input(op, axes, x.size());
  LightweightCall c = check_call(op, axes, input, x.dtype(), weight, {pads, dilation, mode});
  if (!is_bias(bias, input.channels, x.dtype()))
    fail(op, "bias must be (C,) of the input's dtype, or that of its sums", text(bias.size()));
  check_mask(op, mask, input);
  c.g.activation = check_activation(op, activation, x.dtype());
  Tensor y = new_tensor(op, c.y.size, x.dtype());
  if (!y.numel()) return y;
  const Contiguous x_used(op, x), mask_used(op, mask);
  const Buffer w = effective_weights(op, k, c, weight, softmax, false), b = pack_bias(op, bias);
  convolve(op, k, c, {*x_used, *mask_used, w.data(), b.data(), Tensor()}, flush, y);
  return y;
}

// Returns the gradient of an input of `length` positions, 0 where the mask is set: the same with reversed taps.
Tensor lightweight_grad_input(const Tensor& grad_y, const Tensor& weight, const OptionalTensor& mask,
                              const Ints& length, int64_t layout, const Ints& pads, int64_t dilation, bool softmax,
                              bool flush) {
  const char* op = "lightweight_grad_input";
  const LightweightKernels& k = kernels_of(lightweight_tables(), element_of(op, grad_y.dtype()));
  const Axes axes = check_layout(op, layout);
  const Sequences input = check_input_of_grad(op, axes, grad_y.size(), length);
  LightweightCall c = check_call(op, axes, input, grad_y.dtype(), weight, {pads, dilation, kZeros});
  check_grad(op, grad_y, c.y);
  check_mask(op, mask, input);
  Tensor grad_x = new_tensor(op, input.size, grad_y.dtype());
  if (!grad_x.numel()) return grad_x;
  const Contiguous grad_used(op, grad_y), mask_used(op, mask);
  LightweightGeometry& g = c.g;
  std::swap(g.length, g.outputs);
  std::swap(g.x_step, g.y_step);
  std::swap(g.x_channel, g.y_channel);
  std::swap(g.x_sample, g.y_sample);
  g.before = g.dilation * (g.kernel - 1) - g.before;
  const Buffer w = effective_weights(op, k, c, weight, softmax, true);
  convolve(op, k, c, {*grad_used, Tensor(), w.data(), nullptr, *mask_used}, flush, grad_x);
  return grad_x;
}

// How the gradient of a weight is shared out: heads_per_unit heads a unit, and where there are few units the batch is
// split. Neither depends on the number of threads.
struct GradWeightSplit { int64_t heads_per_unit, units, batch_splits; };

GradWeightSplit split_grad_weight(const LightweightCall& c) {
  constexpr int64_t kUnits = 8;
  const int64_t copied_channels = c.time_fastest ? 0 : 8 * kMaxLanes;  // what is copied at once of channels-last
  int64_t heads = 1;                                                   // enough to fill vectors
  const auto fills_vectors = [&] {
    const int64_t channels = heads * c.g.group;
    return channels >= copied_channels && (channels % kMaxLanes == 0 || channels >= 4 * kMaxLanes);
  };
  while (heads < c.heads && !fills_vectors()) ++heads;
  const int64_t units = (c.heads + heads - 1) / heads;
  return {heads, units, units >= kUnits ? 1 : std::min(c.x.batch, (kUnits + units - 1) / units)};
}

// Adds the later of `count` rows of n numbers to the first.
template <class A> void sum_rows(char* data, int64_t count, int64_t n) {
  A* sums = reinterpret_cast<A*>(data);
  for (int64_t row = 1; row < count; ++row)
    for (int64_t i = 0; i < n; ++i) sums[i] += sums[row * n + i];
}

// Returns the gradients of a weight (H, K), of its logits under a softmax, and of a bias (C; of size 0 if not wanted),
// in the dtype of the sums.
std::pair<Tensor, Tensor> lightweight_grad_weight(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                  const OptionalTensor& mask, int64_t layout, const Ints& pads,
                                                  int64_t dilation, bool softmax, bool bias, bool flush) {
  const char* op = "lightweight_grad_weight";
  const LightweightKernels& k = kernels_of(lightweight_tables(), element_of(op, x.dtype()));
  const Axes axes = check_layout(op, layout);
  const Sequences input = check_input(op, axes, x.size());
  const LightweightCall c = check_call(op, axes, input, x.dtype(), weight, {pads, dilation, kZeros});
  check_grad(op, grad_y, c.y);
  if (grad_y.dtype() != x.dtype()) fail(op, "grad_y must have the input's dtype", std::to_string(grad_y.dtype()));
  check_mask(op, mask, input);
  const LightweightGeometry& g = c.g;
  const int64_t weights = c.heads * g.kernel, biases = bias ? g.channels : 0, row = weights + biases;
  const int32_t dtype = accumulator_dtype(x.dtype());
  std::pair<Tensor, Tensor> grads{new_tensor(op, weight.size(), dtype), new_tensor(op, {biases}, dtype)};
  const Contiguous x_used(op, x), grad_used(op, grad_y), mask_used(op, mask);
  const GradWeightSplit split = split_grad_weight(c);
  const int64_t rows = std::max<int64_t>(split.batch_splits, 1), heads_per_unit = split.heads_per_unit;
  const Buffer partial_sums(op, "the partial sums", rows * row, c.sum_bytes);
  std::memset(partial_sums.data(), 0, size_t(rows * row * c.sum_bytes));
  if (x.numel()) {
    const int64_t macs = input.batch * g.outputs * heads_per_unit * g.group * g.kernel / split.batch_splits;
    const Work work{split.units * split.batch_splits, grain_of(macs), k.scratch_bytes(g), flush};
    for_each_part(op, work, [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t u = begin; u < end; ++u) {
        const int64_t s = u / split.units, h0 = u % split.units * heads_per_unit,
                      h1 = std::min(h0 + heads_per_unit, c.heads);
        const int64_t first = s * input.batch / split.batch_splits, last = (s + 1) * input.batch / split.batch_splits;
        char* sums = partial_sums.data() + s * row * c.sum_bytes;
        k.grad_weight(g, h0 * g.group, h1 * g.group, last - first, address(*x_used, first * g.x_sample),
                      address(*grad_used, first * g.y_sample), mask_of(*mask_used, first), sums,
                      bias ? sums + weights * c.sum_bytes : nullptr, scratch);
      }
    });
  }
  (c.sum_bytes == 8 ? sum_rows<double> : sum_rows<float>)(partial_sums.data(), rows, row);
  if (softmax) {
    const Buffer w = effective_weights(op, k, c, weight, true, false);
    k.softmax_gradient(c.heads, g.kernel, w.data(), partial_sums.data());
  }
  std::memcpy(grads.first.data(), partial_sums.data(), size_t(weights * c.sum_bytes));
  if (bias) std::memcpy(grads.second.data(), partial_sums.data() + weights * c.sum_bytes, size_t(biases * c.sum_bytes));
  return grads;
}

const Register<lightweight> kLightweight(
    "lightweight(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, int layout, SymInt[] pads, int dilation, int "
    "mode, bool softmax, int activation, bool flush) -> Tensor");
const Register<lightweight_grad_input> kGradInput(
    "lightweight_grad_input(Tensor grad_y, Tensor weight, Tensor? mask, SymInt[] length, int layout, SymInt[] pads, "
    "int dilation, bool softmax, bool flush) -> Tensor");
const Register<lightweight_grad_weight> kGradWeight(
    "lightweight_grad_weight(Tensor grad_y, Tensor x, Tensor weight, Tensor? mask, int layout, SymInt[] pads, int "
    "dilation, bool softmax, bool bias, bool flush) -> (Tensor, Tensor)");

}  // namespace
}  // namespace omniconv
