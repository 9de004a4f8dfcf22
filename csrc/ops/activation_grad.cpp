// The gradient through an activation: checks, threads and registration. The arithmetic is in kernels/activation_grad.kernel.cpp.
#include "kernels/activation_grad.h"

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

namespace isa_base { extern const ActivationGradTables activation_grad; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const ActivationGradTables activation_grad; }
namespace isa_avx512 { extern const ActivationGradTables activation_grad; }
#endif

namespace {

const ActivationGradTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::activation_grad;
  if (isa() == kAvx2) return isa_avx2::activation_grad;
#endif
  return isa_base::activation_grad;
}

// grad_y · f'(x); `value` is x or f(x), as kernels/activation_grad.h says. Channels-last where both are, else contiguous.
Tensor gradient(const Tensor& grad_y, const Tensor& value, int64_t activation, bool flush) {
  const char* op = "activation_grad";
  const ActivationGradKernel kernel = of_dtype(op, tables(), value.dtype());
  if (grad_y.size() != value.size() || grad_y.dtype() != value.dtype())
    fail(op, "grad_y must have the shape and dtype of the value " + text(value.size()), text(grad_y.size()));
  const bool curved = activation == kSilu || activation == kGelu || activation == kSigmoid;
  if (activation < kNone || activation > kSigmoid || (curved && value.dtype() == aoti_torch_dtype_float64()))
    fail(op, "the activation must be one that is fused", std::to_string(activation));
  const bool last = !dense(value, false) && dense(value, true) && dense(grad_y, true);
  const Contiguous gs(grad_y, last || dense(grad_y, false)), vs(value, last || dense(value, false));
  Tensor grad_x = Tensor::empty(value.size(), strides(value.size(), last), value.dtype());
  const int64_t n = value.numel(), bytes = element_size(value.dtype());
  const char *g = static_cast<const char*>((*gs).data()), *v = static_cast<const char*>((*vs).data());
  char* out = static_cast<char*>(grad_x.data());
  constexpr int64_t kPiece = 4096;  // elements: a unit of work
  parallel_for((n + kPiece - 1) / kPiece, grain(kPiece * 8), [&](int64_t first, int64_t end) {
    Flush guard(flush);
    const int64_t from = first * kPiece, count = std::min(end * kPiece, n) - from;
    kernel(g + from * bytes, v + from * bytes, count, Activation(activation), out + from * bytes);
  });
  return grad_x;
}

const Register registered[] = {
    {"activation_grad(Tensor grad_y, Tensor value, int activation, bool flush) -> Tensor", "activation_grad", &Boxed<gradient>::call},
};

}  // namespace
}  // namespace omniconv
