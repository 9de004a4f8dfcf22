// Sums of contiguous numbers.
#pragma once
#include <cstdint>

namespace omniconv {

// The sum of n elements is added to *sum, which is of the type that sums are kept in (float; double for double).
typedef void (*SumKernel)(const void* x, int64_t n, void* sum);

struct SumTables { SumKernel f32, f64, bf16, f16; };

}  // namespace omniconv
