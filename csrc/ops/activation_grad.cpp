// The gradient through an activation: checks, threads and registration.
#include "kernels/activation_grad.h"

#include "ops/checks.h"
#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

KERNEL_TABLE(ActivationGradTables, activation_grad)

namespace {

// Returns grad_y · f'(x); `value` is x or f(x), as the kernel's contract says. Channels-last where both are, else
// contiguous.
Tensor gradient(const Tensor& grad_y, const Tensor& value, int64_t activation, bool flush) {
  const char* op = "activation_grad";
  const ActivationGradKernel kernel = kernels_of(activation_grad_tables(), element_of(op, value.dtype()));
  if (grad_y.size() != value.size() || grad_y.dtype() != value.dtype())
    fail(op, "grad_y must have the shape and dtype of the value " + text(value.size()), text(grad_y.size()));
  const Activation f = check_activation(op, activation, value.dtype());
  const bool nhwc = !is_contiguous(value) && is_contiguous(value, MemoryFormat::channels_last) &&
                    is_contiguous(grad_y, MemoryFormat::channels_last);
  const MemoryFormat format = nhwc ? MemoryFormat::channels_last : MemoryFormat::contiguous;
  const Contiguous grad_used(op, grad_y, format), value_used(op, value, format);
  Tensor grad_x = new_tensor(op, value.size(), value.dtype(), format);
  constexpr int64_t kElements = 4096;  // a unit of work
  const int64_t n = value.numel();
  const Work work{(n + kElements - 1) / kElements, grain_of(kElements * 8), 0, flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void*) {
    const int64_t begin = first * kElements, count = std::min(last * kElements, n) - begin;
    kernel(address(*grad_used, begin), address(*value_used, begin), count, f, address(grad_x, begin));
  });
  return grad_x;
}

const Register<gradient> kGradient(
    "activation_grad(Tensor grad_y, Tensor value, int activation, bool flush) -> Tensor");

}  // namespace
}  // namespace omniconv
