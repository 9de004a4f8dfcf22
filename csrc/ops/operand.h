// What every op does with its operands: refuses them by name, looks at how they lie in memory, and packs its weights for the kernels.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>

#include "box.h"

namespace omniconv {

[[noreturn]] inline void fail(const char* op, const std::string& must, const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + must + ", got " + got);
}

inline std::string text(const Ints& values) {
  std::string s = "(";
  for (size_t i = 0; i < values.size(); ++i) s += (i ? ", " : "") + std::to_string(values[i]);
  return s + ")";
}

// Of tables by element type, the one of a dtype.
template <class Tables> const auto& of_dtype(const char* op, const Tables& tables, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return tables.f32;
  if (dtype == aoti_torch_dtype_float64()) return tables.f64;
  if (dtype == aoti_torch_dtype_bfloat16()) return tables.bf16;
  if (dtype == aoti_torch_dtype_float16()) return tables.f16;
  fail(op, "the dtype must be float32, float64, bfloat16 or float16", "code " + std::to_string(dtype));
}

// How a tensor lies in memory: axes of size 1 do not count.
inline bool dense(const Tensor& x, bool last) {
  int64_t expected = 1;
  const int64_t dim = x.dim();
  for (int64_t i = 0; i < dim; ++i) {
    // fastest axis first: W H D C N, or C W H D N
    const int64_t axis = !last ? dim - 1 - i : i == 0 ? 1 : i == dim - 1 ? 0 : dim - i;
    if (x.size(axis) == 1) continue;
    if (x.stride()[axis] != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

inline Ints strides(const Ints& size, bool last) {
  const int64_t dim = int64_t(size.size());
  Ints stride(dim);
  int64_t step = 1;
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t axis = !last ? dim - 1 - i : i == 0 ? 1 : i == dim - 1 ? 0 : dim - i;
    stride[axis] = step;
    step *= std::max<int64_t>(size[axis], 1);
  }
  return stride;
}

inline int64_t element_size(int32_t dtype) {
  return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : dtype == aoti_torch_dtype_bool() ? 1 : 2;
}

// The same numbers, contiguous. What calls an op sees to this itself, but an exported program has forgotten to where nothing was to do.
inline Tensor copied(const Tensor& t) {
  Tensor to = Tensor::empty(t.size(), strides(t.size(), false), t.dtype());
  const int64_t n = t.numel(), e = element_size(t.dtype());
  const char* from = static_cast<const char*>(t.data());
  char* out = static_cast<char*>(to.data());
  Ints at(t.dim());
  for (int64_t i = 0, offset = 0; i < n; ++i) {
    std::memcpy(out + i * e, from + offset * e, e);
    for (int64_t axis = t.dim() - 1; axis >= 0; --axis) {
      offset += t.stride()[axis];
      if (++at[axis] < t.size(axis)) break;
      offset -= t.stride()[axis] * at[axis];
      at[axis] = 0;
    }
  }
  return to;
}

// A tensor, or a contiguous copy of it.
class Contiguous {
 public:
  Contiguous(const Tensor& t, bool as_it_is) : copy_(t && !as_it_is ? copied(t) : Tensor()), used_(copy_ ? copy_ : t) {}
  const Tensor& operator*() const { return used_; }

 private:
  Tensor copy_;
  const Tensor& used_;
};

// The type that sums of elements are kept in.
inline int32_t accumulator_dtype(int32_t dtype) { return dtype == aoti_torch_dtype_float64() ? dtype : aoti_torch_dtype_float32(); }

// Weights (outputs, taps), which have the type of the elements or of the sums, in the latter, their taps reversed where asked; (taps, outputs)
// where `last`.
void pack_weights(const void* weights, int32_t dtype, void* out, int64_t outputs, int64_t taps, bool last, bool reversed);
inline void pack_weights(const Tensor& t, void* out, int64_t outputs, int64_t taps, bool last, bool reversed) {
  pack_weights(t.data(), t.dtype(), out, outputs, taps, last, reversed);
}

// How many units of `work` multiply-adds make a chunk worth a thread: about ten microseconds.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, 200000 / std::max<int64_t>(work, 1)); }

}  // namespace omniconv
