// Dynamic convolution: checks, layout, threads and registration. The arithmetic is in kernels/dynamic.kernel.cpp.
#include "kernels/dynamic.h"

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/sequence.h"
#include "ops/thread.h"

namespace omniconv {

KERNEL_TABLE(DynamicTables, dynamic)
KERNEL_TABLE(DynamicGradTables, dynamic_grad)

namespace {

// The settings that all ops of the family take.
struct DynamicSettings {
  const Ints& pads;
  int64_t dilation, mode;
  bool softmax;
  const Tensor& seed;
  int64_t dropped;
};

// One call: what all heads of all samples share.
struct DynamicCall {
  Sequences x, y;
  int64_t heads;
  DynamicGeometry g;

  int64_t macs_of(int64_t positions) const { return positions * g.heads * g.group * g.kernel; }
  int64_t x_offset(int64_t n, int64_t h) const { return n * x.sample + h * g.group * x.channel; }
  int64_t y_offset(int64_t n, int64_t h) const { return n * y.sample + h * g.group * y.channel; }
  int64_t kernel_offset(int64_t n, int64_t h) const { return (n * heads + h) * g.kernel * g.positions; }
};

// Sets that `dropped` of 2^32 weights are dropped, as the seed says.
void set_dropout(const char* op, DynamicGeometry& g, const Tensor& seed, int64_t dropped) {
  constexpr int64_t kAll = int64_t(1) << 32;
  if (dropped < 0 || dropped > kAll) fail(op, "dropped must be at least 0 and at most 2^32", std::to_string(dropped));
  if (dropped && (!seed || seed.numel() != 1 || seed.dtype() != kInt64))
    fail(op, "seed must be one int64", seed ? text(seed.size()) : "none");
  if (!dropped) return;
  g.seed = uint64_t(*static_cast<const int64_t*>(seed.data()));
  g.dropped = uint32_t(dropped);  // all: 0, and nothing is kept by its scale
  g.scale = dropped == kAll ? 0.0 : double(kAll) / double(kAll - dropped);
}

// Returns the call of an input and its kernels (N, H, K, Out or 1).
DynamicCall check_call(const char* op, const Axes& axes, const Sequences& x, const Tensor& kernels,
                       const DynamicSettings& s) {
  if (kernels.dim() != 4 || kernels.size(0) != x.batch)
    fail(op, "kernels must be (N, H, K, Out) for an input " + text(x.size), text(kernels.size()));
  const int64_t heads = kernels.size(1), taps = kernels.size(2), positions = kernels.size(3);
  const Mode mode = check_mode(op, s.mode);
  const int64_t outputs = check_window(op, x, SequenceWindow{"kernels", heads, taps, s.pads, s.dilation, mode});
  if (positions != 1 && positions != outputs)
    fail(op, "kernels must have " + std::to_string(outputs) + " positions, or 1", text(kernels.size()));
  const Sequences y(axes, x.batch, x.channels, outputs);
  DynamicGeometry g{};
  g.length = x.length;
  g.outputs = outputs;
  g.group = x.channels / heads;
  // channels side by side are taken 16 at a time, as many heads as that may be
  g.heads = axes.channel == 2 ? std::min(heads, std::max<int64_t>(1, 16 / g.group)) : 1;
  g.kernel = taps;
  g.dilation = s.dilation;
  g.before = s.pads[0];
  g.x_step = x.step;
  g.x_channel = x.channel;
  g.y_step = y.step;
  g.y_channel = y.channel;
  g.positions = positions;
  g.softmax = s.softmax;
  g.scale = 1;
  g.mode = mode;
  g.activation = kNone;
  set_dropout(op, g, s.seed, s.dropped);
  return {x, y, heads, g};
}

void check_kernels_dtype(const char* op, const Tensor& kernels, const Tensor& x) {
  if (kernels.dtype() != x.dtype()) fail(op, "kernels must have the input's dtype", std::to_string(kernels.dtype()));
}

void check_grad_y(const char* op, const Tensor& grad_y, const DynamicCall& c, const Tensor& kernels) {
  check_grad(op, grad_y, c.y);
  if (grad_y.dtype() != kernels.dtype())
    fail(op, "grad_y must have the dtype of kernels", std::to_string(grad_y.dtype()));
}

// Positions [first, last) of the heads that a kernel makes at once, from head h of sample n.
struct Chunk {
  DynamicGeometry g;
  int64_t n, h, first, last;
};

// Returns the positions of a unit of work: enough that neighbouring tiles, which read some positions twice, are mostly
// one thread's.
int64_t chunk_length(const DynamicCall& c, int64_t positions) {
  return std::min(positions, std::max<int64_t>(512, 4 * c.g.dilation * (c.g.kernel - 1)));
}

// Calls f(chunk, scratch) for all heads and samples, chunk by chunk of so many positions.
template <class F>
void for_each_chunk(const char* op, const DynamicCall& c, int64_t positions, int64_t length, size_t scratch_bytes,
                    bool flush, const F& f) {
  const int64_t chunks = (positions + length - 1) / length, head_groups = (c.heads + c.g.heads - 1) / c.g.heads;
  const int64_t units = head_groups * chunks;
  const bool heads_first = c.x.channel == 1;  // heads of a chunk follow each other where their channels do
  const Work work{c.x.batch * units, grain_of(c.macs_of(length)), scratch_bytes, flush};
  for_each_part(op, work, [&](int64_t begin, int64_t end, void* scratch) {
    Chunk chunk{c.g, 0, 0, 0, 0};
    for (int64_t u = begin; u < end; ++u) {
      const int64_t unit = u % units, i = heads_first ? unit / head_groups : unit % chunks;
      chunk.n = u / units;
      chunk.h = (heads_first ? unit % head_groups : unit / chunks) * c.g.heads;
      chunk.first = i * length;
      chunk.last = std::min(chunk.first + length, positions);
      chunk.g.heads = std::min(c.g.heads, c.heads - chunk.h);
      chunk.g.row = uint64_t(chunk.n * c.heads + chunk.h) * c.g.kernel;
      f(chunk, scratch);
    }
  });
}

Tensor dynamic(const Tensor& x, const Tensor& kernels, const OptionalTensor& bias, const OptionalTensor& mask,
               int64_t layout, const Ints& pads, int64_t dilation, int64_t mode, bool softmax,
               const OptionalTensor& seed, int64_t dropped, int64_t activation, bool flush) {
  const char* op = "dynamic";
  const DynamicKernels& k = kernels_of(dynamic_tables(), element_of(op, x.dtype()));
  const Axes axes = check_layout(op, layout);
  const Sequences input = check_input(op, axes, x.size());
  DynamicCall c = check_call(op, axes, input, kernels, {pads, dilation, mode, softmax, seed, dropped});
  check_kernels_dtype(op, kernels, x);
  if (!is_bias(bias, input.channels, x.dtype()))
    fail(op, "bias must be (C,) of the input's dtype, or that of its sums", text(bias.size()));
  check_mask(op, mask, input);
  c.g.activation = check_activation(op, activation, x.dtype());
  const Contiguous x_used(op, x), kernels_used(op, kernels), mask_used(op, mask);
  Tensor y = new_tensor(op, c.y.size, x.dtype());
  if (!y.numel()) return y;
  const Buffer packed = pack_bias(op, bias);
  const int64_t head_bytes = c.g.group * element_size(accumulator_dtype(x.dtype())), outputs = c.g.outputs;
  const size_t scratch_bytes = k.forward_bytes(c.g);
  for_each_chunk(
      op, c, outputs, chunk_length(c, outputs), scratch_bytes, flush, [&](const Chunk& chunk, void* scratch) {
        const int64_t n = chunk.n, h = chunk.h;
        k.forward(chunk.g, chunk.first, chunk.last, address(*x_used, c.x_offset(n, h)),
                  address(*kernels_used, c.kernel_offset(n, h)), bias ? packed.data() + h * head_bytes : nullptr,
                  mask_of(*mask_used, n), address(y, c.y_offset(n, h)), scratch);
      });
  return y;
}

// Returns the gradient of an input of `length` positions, 0 where the mask is set.
Tensor dynamic_grad_input(const Tensor& grad_y, const Tensor& kernels, const OptionalTensor& mask, const Ints& length,
                          int64_t layout, const Ints& pads, int64_t dilation, bool softmax, const OptionalTensor& seed,
                          int64_t dropped, bool flush) {
  const char* op = "dynamic_grad_input";
  const DynamicGradKernels& k = kernels_of(dynamic_grad_tables(), element_of(op, grad_y.dtype()));
  const Axes axes = check_layout(op, layout);
  const Sequences input = check_input_of_grad(op, axes, grad_y.size(), length);
  const DynamicCall c = check_call(op, axes, input, kernels, {pads, dilation, kZeros, softmax, seed, dropped});
  check_grad_y(op, grad_y, c, kernels);
  check_mask(op, mask, input);
  const Contiguous grad_used(op, grad_y), kernels_used(op, kernels), mask_used(op, mask);
  Tensor grad_x = new_tensor(op, input.size, grad_y.dtype());
  if (!grad_x.numel()) return grad_x;
  const size_t scratch_bytes = k.grad_input_bytes(c.g);
  for_each_chunk(op, c, c.g.length, chunk_length(c, c.g.length), scratch_bytes, flush,
                 [&](const Chunk& chunk, void* scratch) {
                   const int64_t n = chunk.n, h = chunk.h;
                   k.grad_input(chunk.g, chunk.first, chunk.last, address(*grad_used, c.y_offset(n, h)),
                                address(*kernels_used, c.kernel_offset(n, h)), mask_of(*mask_used, n),
                                address(grad_x, c.x_offset(n, h)), scratch);
                 });
  return grad_x;
}

// Returns the gradient of what the weights are made from.
Tensor dynamic_grad_kernels(const Tensor& grad_y, const Tensor& x, const Tensor& kernels, const OptionalTensor& mask,
                            int64_t layout, const Ints& pads, int64_t dilation, bool softmax,
                            const OptionalTensor& seed, int64_t dropped, bool flush) {
  const char* op = "dynamic_grad_kernels";
  const DynamicGradKernels& k = kernels_of(dynamic_grad_tables(), element_of(op, x.dtype()));
  const Axes axes = check_layout(op, layout);
  const Sequences input = check_input(op, axes, x.size());
  const DynamicCall c = check_call(op, axes, input, kernels, {pads, dilation, kZeros, softmax, seed, dropped});
  check_kernels_dtype(op, kernels, x);
  check_grad_y(op, grad_y, c, kernels);
  check_mask(op, mask, input);
  const Contiguous grad_used(op, grad_y), x_used(op, x), kernels_used(op, kernels), mask_used(op, mask);
  Tensor grad_kernels = new_tensor(op, kernels.size(), kernels.dtype());
  if (!grad_kernels.numel()) return grad_kernels;
  const int64_t outputs = c.g.outputs, chunk_positions = c.g.positions == 1 ? outputs : chunk_length(c, outputs);
  const size_t scratch_bytes = k.grad_kernels_bytes(c.g);
  for_each_chunk(op, c, outputs, chunk_positions, scratch_bytes, flush, [&](const Chunk& chunk, void* scratch) {
    const int64_t n = chunk.n, h = chunk.h;
    k.grad_kernels(chunk.g, chunk.first, chunk.last, address(*grad_used, c.y_offset(n, h)),
                   address(*x_used, c.x_offset(n, h)), address(*kernels_used, c.kernel_offset(n, h)),
                   mask_of(*mask_used, n), address(grad_kernels, c.kernel_offset(n, h)), scratch);
  });
  return grad_kernels;
}

// Returns by what the weights (N, H, K, Out) of a call are multiplied when some are dropped, in the dtype of the sums.
Tensor dynamic_dropout_scale(const Tensor& kernels, const Tensor& seed, int64_t dropped) {
  const char* op = "dynamic_dropout_scale";
  if (kernels.dim() != 4) fail(op, "kernels must be (N, H, K, Out)", text(kernels.size()));
  const DynamicKernels& k = kernels_of(dynamic_tables(), element_of(op, kernels.dtype()));
  DynamicGeometry g{};
  g.scale = 1;
  g.kernel = kernels.size(2);
  g.positions = kernels.size(3);
  set_dropout(op, g, seed, dropped);
  const int32_t dtype = accumulator_dtype(kernels.dtype());
  Tensor scales = new_tensor(op, kernels.size(), dtype);
  const int64_t n = scales.numel();
  if (dtype == kFloat64) std::fill_n(static_cast<double*>(scales.data()), n, 1.0);
  else std::fill_n(static_cast<float*>(scales.data()), n, 1.0f);
  for (int64_t head = 0; n && head < kernels.size(0) * kernels.size(1); ++head, g.row += g.kernel)
    k.apply_dropout(g, address(scales, head * g.kernel * g.positions));
  return scales;
}

const Register<dynamic_dropout_scale> kDropoutScale(
    "dynamic_dropout_scale(Tensor kernels, Tensor seed, int dropped) -> Tensor");
const Register<dynamic> kDynamic(
    "dynamic(Tensor x, Tensor kernels, Tensor? bias, Tensor? mask, int layout, SymInt[] pads, int dilation, int "
    "mode, bool softmax, Tensor? seed, int dropped, int activation, bool flush) -> Tensor");
const Register<dynamic_grad_input> kGradInput(
    "dynamic_grad_input(Tensor grad_y, Tensor kernels, Tensor? mask, SymInt[] length, int layout, SymInt[] pads, "
    "int dilation, bool softmax, Tensor? seed, int dropped, bool flush) -> Tensor");
const Register<dynamic_grad_kernels> kGradKernels(
    "dynamic_grad_kernels(Tensor grad_y, Tensor x, Tensor kernels, Tensor? mask, int layout, SymInt[] pads, int "
    "dilation, bool softmax, Tensor? seed, int dropped, bool flush) -> Tensor");

}  // namespace
}  // namespace omniconv
