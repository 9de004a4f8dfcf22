// Depthwise convolution: checks, layout, threads and registration. The arithmetic is in kernels/depthwise_*.kernel.cpp.
#include "kernels/depthwise.h"

#include "kernels/sum.h"

#include <memory>

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

#define OMNICONV_DECLARE(level)                        \
  namespace level {                                    \
  extern const NchwTables depthwise_nchw;          \
  extern const NchwGradTables depthwise_nchw_grad; \
  extern const NhwcTables depthwise_nhwc;              \
  extern const NaiveTables depthwise_naive;        \
  extern const SumTables sum;                          \
  }
OMNICONV_DECLARE(isa_base)
#if defined(__x86_64__)
OMNICONV_DECLARE(isa_avx2)
OMNICONV_DECLARE(isa_avx512)
#endif

namespace {

struct Tables {
  const NchwTables& planes;
  const NchwGradTables& planes_grad;
  const NhwcTables& last;
  const NaiveTables& naive;
  const SumTables& sum;
};

Tables tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return {isa_avx512::depthwise_nchw, isa_avx512::depthwise_nchw_grad, isa_avx512::depthwise_nhwc, isa_avx512::depthwise_naive, isa_avx512::sum};
  if (isa() == kAvx2) return {isa_avx2::depthwise_nchw, isa_avx2::depthwise_nchw_grad, isa_avx2::depthwise_nhwc, isa_avx2::depthwise_naive, isa_avx2::sum};
#endif
  return {isa_base::depthwise_nchw, isa_base::depthwise_nchw_grad, isa_base::depthwise_nhwc, isa_base::depthwise_naive, isa_base::sum};
}

struct Type {
  const NchwKernels& planes;
  const NchwGradKernels& planes_grad;
  const NhwcKernels& last;
  NaiveKernel naive;
  SumKernel add_up;
  size_t element, sum;  // bytes
};

Type type_of(const char* op, int32_t dtype) {
  const Tables t = tables();
  if (dtype == aoti_torch_dtype_float32()) return {t.planes.f32, t.planes_grad.f32, t.last.f32, t.naive.f32, t.sum.f32, 4, 4};
  if (dtype == aoti_torch_dtype_float64()) return {t.planes.f64, t.planes_grad.f64, t.last.f64, t.naive.f64, t.sum.f64, 8, 8};
  if (dtype == aoti_torch_dtype_bfloat16()) return {t.planes.bf16, t.planes_grad.bf16, t.last.bf16, t.naive.bf16, t.sum.bf16, 2, 4};
  if (dtype == aoti_torch_dtype_float16()) return {t.planes.f16, t.planes_grad.f16, t.last.f16, t.naive.f16, t.sum.f16, 2, 4};
  fail(op, "the dtype must be float32, float64, bfloat16 or float16", "code " + std::to_string(dtype));
}

// The three axes of the kernels: (outer, row, column) is (1, 1, T), (H, 1, W) or (D, H, W).
int place(int64_t rank, int64_t axis) { return rank == 1 ? 2 : rank == 2 ? (axis == 0 ? 0 : 2) : int(axis); }

// Windows of a call; pads are (before, after) pairs, axis by axis.
DepthwiseGeometry geometry(const char* op, const Ints& in, const Ints& kernel, const Ints& stride, const Ints& pads, const Ints& dilation, int64_t mode) {
  const int64_t rank = int64_t(in.size());
  if (rank < 1 || rank > 3 || int64_t(kernel.size()) != rank || int64_t(stride.size()) != rank || int64_t(pads.size()) != 2 * rank || int64_t(dilation.size()) != rank)
    fail(op, "sizes, stride, pads and dilation must be of one rank from 1 to 3", text(in) + " " + text(kernel) + " " + text(stride) + " " + text(pads) + " " + text(dilation));
  if (mode < kZeros || mode > kCircular) fail(op, "the padding mode must be known", std::to_string(mode));
  DepthwiseGeometry g;
  for (int i = 0; i < 3; ++i) {
    g.in[i] = g.out[i] = g.kernel[i] = g.stride[i] = g.dilation[i] = g.spread[i] = 1;
    g.before[i] = 0;
  }
  g.multiplier = 1;
  g.ordered = false;
  g.mode = Mode(mode);
  g.activation = kNone;
  constexpr int64_t kMost = int64_t(1) << 31;
  for (int64_t axis = 0; axis < rank; ++axis) {
    const int i = place(rank, axis);
    const int64_t before = pads[2 * axis], after = pads[2 * axis + 1];
    const int64_t n = in[axis], k = kernel[axis], s = stride[axis], d = dilation[axis];
    if (n < 1 || k < 1 || s < 1 || d < 1 || before < 0 || after < 0 || n > kMost || k > kMost || s > kMost || d > kMost || before > kMost || after > kMost)
      fail(op, "sizes, kernel, stride and dilation must be at least 1 and pads at least 0", text({n, k, s, d, before, after}));
    const int64_t room = n + before + after - d * (k - 1) - 1;
    if (room < 0) fail(op, "the padded input must hold one window", text({n, before, after}) + " for kernel " + std::to_string(k) + " with dilation " + std::to_string(d));
    if (mode == kReflect && (before >= n || after >= n)) fail(op, "reflected pads must be below the size", text({n, before, after}));
    if (mode == kCircular && (before > n || after > n)) fail(op, "circular pads must be at most the size", text({n, before, after}));
    g.in[i] = n;
    g.kernel[i] = k;
    g.stride[i] = s;
    g.dilation[i] = d;
    g.before[i] = before;
    g.out[i] = room / s + 1;
  }
  return g;
}

Ints spatial(const Tensor& x) { return Ints(x.size().begin() + 2, x.size().end()); }

Ints out_size(const DepthwiseGeometry& g, int64_t rank) {
  Ints out;
  for (int64_t axis = 0; axis < rank; ++axis) out.push_back(g.out[place(rank, axis)]);
  return out;
}

int64_t volume(const int64_t* axes) { return axes[0] * axes[1] * axes[2]; }

void check_shapes(const char* op, const Tensor& x, const Tensor& weight) {
  if (x.dim() < 3 || x.dim() > 5) fail(op, "the input must have 3 to 5 axes", text(x.size()));
  if (weight.dim() != x.dim() || weight.size(1) != 1) fail(op, "weight must be (C·M, 1, K…)", text(weight.size()));
  if (x.size(1) < 1 || weight.size(0) < 1 || weight.size(0) % x.size(1)) fail(op, "weight must have a multiple of the input's channels", text(weight.size()));
  if (weight.dtype() != x.dtype() && weight.dtype() != accumulator_dtype(x.dtype())) fail(op, "weight must have the input's dtype, or that of its sums", std::to_string(weight.dtype()));
}

constexpr int64_t kSteepest = 64;  // stride whose input gradient is made: the time to set it up grows with its square
constexpr int64_t kLanes = 16;  // of the widest level: fewer channels than a vector go the contiguous way

// Whether a tensor takes the channels-last kernels; what is neither that nor contiguous is copied.
bool runs_last(const Tensor& x, int64_t multiplier) { return !dense(x, false) && dense(x, true) && multiplier == 1 && x.size(1) >= kLanes; }

// Whether all of n numbers of the type that sums are kept in are finite, by their exponents.
bool finite(const char* p, int64_t n, size_t sum) {
  if (sum == 8) {
    const double* d = reinterpret_cast<const double*>(p);
    double zero = 0;
    for (int64_t i = 0; i < n; ++i) zero += d[i] * 0;
    return zero == 0;
  }
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p + 4 * i, 4);
    most = std::max(most, bits & 0x7fffffffu);
  }
  return most < 0x7f800000u;
}

// y from x, geometry contiguous: weights as they are, or each channel's taps reversed (the adjoint).
void convolve(const char* op, const DepthwiseGeometry& g, const Tensor& x, const Tensor& weight, const Tensor& bias, bool last, bool reversed, bool flush, Tensor& y) {
  const Type type = type_of(op, x.dtype());
  const int64_t samples = x.size(0), channels = x.size(1), outputs = weight.size(0), taps = volume(g.kernel);
  const int64_t in = volume(g.in), out = volume(g.out), work = taps * out * g.multiplier;
  const bool as_they_are = !last && !reversed && weight.dtype() == accumulator_dtype(x.dtype());
  std::unique_ptr<char[]> packed(new char[size_t(outputs) * ((as_they_are ? 0 : taps) + 1) * type.sum]);
  const char* w = as_they_are ? static_cast<const char*>(weight.data()) : packed.get();
  char* b = packed.get() + (as_they_are ? 0 : size_t(outputs) * taps * type.sum);
  if (!as_they_are) pack_weights(weight, packed.get(), outputs, taps, last, reversed);
  if (bias) pack_weights(bias, b, outputs, 1, false, false);
  else b = nullptr;
  const char* xp = static_cast<const char*>(x.data());
  char* yp = static_cast<char*>(y.data());
  if (last) {
    // a sequence is one long row: it is shared out in pieces
    constexpr int64_t kPiece = 512;
    const int64_t rows = g.out[0] * g.out[1], pieces = rows > 1 ? 1 : std::max<int64_t>(1, g.out[2] / kPiece), units = rows * pieces;
    const size_t scratch = type.last.scratch_bytes(g);
    parallel_for(samples * units, grain(work * channels / units), [&](int64_t first, int64_t end) {
      Flush guard(flush);
      Scratch space(scratch);
      for (int64_t u = first; u < end;) {
        const int64_t n = u / units, from = u - n * units, until = std::min(end - n * units, units);
        const bool one = pieces > 1;  // then a unit is a piece of the one row
        type.last.forward(g, channels, one ? 0 : from, one ? 1 : until, one ? from * g.out[2] / pieces : 0, one ? until * g.out[2] / pieces : g.out[2],
                          xp + n * in * channels * type.element, w, b, yp + n * out * channels * type.element, space.data());
        u = n * units + until;
      }
    });
    return;
  }
  const size_t scratch = type.planes.scratch_bytes(g);
  const int64_t filters = g.multiplier * taps;
  const bool all_finite = finite(w, outputs * taps, type.sum);
  parallel_for(samples * channels, grain(work), [&](int64_t first, int64_t end) {
    Flush guard(flush);
    Scratch space(scratch);
    for (int64_t p = first; p < end;) {
      const int64_t c = p % channels, count = all_finite ? std::min(end - p, channels - c) : 1;
      const char *from = xp + p * in * type.element, *weights = w + c * filters * type.sum, *shift = b ? b + c * g.multiplier * type.sum : nullptr;
      char* to = yp + p * g.multiplier * out * type.element;
      if (all_finite || finite(weights, filters, type.sum)) type.planes.forward(g, count, from, weights, shift, to, space.data());
      else type.naive(g, from, weights, shift, to);
      p += count;
    }
  });
}

Tensor depthwise(const Tensor& given, const Tensor& weight, const OptionalTensor& bias, const Ints& stride, const Ints& pads, const Ints& dilation, int64_t mode, int64_t activation, bool ordered, bool flush) {
  const char* op = "depthwise";
  check_shapes(op, given, weight);
  type_of(op, given.dtype());
  if (bias && (bias.dim() != 1 || bias.size(0) != weight.size(0) || (bias.dtype() != given.dtype() && bias.dtype() != accumulator_dtype(given.dtype()))))
    fail(op, "bias must be (C·M,) of the input's dtype, or that of its sums", text(bias.size()));
  const bool curved = activation == kSilu || activation == kGelu || activation == kSigmoid;
  if (activation < kNone || activation > kSigmoid || (curved && given.dtype() == aoti_torch_dtype_float64()))
    fail(op, "the activation must be one that is fused", std::to_string(activation));
  DepthwiseGeometry g = geometry(op, spatial(given), spatial(weight), stride, pads, dilation, mode);
  g.multiplier = weight.size(0) / given.size(1);
  g.activation = Activation(activation);
  g.ordered = ordered;
  const bool last = runs_last(given, g.multiplier);
  const Contiguous contiguous(given, last || dense(given, false));
  const Tensor& x = *contiguous;
  Ints size = out_size(g, x.dim() - 2);
  size.insert(size.begin(), {x.size(0), weight.size(0)});
  Tensor y = Tensor::empty(size, strides(size, last), x.dtype());
  if (y.numel()) convolve(op, g, x, *Contiguous(weight, dense(weight, false)), *Contiguous(bias, !bias || dense(bias, false)), last, false, flush, y);
  return y;
}

// The gradient of an input of `size`: the adjoint, a convolution with stride 1 of grad_y spread by the stride.
Tensor depthwise_grad_input(const Tensor& given, const Tensor& weight, const Ints& size, const Ints& stride, const Ints& pads, const Ints& dilation, bool flush) {
  const char* op = "depthwise_grad_input";
  check_shapes(op, given, weight);
  type_of(op, given.dtype());
  if (weight.size(0) != given.size(1)) fail(op, "weight must have the channels of grad_y", text(weight.size()));
  const int64_t rank = given.dim() - 2;
  DepthwiseGeometry g = geometry(op, size, spatial(weight), stride, pads, dilation, kZeros);
  if (out_size(g, rank) != spatial(given)) fail(op, "grad_y must have the size of the output " + text(out_size(g, rank)), text(given.size()));
  for (int64_t s : stride)
    if (s > kSteepest) fail(op, "strides must be at most " + std::to_string(kSteepest), text(stride));
  for (int i = 0; i < 3; ++i) {
    std::swap(g.in[i], g.out[i]);
    g.spread[i] = g.stride[i];
    g.stride[i] = 1;
    g.before[i] = g.dilation[i] * (g.kernel[i] - 1) - g.before[i];
  }
  const bool last = runs_last(given, 1);
  const Contiguous contiguous(given, last || dense(given, false));
  const Tensor& grad_y = *contiguous;
  Ints whole = size;
  whole.insert(whole.begin(), {grad_y.size(0), grad_y.size(1)});
  Tensor grad_x = Tensor::empty(whole, strides(whole, last), grad_y.dtype());
  if (grad_x.numel()) convolve(op, g, grad_y, *Contiguous(weight, dense(weight, false)), Tensor(), last, true, flush, grad_x);
  return grad_x;
}

const char* at(const Tensor& t, const Type& type, int64_t elements) { return static_cast<const char*>(t.data()) + elements * int64_t(type.element); }

void gather_planes(const Type& type, const DepthwiseGeometry& g, const Tensor& x, const Tensor& grad_y, bool flush, char* wp, char* bp) {
  const int64_t samples = x.size(0), channels = x.size(1), in = volume(g.in), out = volume(g.out), taps = volume(g.kernel), M = g.multiplier;
  const size_t scratch = type.planes_grad.scratch_bytes(g);
  parallel_for(channels, grain(samples * out * taps * M), [&](int64_t from, int64_t to) {
    Flush guard(flush);
    Scratch space(scratch);
    for (int64_t c = from; c < to; ++c)
      for (int64_t n = 0; n < samples; ++n) {
        const char* grads = at(grad_y, type, (n * channels + c) * M * out);
        type.planes_grad.grad_weight(g, at(x, type, (n * channels + c) * in), grads, wp + c * M * taps * type.sum, space.data());
        for (int64_t m = 0; bp && m < M; ++m) type.add_up(grads + m * out * type.element, out, bp + (c * M + m) * type.sum);
      }
  });
}

void gather_last(const Type& type, const DepthwiseGeometry& g, const Tensor& x, const Tensor& grad_y, bool flush, char* wp, char* bp) {
  const int64_t samples = x.size(0), channels = x.size(1), in = volume(g.in), out = volume(g.out), taps = volume(g.kernel);
  // whole cache lines of channels a thread; the last vector goes over some channels twice, so it is made apart
  const int64_t line = int64_t(64 / type.element), whole = channels / kLanes * kLanes, rest = channels - whole;
  const size_t scratch = type.last.scratch_bytes(g), row = size_t(channels) * type.sum;
  std::vector<char> sums((taps + 1) * row), apart(rest ? sums.size() : 0);  // (taps, C), then the bias
  auto over = [&](int64_t c0, int64_t c1, std::vector<char>& to) {
    Flush guard(flush);
    Scratch space(scratch);
    for (int64_t n = 0; n < samples; ++n)
      type.last.grad_weight(g, channels, c0, c1, at(x, type, n * in * channels), at(grad_y, type, n * out * channels), to.data(),
                            bp ? to.data() + taps * row : nullptr, space.data());
  };
  parallel_for((whole + line - 1) / line, grain(samples * out * taps * line),
               [&](int64_t from, int64_t to) { over(from * line, std::min(to * line, whole), sums); });
  if (rest) {
    over(channels - kLanes, channels, apart);
    for (int64_t t = 0; t <= taps; ++t) std::memcpy(sums.data() + t * row + whole * type.sum, apart.data() + t * row + whole * type.sum, rest * type.sum);
  }
  pack_weights(sums.data(), accumulator_dtype(x.dtype()), wp, taps, channels, true, false);
  if (bp) std::memcpy(bp, sums.data() + taps * row, row);
}

// The gradients of a weight (C·M, 1, K…) and of a bias (C·M; none wanted: of size 0), in the type that sums are kept in.
std::pair<Tensor, Tensor> depthwise_grad_weight(const Tensor& grad_y, const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& pads, const Ints& dilation,
                                                bool bias, bool flush) {
  const char* op = "depthwise_grad_weight";
  if (x.dim() < 3 || x.dim() > 5 || grad_y.dim() != x.dim() || x.size(1) < 1 || grad_y.size(1) % x.size(1) || grad_y.size(0) != x.size(0) || grad_y.dtype() != x.dtype())
    fail(op, "grad_y must be (N, C·M, Out…) for an input (N, C, In…)", text(grad_y.size()) + " and " + text(x.size()));
  DepthwiseGeometry g = geometry(op, spatial(x), kernel, stride, pads, dilation, kZeros);
  g.multiplier = grad_y.size(1) / x.size(1);
  if (out_size(g, x.dim() - 2) != spatial(grad_y)) fail(op, "grad_y must have the size of the output " + text(out_size(g, x.dim() - 2)), text(grad_y.size()));
  const bool last = runs_last(x, g.multiplier) && runs_last(grad_y, g.multiplier);
  const Contiguous xs(x, last || dense(x, false)), gs(grad_y, last || dense(grad_y, false));
  const Type type = type_of(op, x.dtype());
  const int64_t outputs = grad_y.size(1), taps = volume(g.kernel);
  const int32_t kept = accumulator_dtype(x.dtype());
  Ints size = kernel;
  size.insert(size.begin(), {outputs, 1});
  std::pair<Tensor, Tensor> grads{Tensor::empty(size, strides(size, false), kept), Tensor::empty({bias ? outputs : 0}, {1}, kept)};
  char *wp = static_cast<char*>(grads.first.data()), *bp = bias ? static_cast<char*>(grads.second.data()) : nullptr;
  std::memset(wp, 0, size_t(outputs) * taps * type.sum);
  if (bias) std::memset(bp, 0, size_t(outputs) * type.sum);
  if (x.numel()) (last ? gather_last : gather_planes)(type, g, *xs, *gs, flush, wp, bp);
  return grads;
}

const Register registered[] = {
    {"depthwise(Tensor x, Tensor weight, Tensor? bias, int[] stride, SymInt[] pads, int[] dilation, int mode, int activation, bool ordered, bool flush) -> Tensor",
     "depthwise", &Boxed<depthwise>::call},
    {"depthwise_grad_input(Tensor grad_y, Tensor weight, SymInt[] size, int[] stride, SymInt[] pads, int[] dilation, bool flush) -> Tensor",
     "depthwise_grad_input", &Boxed<depthwise_grad_input>::call},
    {"depthwise_grad_weight(Tensor grad_y, Tensor x, SymInt[] kernel, int[] stride, SymInt[] pads, int[] dilation, bool bias, bool flush) -> (Tensor, Tensor)",
     "depthwise_grad_weight", &Boxed<depthwise_grad_weight>::call},
};

}  // namespace
}  // namespace omniconv
