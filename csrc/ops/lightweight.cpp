// Lightweight convolution: checks, layout, threads and registration. The arithmetic is in kernels/lightweight.kernel.cpp.
#include "kernels/lightweight.h"

#include <memory>

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/sequence.h"
#include "ops/thread.h"

namespace omniconv {

namespace isa_base { extern const LightweightTables lightweight; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const LightweightTables lightweight; }
namespace isa_avx512 { extern const LightweightTables lightweight; }
#endif

namespace {

const LightweightTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::lightweight;
  if (isa() == kAvx2) return isa_avx2::lightweight;
#endif
  return isa_base::lightweight;
}

const LightweightKernels& kernels_of(const char* op, int32_t dtype) { return of_dtype(op, tables(), dtype); }

bool is_whole(const Tensor& t) { return !t || dense(t, false); }

// One call: what its kernels are given, and what lies around that.
struct Call {
  LightweightGeometry g;
  int64_t batch, heads;
  bool time_first;  // positions of a channel lie side by side

  int64_t sum_size(int32_t dtype) const { return element_size(accumulator_dtype(dtype)); }
};

// The call of an input of `size` and a weight (H, K); pads are (before, after).
Call settle(const char* op, const Axes& axes, const Ints& size, const Tensor& weight, int32_t dtype, const Ints& pads, int64_t dilation, int64_t mode) {
  if (size.size() != 3) fail(op, "the input must have 3 axes", text(size));
  const int64_t batch = size[axes.batch], channels = size[axes.channel], length = size[axes.time];
  if (weight.dim() != 2) fail(op, "weight must be (H, K)", text(weight.size()));
  if (weight.dtype() != dtype && weight.dtype() != accumulator_dtype(dtype)) fail(op, "weight must have the input's dtype, or that of its sums", std::to_string(weight.dtype()));
  const int64_t heads = weight.size(0), K = weight.size(1), outputs = outputs_of(op, axes, size, "weight", heads, K, pads, dilation, mode);
  const Ints x = strides(size, false), y = strides(in_layout(axes, batch, channels, outputs), false);
  return {{length, outputs, channels, channels / heads, K, dilation, pads[0], x[axes.time], x[axes.channel], x[axes.batch], y[axes.time], y[axes.channel], y[axes.batch],
           Mode(mode), kNone, false},
          batch, heads, axes.time == 2};
}

// The weights as they are applied, in the type of sums; their taps reversed where asked.
std::unique_ptr<char[]> applied(const LightweightKernels& k, const Tensor& weight, const Call& c, bool softmax, bool reversed) {
  const Contiguous contiguous(weight, is_whole(weight));
  std::unique_ptr<char[]> w(new char[size_t(c.heads) * c.g.kernel * c.sum_size(weight.dtype())]);
  // a softmax does not mind where its taps stand
  pack_weights(*contiguous, w.get(), c.heads, c.g.kernel, false, reversed);
  if (softmax) k.softmax(c.heads, c.g.kernel, w.get());
  return w;
}

bool is_finite(const char* weight, int64_t count, int64_t size) {
  double sum = 0;  // of zeros, or NaN
  for (int64_t i = 0; i < count; ++i) sum += 0 * (size == 8 ? reinterpret_cast<const double*>(weight)[i] : double(reinterpret_cast<const float*>(weight)[i]));
  return sum == 0;
}

// y of x, geometry contiguous; outputs where `zeroed` is set are 0.
void convolve(const LightweightKernels& k, Call c, const Tensor& x, const char* weight, const char* bias, const Tensor& mask, const Tensor& zeroed, bool flush, Tensor& y) {
  LightweightGeometry& g = c.g;
  g.finite = is_finite(weight, c.heads * g.kernel, c.sum_size(x.dtype()));
  // What is one thread's at a time; the last block has up to twice as many channels, so that it fills vectors where there are enough. Rows of
  // channels are as long as possible.
  const int64_t kChannels = c.time_first ? 64 : 512, kOutputs = c.time_first ? 512 : 128;
  const int64_t blocks = std::max<int64_t>(1, g.channels / kChannels), pieces = std::max<int64_t>(1, g.outputs / std::max(kOutputs, 4 * g.dilation * (g.kernel - 1)));
  const int64_t element = element_size(x.dtype()), units = blocks * pieces;
  const char* xp = static_cast<const char*>(x.data());
  char* yp = static_cast<char*>(y.data());
  const uint8_t* hidden = mask ? static_cast<const uint8_t*>(mask.data()) : nullptr;
  const uint8_t* nothing = zeroed ? static_cast<const uint8_t*>(zeroed.data()) : nullptr;
  const size_t scratch = k.scratch_bytes(g);
  parallel_for(c.batch * units, grain(g.outputs / pieces * (g.channels / blocks) * g.kernel), [&](int64_t from, int64_t to) {
    Flush guard(flush);
    Scratch space(scratch);
    for (int64_t u = from; u < to; ++u) {
      const int64_t n = u / units, rest = u % units, b = c.time_first ? rest / pieces : rest % blocks, p = c.time_first ? rest % pieces : rest / blocks;
      k.forward(g, b * kChannels, b == blocks - 1 ? g.channels : (b + 1) * kChannels, p * g.outputs / pieces, (p + 1) * g.outputs / pieces, xp + n * g.x_sample * element,
                weight, bias, hidden ? hidden + n * g.length : nullptr, nothing ? nothing + n * g.outputs : nullptr, yp + n * g.y_sample * element, space.data());
    }
  });
}

Tensor lightweight(const Tensor& given, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask, int64_t layout, const Ints& pads, int64_t dilation,
                   int64_t mode, bool softmax, int64_t activation, bool flush) {
  const char* op = "lightweight";
  const LightweightKernels& k = kernels_of(op, given.dtype());
  const Axes axes = axes_of(op, layout);
  Call c = settle(op, axes, given.size(), weight, given.dtype(), pads, dilation, mode);
  if (bias && (bias.dim() != 1 || bias.size(0) != c.g.channels || (bias.dtype() != given.dtype() && bias.dtype() != accumulator_dtype(given.dtype()))))
    fail(op, "bias must be (C,) of the input's dtype, or that of its sums", text(bias.size()));
  check_mask(op, mask, c.batch, c.g.length);
  const bool curved = activation == kSilu || activation == kGelu || activation == kSigmoid;
  if (activation < kNone || activation > kSigmoid || (curved && given.dtype() == aoti_torch_dtype_float64()))
    fail(op, "the activation must be one that is fused", std::to_string(activation));
  c.g.activation = Activation(activation);
  const Ints size = in_layout(axes, c.batch, c.g.channels, c.g.outputs);
  Tensor y = Tensor::empty(size, strides(size, false), given.dtype());
  if (!y.numel()) return y;
  const Contiguous x(given, is_whole(given)), masked(mask, is_whole(mask));
  const std::unique_ptr<char[]> w = applied(k, weight, c, softmax, false);
  std::unique_ptr<char[]> shift(bias ? new char[size_t(c.g.channels) * c.sum_size(given.dtype())] : nullptr);
  if (bias) pack_weights(*Contiguous(bias, is_whole(bias)), shift.get(), c.g.channels, 1, false, false);
  convolve(k, c, *x, w.get(), shift.get(), *masked, Tensor(), flush, y);
  return y;
}

// The gradient of an input of `length` positions, 0 where the mask is set: the adjoint, the same with reversed taps.
Tensor lightweight_grad_input(const Tensor& given, const Tensor& weight, const OptionalTensor& mask, const Ints& length, int64_t layout, const Ints& pads, int64_t dilation,
                              bool softmax, bool flush) {
  const char* op = "lightweight_grad_input";
  const LightweightKernels& k = kernels_of(op, given.dtype());
  const Axes axes = axes_of(op, layout);
  if (given.dim() != 3 || length.size() != 1) fail(op, "grad_y must have 3 axes, and length be one number", text(given.size()) + " and " + text(length));
  Ints size = given.size();
  size[axes.time] = length[0];
  Call c = settle(op, axes, size, weight, given.dtype(), pads, dilation, kZeros);
  check_grad(op, in_layout(axes, c.batch, c.g.channels, c.g.outputs), given);
  check_mask(op, mask, c.batch, c.g.length);
  Tensor grad_x = Tensor::empty(size, strides(size, false), given.dtype());
  if (!grad_x.numel()) return grad_x;
  const Contiguous grad_y(given, is_whole(given)), masked(mask, is_whole(mask));
  LightweightGeometry& g = c.g;
  std::swap(g.length, g.outputs);
  std::swap(g.x_step, g.y_step);
  std::swap(g.x_channel, g.y_channel);
  std::swap(g.x_sample, g.y_sample);
  g.before = g.dilation * (g.kernel - 1) - g.before;
  convolve(k, c, *grad_y, applied(k, weight, c, softmax, true).get(), nullptr, Tensor(), *masked, flush, grad_x);
  return grad_x;
}

// The gradients of a weight (H, K), of its logits under a softmax, and of a bias (C; none wanted: of size 0), in the type that sums are kept in.
std::pair<Tensor, Tensor> lightweight_grad_weight(const Tensor& grad, const Tensor& given, const Tensor& weight, const OptionalTensor& mask, int64_t layout, const Ints& pads,
                                                  int64_t dilation, bool softmax, bool bias, bool flush) {
  const char* op = "lightweight_grad_weight";
  const LightweightKernels& k = kernels_of(op, given.dtype());
  const Axes axes = axes_of(op, layout);
  const Call c = settle(op, axes, given.size(), weight, given.dtype(), pads, dilation, kZeros);
  check_grad(op, in_layout(axes, c.batch, c.g.channels, c.g.outputs), grad);
  if (grad.dtype() != given.dtype()) fail(op, "grad_y must have the input's dtype", std::to_string(grad.dtype()));
  check_mask(op, mask, c.batch, c.g.length);
  const LightweightGeometry& g = c.g;
  const int32_t kept = accumulator_dtype(given.dtype());
  const int64_t sum = element_size(kept), element = element_size(given.dtype()), weights = c.heads * g.kernel, biases = bias ? g.channels : 0;
  std::pair<Tensor, Tensor> grads{Tensor::empty(weight.size(), strides(weight.size(), false), kept), Tensor::empty({biases}, {1}, kept)};
  const Contiguous x(given, is_whole(given)), grad_y(grad, is_whole(grad)), masked(mask, is_whole(mask));
  // whole heads a unit, enough of them to fill vectors, and where these are few a share of the samples: none of it depends on the threads
  constexpr int64_t kLanes = 16, kShares = 8;
  const int64_t row_of_channels = c.time_first ? 0 : 8 * kLanes;  // what is copied at once of channels-last
  int64_t joined = 1;
  while (joined < c.heads && (joined * g.group < row_of_channels || (joined * g.group % kLanes && joined * g.group < 4 * kLanes))) ++joined;
  const int64_t units = (c.heads + joined - 1) / joined, shares = units >= kShares ? 1 : std::min(c.batch, (kShares + units - 1) / units);
  const int64_t row = (weights + biases) * sum;
  std::vector<char> parts(size_t(std::max<int64_t>(shares, 1)) * row, 0);
  const size_t scratch = k.scratch_bytes(g);
  if (given.numel())
    parallel_for(units * shares, grain(c.batch * g.outputs * joined * g.group * g.kernel / shares), [&](int64_t from, int64_t to) {
      Flush guard(flush);
      Scratch space(scratch);
      for (int64_t u = from; u < to; ++u) {
        const int64_t s = u / units, h = u % units * joined, first = s * c.batch / shares, last = (s + 1) * c.batch / shares;
        char* part = parts.data() + s * row;
        k.grad_weight(g, h * g.group, std::min(h + joined, c.heads) * g.group, last - first, static_cast<const char*>((*x).data()) + first * g.x_sample * element,
                      static_cast<const char*>((*grad_y).data()) + first * g.y_sample * element,
                      *masked ? static_cast<const uint8_t*>((*masked).data()) + first * g.length : nullptr, part, bias ? part + weights * sum : nullptr, space.data());
      }
    });
  for (int64_t s = 1; s < shares; ++s)
    for (int64_t i = 0; i < weights + biases; ++i) {
      if (sum == 8) reinterpret_cast<double*>(parts.data())[i] += reinterpret_cast<double*>(parts.data() + s * row)[i];
      else reinterpret_cast<float*>(parts.data())[i] += reinterpret_cast<float*>(parts.data() + s * row)[i];
    }
  if (softmax) k.softmax_gradient(c.heads, g.kernel, applied(k, weight, c, true, false).get(), parts.data());
  std::memcpy(grads.first.data(), parts.data(), weights * sum);
  if (bias) std::memcpy(grads.second.data(), parts.data() + weights * sum, biases * sum);
  return grads;
}

const Register registered[] = {
    {"lightweight(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, int layout, SymInt[] pads, int dilation, int mode, bool softmax, int activation, bool flush) -> Tensor",
     "lightweight", &Boxed<lightweight>::call},
    {"lightweight_grad_input(Tensor grad_y, Tensor weight, Tensor? mask, SymInt[] length, int layout, SymInt[] pads, int dilation, bool softmax, bool flush) -> Tensor",
     "lightweight_grad_input", &Boxed<lightweight_grad_input>::call},
    {"lightweight_grad_weight(Tensor grad_y, Tensor x, Tensor weight, Tensor? mask, int layout, SymInt[] pads, int dilation, bool softmax, bool bias, bool flush) -> (Tensor, Tensor)",
     "lightweight_grad_weight", &Boxed<lightweight_grad_weight>::call},
};

}  // namespace
}  // namespace omniconv
