// Depthwise convolution: checks, layout, threads and registration.
#include "kernels/depthwise.h"

#include "kernels/sum.h"
#include "ops/checks.h"
#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

KERNEL_TABLE(NchwTables, depthwise_nchw)
KERNEL_TABLE(NchwGradTables, depthwise_nchw_grad)
KERNEL_TABLE(NhwcTables, depthwise_nhwc)
KERNEL_TABLE(NaiveTables, depthwise_naive)
KERNEL_TABLE(SumTables, sum)

namespace {

// Returns which of the three axes of the kernels an axis is: (outer, row, column) is (1, 1, T), (H, 1, W) or (D, H, W).
int kernel_axis(int64_t rank, int64_t axis) { return rank == 1 ? 2 : rank == 2 ? (axis == 0 ? 0 : 2) : int(axis); }

// The windows of a call, axis by axis; pads are (before, after) pairs.
struct Windows {
  const Ints& kernel;
  const Ints& stride;
  const Ints& pads;
  const Ints& dilation;
};

DepthwiseGeometry check_windows(const char* op, const Ints& in, const Windows& w, Mode mode) {
  const int64_t rank = int64_t(in.size());
  const auto has_rank = [&](const Ints& values, int64_t per_axis) { return int64_t(values.size()) == per_axis * rank; };
  if (rank < 1 || rank > 3 || !has_rank(w.kernel, 1) || !has_rank(w.stride, 1) || !has_rank(w.pads, 2) ||
      !has_rank(w.dilation, 1))
    fail(op, "sizes, stride, pads and dilation must be of one rank from 1 to 3",
         text(in) + " " + text(w.kernel) + " " + text(w.stride) + " " + text(w.pads) + " " + text(w.dilation));
  DepthwiseGeometry g;
  for (int i = 0; i < 3; ++i) {
    g.in[i] = g.out[i] = g.kernel[i] = g.stride[i] = g.dilation[i] = g.spread[i] = 1;
    g.before[i] = 0;
  }
  g.multiplier = 1;
  g.ordered = false;
  g.mode = mode;
  g.activation = kNone;
  for (int64_t axis = 0; axis < rank; ++axis) {
    const int i = kernel_axis(rank, axis);
    const int64_t before = w.pads[2 * axis], after = w.pads[2 * axis + 1];
    const int64_t n = in[axis], k = w.kernel[axis], s = w.stride[axis], d = w.dilation[axis];
    if (std::min({n, k, s, d}) < 1 || std::min(before, after) < 0 || std::max({n, k, s, d, before, after}) > kMaxSize)
      fail(op, "sizes, kernel, stride and dilation must be at least 1 and pads at least 0",
           text({n, k, s, d, before, after}));
    g.in[i] = n;
    g.kernel[i] = k;
    g.stride[i] = s;
    g.dilation[i] = d;
    g.before[i] = before;
    g.out[i] = (check_window(op, {n, before, after, k, d}, mode) - 1) / s + 1;
  }
  return g;
}

Ints spatial_size(const Tensor& x) { return Ints(x.size().begin() + 2, x.size().end()); }

Ints output_size(const DepthwiseGeometry& g, int64_t rank) {
  Ints out;
  for (int64_t axis = 0; axis < rank; ++axis) out.push_back(g.out[kernel_axis(rank, axis)]);
  return out;
}

int64_t volume(const int64_t* axes) { return axes[0] * axes[1] * axes[2]; }

void check_grad_y(const char* op, const Tensor& grad_y, const DepthwiseGeometry& g) {
  const Ints out = output_size(g, grad_y.dim() - 2);
  if (spatial_size(grad_y) != out)
    fail(op, "grad_y must have the size of the output " + text(out), text(grad_y.size()));
}

void check_shapes(const char* op, const Tensor& x, const Tensor& weight) {
  if (x.dim() < 3 || x.dim() > 5) fail(op, "the input must have 3 to 5 axes", text(x.size()));
  if (weight.dim() != x.dim() || weight.size(1) != 1) fail(op, "weight must be (C·M, 1, K…)", text(weight.size()));
  if (x.size(1) < 1 || weight.size(0) < 1 || weight.size(0) % x.size(1))
    fail(op, "weight must have a multiple of the input's channels", text(weight.size()));
  if (!is_weight_dtype(weight.dtype(), x.dtype()))
    fail(op, "weight must have the input's dtype, or that of its sums", std::to_string(weight.dtype()));
}

// Returns whether a tensor takes the channels-last kernels, which need a vector of channels.
bool takes_nhwc(const Tensor& x, int64_t multiplier) {
  return multiplier == 1 && x.size(1) >= kMaxLanes && !is_contiguous(x) &&
         is_contiguous(x, MemoryFormat::channels_last);
}

MemoryFormat format_of(bool nhwc) { return nhwc ? MemoryFormat::channels_last : MemoryFormat::contiguous; }

// What both forms of a convolution are given: samples of x (channels, in…), packed weights and biases (null without).
struct DepthwiseOperands {
  int64_t samples, channels;
  Element element;
  int64_t element_bytes, sum_bytes;
  const char* x;
  const char* weight;
  const char* bias;
  char* y;
};

void convolve_nhwc(const char* op, const DepthwiseGeometry& g, const DepthwiseOperands& o, bool flush) {
  const NhwcKernels& k = kernels_of(depthwise_nhwc_tables(), o.element);
  constexpr int64_t kColumns = 512;  // a sequence is one long row: it is shared out in chunks of columns
  const int64_t rows = g.out[0] * g.out[1], chunks = rows > 1 ? 1 : std::max<int64_t>(1, g.out[2] / kColumns);
  const int64_t units = rows * chunks, in = volume(g.in), out = volume(g.out);
  const Work work{o.samples * units, grain_of(volume(g.kernel) * out * o.channels / units), k.scratch_bytes(g), flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) {
    for (int64_t u = first; u < last;) {
      const int64_t n = u / units, from = u - n * units, until = std::min(last - n * units, units);
      const bool chunked = chunks > 1;  // then a unit is a chunk of the one row, else a row
      k.forward(g, o.channels, chunked ? 0 : from, chunked ? 1 : until, chunked ? from * g.out[2] / chunks : 0,
                chunked ? until * g.out[2] / chunks : g.out[2], o.x + n * in * o.channels * o.element_bytes, o.weight,
                o.bias, o.y + n * out * o.channels * o.element_bytes, scratch);
      u = n * units + until;
    }
  });
}

void convolve_nchw(const char* op, const DepthwiseGeometry& g, const DepthwiseOperands& o, bool flush) {
  const NchwKernels& k = kernels_of(depthwise_nchw_tables(), o.element);
  const NaiveKernel naive = kernels_of(depthwise_naive_tables(), o.element);
  const int64_t in = volume(g.in), out = volume(g.out) * g.multiplier,
                weights = volume(g.kernel) * g.multiplier;  // of a channel
  const bool finite = all_finite(o.weight, o.channels * weights, o.sum_bytes);
  const Work work{o.samples * o.channels, grain_of(volume(g.kernel) * out), k.scratch_bytes(g), flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) {
    for (int64_t plane = first; plane < last;) {
      const int64_t c = plane % o.channels, count = finite ? std::min(last - plane, o.channels - c) : 1;
      const char* x = o.x + plane * in * o.element_bytes;
      const char* weight = o.weight + c * weights * o.sum_bytes;
      const char* bias = o.bias ? o.bias + c * g.multiplier * o.sum_bytes : nullptr;
      char* y = o.y + plane * out * o.element_bytes;
      if (finite || all_finite(weight, weights, o.sum_bytes)) k.forward(g, count, x, weight, bias, y, scratch);
      else naive(g, x, weight, bias, y);
      plane += count;
    }
  });
}

// Computes y from x, both in the format that the kernels take; with each channel's taps reversed, the adjoint.
void convolve(const char* op, const DepthwiseGeometry& g, const Tensor& x, const Tensor& weight, const Tensor& bias,
              bool nhwc, bool reversed, bool flush, const Tensor& y) {
  const int64_t outputs = weight.size(0), taps = volume(g.kernel),
                sum_bytes = element_size(accumulator_dtype(x.dtype()));
  const Contiguous weight_used(op, weight);
  Buffer packed;
  const bool needs_packing = nhwc || reversed || weight.dtype() != accumulator_dtype(x.dtype());
  if (needs_packing) {
    packed = Buffer(op, "the packed weight", outputs * taps, sum_bytes);
    pack_weights({weight_used->data(), weight.dtype(), outputs, taps},
                 nhwc ? Packing::column_major : Packing::row_major, reversed, packed.data());
  }
  const Buffer packed_bias = pack_bias(op, bias);
  const DepthwiseOperands operands{x.size(0),
                                   x.size(1),
                                   element_of(op, x.dtype()),
                                   element_size(x.dtype()),
                                   sum_bytes,
                                   address(x),
                                   needs_packing ? packed.data() : address(*weight_used),
                                   packed_bias.data(),
                                   address(y)};
  (nhwc ? convolve_nhwc : convolve_nchw)(op, g, operands, flush);
}

Tensor depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride,
                 const Ints& pads, const Ints& dilation, int64_t mode, int64_t activation, bool ordered, bool flush) {
  const char* op = "depthwise";
  check_shapes(op, x, weight);
  element_of(op, x.dtype());
  if (!is_bias(bias, weight.size(0), x.dtype()))
    fail(op, "bias must be (C·M,) of the input's dtype, or that of its sums", text(bias.size()));
  const Activation last = check_activation(op, activation, x.dtype());
  DepthwiseGeometry g =
      check_windows(op, spatial_size(x), {spatial_size(weight), stride, pads, dilation}, check_mode(op, mode));
  g.multiplier = weight.size(0) / x.size(1);
  g.activation = last;
  g.ordered = ordered;
  const bool nhwc = takes_nhwc(x, g.multiplier);
  const Contiguous x_used(op, x, format_of(nhwc));
  Ints size = output_size(g, x.dim() - 2);
  size.insert(size.begin(), {x.size(0), weight.size(0)});
  Tensor y = new_tensor(op, size, x.dtype(), format_of(nhwc));
  if (y.numel()) convolve(op, g, *x_used, weight, bias, nhwc, false, flush, y);
  return y;
}

// Returns the gradient of an input of that size.
Tensor depthwise_grad_input(const Tensor& grad_y, const Tensor& weight, const Ints& size, const Ints& stride,
                            const Ints& pads, const Ints& dilation, bool flush) {
  const char* op = "depthwise_grad_input";
  constexpr int64_t kMaxStride = 64;  // the time to set a gradient up grows with the square of the stride
  check_shapes(op, grad_y, weight);
  element_of(op, grad_y.dtype());
  if (weight.size(0) != grad_y.size(1)) fail(op, "weight must have the channels of grad_y", text(weight.size()));
  DepthwiseGeometry g = check_windows(op, size, {spatial_size(weight), stride, pads, dilation}, kZeros);
  check_grad_y(op, grad_y, g);
  for (int64_t s : stride)
    if (s > kMaxStride) fail(op, "strides must be at most " + std::to_string(kMaxStride), text(stride));
  for (int i = 0; i < 3; ++i) {
    std::swap(g.in[i], g.out[i]);
    g.spread[i] = g.stride[i];
    g.stride[i] = 1;
    g.before[i] = g.dilation[i] * (g.kernel[i] - 1) - g.before[i];
  }
  const bool nhwc = takes_nhwc(grad_y, 1);
  const Contiguous grad_used(op, grad_y, format_of(nhwc));
  Ints grad_x_size = size;
  grad_x_size.insert(grad_x_size.begin(), {grad_y.size(0), grad_y.size(1)});
  Tensor grad_x = new_tensor(op, grad_x_size, grad_y.dtype(), format_of(nhwc));
  if (grad_x.numel()) convolve(op, g, *grad_used, weight, Tensor(), nhwc, true, flush, grad_x);
  return grad_x;
}

// Gradients that are added to, in the dtype of the sums.
struct WeightGrads {
  char* weight;  // (C·M, taps)
  char* bias;    // (C·M), or null
};

void grad_weight_nchw(const char* op, const DepthwiseGeometry& g, const Tensor& x, const Tensor& grad_y, bool flush,
                      const WeightGrads& grads) {
  const Element element = element_of(op, x.dtype());
  const NchwGradKernels& k = kernels_of(depthwise_nchw_grad_tables(), element);
  const SumKernel add_sum = kernels_of(sum_tables(), element);
  const int64_t samples = x.size(0), channels = x.size(1), M = g.multiplier,
                sum_bytes = element_size(accumulator_dtype(x.dtype()));
  const int64_t in = volume(g.in), out = volume(g.out), taps = volume(g.kernel);
  const Work work{channels, grain_of(samples * out * taps * M), k.scratch_bytes(g), flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) {
    for (int64_t c = first; c < last; ++c)
      for (int64_t n = 0; n < samples; ++n) {
        const int64_t plane = n * channels + c;
        k.grad_weight(g, address(x, plane * in), address(grad_y, plane * M * out),
                      grads.weight + c * M * taps * sum_bytes, scratch);
        for (int64_t m = 0; grads.bias && m < M; ++m)
          add_sum(address(grad_y, (plane * M + m) * out), out, grads.bias + (c * M + m) * sum_bytes);
      }
  });
}

void grad_weight_nhwc(const char* op, const DepthwiseGeometry& g, const Tensor& x, const Tensor& grad_y, bool flush,
                      const WeightGrads& grads) {
  const NhwcKernels& k = kernels_of(depthwise_nhwc_tables(), element_of(op, x.dtype()));
  const int32_t dtype = accumulator_dtype(x.dtype());
  const int64_t samples = x.size(0), channels = x.size(1), sum_bytes = element_size(dtype);
  const int64_t in = volume(g.in), out = volume(g.out), taps = volume(g.kernel);
  // Whole cache lines of channels a thread. The last vector, if it is not a whole one, begins earlier: it sums some
  // channels a second time, so it has sums of its own.
  const int64_t line = 64 / element_size(x.dtype()), whole = channels / kMaxLanes * kMaxLanes, rest = channels - whole;
  const int64_t row = channels * sum_bytes, sums_bytes = (taps + 1) * row;  // (taps, C), then the bias
  const Buffer sums(op, "the sums", (taps + 1) * channels, sum_bytes);
  std::memset(sums.data(), 0, size_t(sums_bytes));
  const size_t scratch_bytes = k.scratch_bytes(g);
  const auto add = [&](int64_t c0, int64_t c1, char* to, void* scratch) {
    for (int64_t n = 0; n < samples; ++n)
      k.grad_weight(g, channels, c0, c1, address(x, n * in * channels), address(grad_y, n * out * channels), to,
                    grads.bias ? to + taps * row : nullptr, scratch);
  };
  const Work work{(whole + line - 1) / line, grain_of(samples * out * taps * line), scratch_bytes, flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) {
    add(first * line, std::min(last * line, whole), sums.data(), scratch);
  });
  if (rest) {
    const Buffer last_sums(op, "the last sums", (taps + 1) * channels, sum_bytes);
    std::memset(last_sums.data(), 0, size_t(sums_bytes));
    for_each_part(op, {1, 1, scratch_bytes, flush}, [&](int64_t, int64_t, void* scratch) {
      add(channels - kMaxLanes, channels, last_sums.data(), scratch);
    });
    for (int64_t t = 0; t <= taps; ++t) {
      const int64_t offset = t * row + whole * sum_bytes;
      std::memcpy(sums.data() + offset, last_sums.data() + offset, size_t(rest * sum_bytes));
    }
  }
  pack_weights({sums.data(), dtype, taps, channels}, Packing::column_major, false, grads.weight);
  if (grads.bias) std::memcpy(grads.bias, sums.data() + taps * row, size_t(row));
}

// Returns the gradients of a weight (C·M, 1, K…) and of a bias (C·M; of size 0 if not wanted), in the dtype of the
// sums.
std::pair<Tensor, Tensor> depthwise_grad_weight(const Tensor& grad_y, const Tensor& x, const Ints& kernel,
                                                const Ints& stride, const Ints& pads, const Ints& dilation, bool bias,
                                                bool flush) {
  const char* op = "depthwise_grad_weight";
  if (x.dim() < 3 || x.dim() > 5 || grad_y.dim() != x.dim() || x.size(1) < 1 || grad_y.size(1) % x.size(1) ||
      grad_y.size(0) != x.size(0) || grad_y.dtype() != x.dtype())
    fail(op, "grad_y must be (N, C·M, Out…) for an input (N, C, In…)", text(grad_y.size()) + " and " + text(x.size()));
  DepthwiseGeometry g = check_windows(op, spatial_size(x), {kernel, stride, pads, dilation}, kZeros);
  g.multiplier = grad_y.size(1) / x.size(1);
  check_grad_y(op, grad_y, g);
  element_of(op, x.dtype());
  const bool nhwc = takes_nhwc(x, g.multiplier) && takes_nhwc(grad_y, g.multiplier);
  const Contiguous x_used(op, x, format_of(nhwc)), grad_used(op, grad_y, format_of(nhwc));
  const int64_t outputs = grad_y.size(1);
  const int32_t dtype = accumulator_dtype(x.dtype());
  Ints size = kernel;
  size.insert(size.begin(), {outputs, 1});
  std::pair<Tensor, Tensor> results{new_tensor(op, size, dtype), new_tensor(op, {bias ? outputs : 0}, dtype)};
  const WeightGrads grads{address(results.first), bias ? address(results.second) : nullptr};
  std::memset(grads.weight, 0, size_t(outputs * volume(g.kernel) * element_size(dtype)));
  if (bias) std::memset(grads.bias, 0, size_t(outputs * element_size(dtype)));
  if (x.numel()) (nhwc ? grad_weight_nhwc : grad_weight_nchw)(op, g, *x_used, *grad_used, flush, grads);
  return results;
}

const Register<depthwise> kDepthwise(
    "depthwise(Tensor x, Tensor weight, Tensor? bias, int[] stride, SymInt[] pads, int[] dilation, int mode, int "
    "activation, bool ordered, bool flush) -> Tensor");
const Register<depthwise_grad_input> kGradInput(
    "depthwise_grad_input(Tensor grad_y, Tensor weight, SymInt[] size, int[] stride, SymInt[] pads, int[] dilation, "
    "bool flush) -> Tensor");
const Register<depthwise_grad_weight> kGradWeight(
    "depthwise_grad_weight(Tensor grad_y, Tensor x, SymInt[] kernel, int[] stride, SymInt[] pads, int[] dilation, "
    "bool bias, bool flush) -> (Tensor, Tensor)");

}  // namespace
}  // namespace omniconv
