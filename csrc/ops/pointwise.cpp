// Pointwise convolution along one axis: checks, threads and registration. The arithmetic is in kernels/gemm.kernel.cpp.
#include <memory>

#include "kernels/gemm.h"
#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

namespace isa_base { extern const GemmTables gemm; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const GemmTables gemm; }
namespace isa_avx512 { extern const GemmTables gemm; }
#endif

namespace {

const GemmTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::gemm;
  if (isa() == kAvx2) return isa_avx2::gemm;
#endif
  return isa_base::gemm;
}

const GemmKernels& kernels_of(const char* op, int32_t dtype) { return of_dtype(op, tables(), dtype); }

// y (N, O, T), contiguous, of x (N, C, T) and weight (O, C, 1), both in any strides.
Tensor pointwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t activation, bool flush) {
  const char* op = "pointwise";
  constexpr int64_t kMost = int64_t(1) << 31;
  const GemmKernels& k = kernels_of(op, x.dtype());
  if (x.dim() != 3 || x.size(1) < 1 || x.size(1) > kMost) fail(op, "x must be (N, C, T) with at least one channel and at most 2^31", text(x.size()));
  if (weight.dim() != 3 || weight.size(0) < 1 || weight.size(1) != x.size(1) || weight.size(2) != 1 || weight.dtype() != x.dtype())
    fail(op, "weight must be (O, " + std::to_string(x.size(1)) + ", 1) of the dtype of x", text(weight.size()));
  if (bias && (bias.dim() != 1 || bias.size(0) != weight.size(0) || (bias.dtype() != x.dtype() && bias.dtype() != accumulator_dtype(x.dtype()))))
    fail(op, "bias must be (" + std::to_string(weight.size(0)) + ",) of the dtype of x or of its sums", text(bias.size()));
  const bool curved = activation == kSilu || activation == kGelu || activation == kSigmoid;
  if (activation < kNone || activation > kSigmoid || (curved && x.dtype() == aoti_torch_dtype_float64()))
    fail(op, "the activation must be one that is fused", std::to_string(activation));
  const Ints size{x.size(0), weight.size(0), x.size(2)};
  Tensor y = Tensor::empty(size, strides(size, false), x.dtype());
  if (!x.size(0) || !x.size(2)) return y;
  const Contiguous b(bias, !bias || dense(bias, false));
  std::unique_ptr<char[]> shift;
  if (bias) {
    shift.reset(new char[size_t(size[1]) * element_size(accumulator_dtype(x.dtype()))]);
    pack_weights(*b, shift.get(), size[1], 1, false, false);
  }
  const auto stride = [](const Tensor& t, int64_t axis) { return t.size(axis) == 1 ? 1 : t.stride()[axis]; };
  const Gemm g{size[0], x.size(1), size[1], size[2], x.data(), stride(x, 0), stride(x, 1), stride(x, 2),
               weight.data(), stride(weight, 0), stride(weight, 1), shift.get(), y.data(), Activation(activation)};
  const GemmPlan p = k.plan(g);
  parallel_for(p.units, grain(p.group * p.panel * g.channels / 8), [&](int64_t first, int64_t last) {
    Flush guard(flush);
    Scratch space(p.scratch_bytes);
    k.run(g, p, first, last, space.data());
  });
  return y;
}

const Register registered[] = {
    {"pointwise(Tensor x, Tensor weight, Tensor? bias, int activation, bool flush) -> Tensor", "pointwise", &Boxed<pointwise>::call},
};

}  // namespace
}  // namespace omniconv
