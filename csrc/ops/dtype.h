// The element types that kernels are made for, and the type that sums of each are kept in.
#pragma once
#include "ops/error.h"

namespace omniconv {

// torch's codes of the dtypes; they do not change while it is loaded.
inline const int32_t kFloat32 = aoti_torch_dtype_float32(), kFloat64 = aoti_torch_dtype_float64(),
                     kBfloat16 = aoti_torch_dtype_bfloat16(), kFloat16 = aoti_torch_dtype_float16(),
                     kInt64 = aoti_torch_dtype_int64(), kBool = aoti_torch_dtype_bool();

enum class Element { f32, f64, bf16, f16 };

// Returns the element type of a tensor's dtype; refuses others.
inline Element element_of(const char* op, int32_t dtype) {
  if (dtype == kFloat32) return Element::f32;
  if (dtype == kFloat64) return Element::f64;
  if (dtype == kBfloat16) return Element::bf16;
  if (dtype == kFloat16) return Element::f16;
  fail(op, "the dtype must be float32, float64, bfloat16 or float16", "code " + std::to_string(dtype));
}

// Returns the kernels of an element type.
template <class Tables> const auto& kernels_of(const Tables& tables, Element element) {
  switch (element) {
    case Element::f32: return tables.f32;
    case Element::f64: return tables.f64;
    case Element::bf16: return tables.bf16;
    default: return tables.f16;
  }
}

// Returns the bytes of an element: of the four types, of bool and of int64.
inline int64_t element_size(int32_t dtype) {
  if (dtype == kFloat32) return 4;
  if (dtype == kBfloat16 || dtype == kFloat16) return 2;
  return dtype == kBool ? 1 : 8;
}

// Returns the dtype that sums of elements are kept in: float64 for float64, else float32.
inline int32_t accumulator_dtype(int32_t dtype) { return dtype == kFloat64 ? dtype : kFloat32; }

}  // namespace omniconv
