// The instruction sets that kernels were compiled for, and which of them run.
#pragma once
#include <cstdint>

namespace omniconv {

enum Isa : int64_t { kBase, kAvx2, kAvx512 };
constexpr int kIsas = 3;

// The best level that this machine has, capped by OMNICONV_ISA; kernel tests lower it through set_isa.
Isa isa();
Isa best_isa();

}  // namespace omniconv
