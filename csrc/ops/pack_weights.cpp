// Weights as the kernels take them.
#include "kernels/pack_weights.h"

#include "ops/isa.h"
#include "ops/operand.h"

namespace omniconv {

KERNEL_TABLE(PackTables, pack_weights)

void pack_weights(const WeightMatrix& weights, Packing packing, bool reversed, void* packed) {
  const PackKernels& k = kernels_of(pack_weights_tables(), element_of("pack_weights", weights.dtype));
  const PackKernel pack = packing == Packing::row_major ? k.widened : k.transposed;
  pack(weights.data, packed, weights.rows, weights.columns, reversed);
}

}  // namespace omniconv
