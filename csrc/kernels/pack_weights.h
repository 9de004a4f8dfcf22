// Weights (rows, columns) in the type that sums are kept in (float; double for double); `reversed`, the last column
// comes first.
#pragma once
#include <cstdint>

namespace omniconv {

typedef void (*PackKernel)(const void* from, void* to, int64_t rows, int64_t columns, bool reversed);

struct PackKernels {
  PackKernel widened;     // (rows, columns), as the contiguous kernels take them
  PackKernel transposed;  // (columns, rows), as the channels-last kernels do
};

struct PackTables { PackKernels f32, f64, bf16, f16; };

}  // namespace omniconv
