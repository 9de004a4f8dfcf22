// The kernel tables of the level in force, by the dispatch of the library.
#pragma once
#include "kernels/causal.h"
#include "kernels/depthwise.h"
#include "kernels/dynamic.h"
#include "kernels/gemm.h"
#include "kernels/lightweight.h"
#include "kernels/pack_weights.h"
#include "kernels/sum.h"
#include "ops/isa.h"

namespace omniconv {

#if defined(__x86_64__)
#define PORTABLE_TABLE(Tables, name)                        \
  namespace isa_base { extern const Tables name; }          \
  namespace isa_avx2 { extern const Tables name; }          \
  namespace isa_avx512 { extern const Tables name; }        \
  inline const Tables& name##_tables() {                    \
    if (isa() == kAvx512) return isa_avx512::name;          \
    return isa() == kAvx2 ? isa_avx2::name : isa_base::name; \
  }
#else
#define PORTABLE_TABLE(Tables, name)               \
  namespace isa_base { extern const Tables name; } \
  inline const Tables& name##_tables() { return isa_base::name; }
#endif

PORTABLE_TABLE(NchwTables, depthwise_nchw)
PORTABLE_TABLE(NchwGradTables, depthwise_nchw_grad)
PORTABLE_TABLE(NhwcTables, depthwise_nhwc)
PORTABLE_TABLE(NaiveTables, depthwise_naive)
PORTABLE_TABLE(CausalTables, causal)
PORTABLE_TABLE(LightweightTables, lightweight)
PORTABLE_TABLE(DynamicTables, dynamic)
PORTABLE_TABLE(DynamicGradTables, dynamic_grad)
PORTABLE_TABLE(GemmTables, gemm)
PORTABLE_TABLE(PackTables, pack_weights)
PORTABLE_TABLE(SumTables, sum)

}  // namespace omniconv
