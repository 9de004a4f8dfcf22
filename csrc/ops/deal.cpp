// Weights as the kernels take them.
#include "kernels/deal.h"

#include "ops/isa.h"
#include "ops/operand.h"

namespace omniconv {

namespace isa_base { extern const DealTables deal; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const DealTables deal; }
namespace isa_avx512 { extern const DealTables deal; }
#endif

namespace {

const DealTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::deal;
  if (isa() == kAvx2) return isa_avx2::deal;
#endif
  return isa_base::deal;
}

}  // namespace

void deal(const void* weights, int32_t dtype, void* out, int64_t outputs, int64_t taps, bool last, bool reversed) {
  const DealKernels& k = dtype == aoti_torch_dtype_float64()    ? tables().f64
                         : dtype == aoti_torch_dtype_float32()  ? tables().f32
                         : dtype == aoti_torch_dtype_bfloat16() ? tables().bf16
                                                                    : tables().f16;
  (last ? k.transposed : k.widened)(weights, out, outputs, taps, reversed);
}

}  // namespace omniconv
