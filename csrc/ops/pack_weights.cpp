// Weights as the kernels take them.
#include "kernels/pack_weights.h"

#include "ops/isa.h"
#include "ops/operand.h"

namespace omniconv {

namespace isa_base { extern const PackTables pack_weights; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const PackTables pack_weights; }
namespace isa_avx512 { extern const PackTables pack_weights; }
#endif

namespace {

const PackTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::pack_weights;
  if (isa() == kAvx2) return isa_avx2::pack_weights;
#endif
  return isa_base::pack_weights;
}

}  // namespace

void pack_weights(const void* weights, int32_t dtype, void* out, int64_t outputs, int64_t taps, bool last, bool reversed) {
  const PackKernels& k = dtype == aoti_torch_dtype_float64()    ? tables().f64
                         : dtype == aoti_torch_dtype_float32()  ? tables().f32
                         : dtype == aoti_torch_dtype_bfloat16() ? tables().bf16
                                                                    : tables().f16;
  (last ? k.transposed : k.widened)(weights, out, outputs, taps, reversed);
}

}  // namespace omniconv
