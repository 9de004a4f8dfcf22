// Dynamic convolution: checks, layout, threads and registration. The arithmetic is in kernels/dynamic.kernel.cpp.
#include "kernels/dynamic.h"

#include <memory>

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/sequence.h"
#include "ops/thread.h"

namespace omniconv {

namespace isa_base { extern const DynamicTables dynamic; extern const DynamicGradTables dynamic_grad; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const DynamicTables dynamic; extern const DynamicGradTables dynamic_grad; }
namespace isa_avx512 { extern const DynamicTables dynamic; extern const DynamicGradTables dynamic_grad; }
#endif

namespace {

const DynamicTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::dynamic;
  if (isa() == kAvx2) return isa_avx2::dynamic;
#endif
  return isa_base::dynamic;
}

const DynamicGradTables& grad_tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::dynamic_grad;
  if (isa() == kAvx2) return isa_avx2::dynamic_grad;
#endif
  return isa_base::dynamic_grad;
}

const DynamicKernels& kernels_of(const char* op, int32_t dtype) { return of_dtype(op, tables(), dtype); }
const DynamicGradKernels& grad_kernels_of(const char* op, int32_t dtype) { return of_dtype(op, grad_tables(), dtype); }

// One call: what all heads of all samples share.
struct Call {
  DynamicGeometry g;
  int64_t batch, heads, channels;
  int64_t x_sample, y_sample;  // elements between samples
  int64_t x_head, y_head;      // and between heads

  int64_t kernel_elements() const { return g.kernel * g.positions; }
};

// The call of an input of `size` and kernels (N, H, K, Out or 1); pads are (before, after).
Call settle(const char* op, const Axes& axes, const Ints& size, const Tensor& kernels, const Ints& pads, int64_t dilation, int64_t mode, bool softmax) {
  if (size.size() != 3) fail(op, "the input must have 3 axes", text(size));
  const int64_t batch = size[axes.batch], channels = size[axes.channel], length = size[axes.time];
  if (kernels.dim() != 4 || kernels.size(0) != batch) fail(op, "kernels must be (N, H, K, Out) for an input " + text(size), text(kernels.size()));
  const int64_t heads = kernels.size(1), K = kernels.size(2), outputs = outputs_of(op, axes, size, "kernels", heads, K, pads, dilation, mode);
  if (kernels.size(3) != 1 && kernels.size(3) != outputs) fail(op, "kernels must have " + std::to_string(outputs) + " positions, or 1", text(kernels.size()));
  Call c;
  c.batch = batch;
  c.heads = heads;
  c.channels = channels;
  c.g.length = length;
  c.g.outputs = outputs;
  c.g.group = channels / heads;
  // channels side by side are taken 16 at a time, as many heads as that may be
  c.g.heads = axes.channel == 2 ? std::min(heads, std::max<int64_t>(1, 16 / c.g.group)) : 1;
  c.g.kernel = K;
  c.g.dilation = dilation;
  c.g.before = pads[0];
  c.g.positions = kernels.size(3);
  c.g.softmax = softmax;
  c.g.seed = c.g.row = 0;
  c.g.dropped = 0;
  c.g.scale = 1;
  c.g.mode = Mode(mode);
  c.g.activation = kNone;
  const Ints x = strides(size, false), y = strides(in_layout(axes, batch, channels, outputs), false);
  c.g.x_step = x[axes.time];
  c.g.x_channel = x[axes.channel];
  c.g.y_step = y[axes.time];
  c.g.y_channel = y[axes.channel];
  c.x_sample = x[axes.batch];
  c.y_sample = y[axes.batch];
  c.x_head = c.g.group * c.g.x_channel;
  c.y_head = c.g.group * c.g.y_channel;
  return c;
}

// `dropped` of 2^32 weights are dropped, as the seed says.
void settle_drops(const char* op, DynamicGeometry& g, const Tensor& seed, int64_t dropped) {
  constexpr int64_t kAll = int64_t(1) << 32;
  if (dropped < 0 || dropped > kAll) fail(op, "dropped must be at least 0 and at most 2^32", std::to_string(dropped));
  if (dropped && (!seed || seed.numel() != 1 || seed.dtype() != aoti_torch_dtype_int64())) fail(op, "seed must be one int64", seed ? text(seed.size()) : "none");
  if (!dropped) return;
  g.seed = uint64_t(*static_cast<const int64_t*>(seed.data()));
  g.dropped = uint32_t(dropped);  // all: 0, and nothing is kept by its scale
  g.scale = dropped == kAll ? 0.0 : double(kAll) / double(kAll - dropped);
}

void check_grads(const char* op, const Call& c, const Axes& axes, const Tensor& grad_y, const Tensor& kernels) {
  check_grad(op, in_layout(axes, c.batch, c.channels, c.g.outputs), grad_y);
  if (grad_y.dtype() != kernels.dtype()) fail(op, "grad_y must have the dtype of kernels", std::to_string(grad_y.dtype()));
}

// The sizes of an input whose output's are known.
Ints with_length(const Axes& axes, const Ints& size, const Ints& length, const char* op) {
  if (size.size() != 3 || length.size() != 1) fail(op, "grad_y must have 3 axes, and length be one number", text(size) + " and " + text(length));
  Ints whole = size;
  whole[axes.time] = length[0];
  return whole;
}

char* at(const Tensor& t, int64_t elements) { return static_cast<char*>(t.data()) + elements * element_size(t.dtype()); }

// f(g, n, h, first, last, scratch) for stretches of `count` positions of every head, or of every bundle of them that begins with head h.
template <class F> void over(const Call& c, int64_t count, int64_t stretch, size_t scratch, bool flush, const F& f) {
  const int64_t stretches = (count + stretch - 1) / stretch, bundles = (c.heads + c.g.heads - 1) / c.g.heads, units = bundles * stretches;
  const bool side_by_side = c.g.x_channel == 1;  // heads of a stretch follow each other where their channels do
  parallel_for(c.batch * units, grain(stretch * c.g.heads * c.g.group * c.g.kernel), [&](int64_t from, int64_t to) {
    Flush guard(flush);
    Scratch space(scratch);
    DynamicGeometry g = c.g;
    for (int64_t u = from; u < to; ++u) {
      const int64_t n = u / units, rest = u % units;
      const int64_t b = side_by_side ? rest % bundles : rest / stretches, s = side_by_side ? rest / bundles : rest % stretches, h = b * c.g.heads;
      g.heads = std::min(c.g.heads, c.heads - h);
      g.row = uint64_t(n * c.heads + h) * g.kernel;
      f(g, n, h, s * stretch, std::min((s + 1) * stretch, count), space.data());
    }
  });
}

// Positions of a unit of work: enough that neighbouring tiles, which read some positions twice, are mostly one thread's.
int64_t stretch_of(const Call& c, int64_t count) { return std::min(count, std::max<int64_t>(512, 4 * c.g.dilation * (c.g.kernel - 1))); }

const uint8_t* mask_of(const Tensor& mask, const Call& c, int64_t n) { return mask ? static_cast<const uint8_t*>(mask.data()) + n * c.g.length : nullptr; }

Tensor dynamic(const Tensor& given, const Tensor& numbers, const OptionalTensor& bias, const OptionalTensor& mask, int64_t layout, const Ints& pads, int64_t dilation,
               int64_t mode, bool softmax, const OptionalTensor& seed, int64_t dropped, int64_t activation, bool flush) {
  const char* op = "dynamic";
  const DynamicKernels& k = kernels_of(op, given.dtype());
  const Axes axes = axes_of(op, layout);
  Call c = settle(op, axes, given.size(), numbers, pads, dilation, mode, softmax);
  if (numbers.dtype() != given.dtype()) fail(op, "kernels must have the input's dtype", std::to_string(numbers.dtype()));
  if (bias && (bias.dim() != 1 || bias.size(0) != c.channels || (bias.dtype() != given.dtype() && bias.dtype() != accumulator_dtype(given.dtype()))))
    fail(op, "bias must be (C,) of the input's dtype, or that of its sums", text(bias.size()));
  check_mask(op, mask, c.batch, c.g.length);
  settle_drops(op, c.g, seed, dropped);
  const bool curved = activation == kSilu || activation == kGelu || activation == kSigmoid;
  if (activation < kNone || activation > kSigmoid || (curved && given.dtype() == aoti_torch_dtype_float64()))
    fail(op, "the activation must be one that is fused", std::to_string(activation));
  c.g.activation = Activation(activation);
  const Contiguous xs(given, dense(given, false)), ks(numbers, dense(numbers, false)), ms(mask, !mask || dense(mask, false)), bs(bias, !bias || dense(bias, false));
  const Tensor &x = *xs, &kernels = *ks;
  const Ints size = in_layout(axes, c.batch, c.channels, c.g.outputs);
  Tensor y = Tensor::empty(size, strides(size, false), x.dtype());
  if (!y.numel()) return y;
  const int64_t sum = element_size(accumulator_dtype(x.dtype()));
  std::unique_ptr<char[]> shift(bias ? new char[size_t(c.channels) * sum] : nullptr);
  if (bias) pack_weights(*bs, shift.get(), c.channels, 1, false, false);
  const int64_t stretch = stretch_of(c, c.g.outputs);
  over(c, c.g.outputs, stretch, k.forward_bytes(c.g), flush, [&](const DynamicGeometry& g, int64_t n, int64_t h, int64_t first, int64_t last, void* scratch) {
    k.forward(g, first, last, at(x, n * c.x_sample + h * c.x_head), at(kernels, (n * c.heads + h) * c.kernel_elements()),
              bias ? shift.get() + h * c.g.group * sum : nullptr, mask_of(*ms, c, n), at(y, n * c.y_sample + h * c.y_head), scratch);
  });
  return y;
}

// The gradient of an input of `length` positions, 0 where the mask is set.
Tensor dynamic_grad_input(const Tensor& given, const Tensor& numbers, const OptionalTensor& mask, const Ints& length, int64_t layout, const Ints& pads, int64_t dilation,
                          bool softmax, const OptionalTensor& seed, int64_t dropped, bool flush) {
  const char* op = "dynamic_grad_input";
  const DynamicGradKernels& k = grad_kernels_of(op, given.dtype());
  const Axes axes = axes_of(op, layout);
  const Ints size = with_length(axes, given.size(), length, op);
  Call c = settle(op, axes, size, numbers, pads, dilation, kZeros, softmax);
  check_grads(op, c, axes, given, numbers);
  check_mask(op, mask, c.batch, c.g.length);
  settle_drops(op, c.g, seed, dropped);
  const Contiguous gs(given, dense(given, false)), ks(numbers, dense(numbers, false)), ms(mask, !mask || dense(mask, false));
  const Tensor &grad_y = *gs, &kernels = *ks;
  Tensor grad_x = Tensor::empty(size, strides(size, false), grad_y.dtype());
  if (!grad_x.numel()) return grad_x;
  const int64_t stretch = stretch_of(c, c.g.length);
  over(c, c.g.length, stretch, k.grad_input_bytes(c.g), flush, [&](const DynamicGeometry& g, int64_t n, int64_t h, int64_t first, int64_t last, void* scratch) {
    k.grad_input(g, first, last, at(grad_y, n * c.y_sample + h * c.y_head), at(kernels, (n * c.heads + h) * c.kernel_elements()), mask_of(*ms, c, n),
                 at(grad_x, n * c.x_sample + h * c.x_head), scratch);
  });
  return grad_x;
}

// The gradient of what the weights are made from.
Tensor dynamic_grad_kernels(const Tensor& grad, const Tensor& given, const Tensor& numbers, const OptionalTensor& mask, int64_t layout, const Ints& pads, int64_t dilation,
                            bool softmax, const OptionalTensor& seed, int64_t dropped, bool flush) {
  const char* op = "dynamic_grad_kernels";
  const DynamicGradKernels& k = grad_kernels_of(op, given.dtype());
  const Axes axes = axes_of(op, layout);
  Call c = settle(op, axes, given.size(), numbers, pads, dilation, kZeros, softmax);
  if (numbers.dtype() != given.dtype()) fail(op, "kernels must have the input's dtype", std::to_string(numbers.dtype()));
  check_grads(op, c, axes, grad, numbers);
  check_mask(op, mask, c.batch, c.g.length);
  settle_drops(op, c.g, seed, dropped);
  const Contiguous gs(grad, dense(grad, false)), xs(given, dense(given, false)), ks(numbers, dense(numbers, false)), ms(mask, !mask || dense(mask, false));
  const Tensor &grad_y = *gs, &x = *xs, &kernels = *ks;
  Tensor grad_kernels = Tensor::empty(numbers.size(), strides(numbers.size(), false), numbers.dtype());
  if (!grad_kernels.numel()) return grad_kernels;
  const int64_t stretch = c.g.positions == 1 ? c.g.outputs : stretch_of(c, c.g.outputs);
  over(c, c.g.outputs, stretch, k.grad_kernels_bytes(c.g), flush, [&](const DynamicGeometry& g, int64_t n, int64_t h, int64_t first, int64_t last, void* scratch) {
    const int64_t own = (n * c.heads + h) * c.kernel_elements();
    k.grad_kernels(g, first, last, at(grad_y, n * c.y_sample + h * c.y_head), at(x, n * c.x_sample + h * c.x_head), at(kernels, own), mask_of(*ms, c, n),
                   at(grad_kernels, own), scratch);
  });
  return grad_kernels;
}

// By what the weights (N, H, K, Out) of a call are multiplied when some are dropped, in the type of the sums.
Tensor dynamic_dropout_scale(const Tensor& kernels, const Tensor& seed, int64_t dropped) {
  const char* op = "dynamic_dropout_scale";
  if (kernels.dim() != 4) fail(op, "kernels must be (N, H, K, Out)", text(kernels.size()));
  const int32_t kept = accumulator_dtype(kernels.dtype());
  const DynamicKernels& k = kernels_of(op, kernels.dtype());
  DynamicGeometry g{};
  g.scale = 1;
  g.kernel = kernels.size(2);
  g.positions = kernels.size(3);
  settle_drops(op, g, seed, dropped);
  Tensor scales = Tensor::empty(kernels.size(), strides(kernels.size(), false), kept);
  const int64_t n = scales.numel();
  if (kept == aoti_torch_dtype_float64()) std::fill_n(static_cast<double*>(scales.data()), n, 1.0);
  else std::fill_n(static_cast<float*>(scales.data()), n, 1.0f);
  for (int64_t head = 0; n && head < kernels.size(0) * kernels.size(1); ++head, g.row += g.kernel) k.drop(g, at(scales, head * g.kernel * g.positions));
  return scales;
}

const Register registered[] = {
    {"dynamic_dropout_scale(Tensor kernels, Tensor seed, int dropped) -> Tensor", "dynamic_dropout_scale", &Boxed<dynamic_dropout_scale>::call},
    {"dynamic(Tensor x, Tensor kernels, Tensor? bias, Tensor? mask, int layout, SymInt[] pads, int dilation, int mode, bool softmax, Tensor? seed, int dropped, int activation, bool flush) -> Tensor",
     "dynamic", &Boxed<dynamic>::call},
    {"dynamic_grad_input(Tensor grad_y, Tensor kernels, Tensor? mask, SymInt[] length, int layout, SymInt[] pads, int dilation, bool softmax, Tensor? seed, int dropped, bool flush) -> Tensor",
     "dynamic_grad_input", &Boxed<dynamic_grad_input>::call},
    {"dynamic_grad_kernels(Tensor grad_y, Tensor x, Tensor kernels, Tensor? mask, int layout, SymInt[] pads, int dilation, bool softmax, Tensor? seed, int dropped, bool flush) -> Tensor",
     "dynamic_grad_kernels", &Boxed<dynamic_grad_kernels>::call},
};

}  // namespace
}  // namespace omniconv
