// The gradient through an activation, element by element.
#pragma once
#include <cstdint>

#include "kernels/activation.h"

namespace omniconv {

// grad_x = grad_y · f'(x) of n elements. `value` is x for silu, hardswish and gelu, and f(x) for relu, relu6 and
// sigmoid. Every element has the same bits wherever it stands. Doubles take only relu, relu6 and hardswish.
typedef void (*ActivationGradKernel)(const void* grad_y, const void* value, int64_t n, Activation activation,
                                     void* grad_x);

struct ActivationGradTables { ActivationGradKernel f32, f64, bf16, f16; };

}  // namespace omniconv
