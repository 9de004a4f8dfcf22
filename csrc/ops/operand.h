// What every op does with its operands: refuses them by name, looks at how they lie in memory, and deals its weights for the kernels.
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

inline int64_t element_size(int32_t dtype) { return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2; }

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
class Settled {
 public:
  Settled(const Tensor& t, bool as_it_is) : copy_(t && !as_it_is ? copied(t) : Tensor()), used_(copy_ ? copy_ : t) {}
  const Tensor& operator*() const { return used_; }

 private:
  Tensor copy_;
  const Tensor& used_;
};

inline float widen_half(uint16_t h, bool bf) {
  uint32_t u;
  if (bf) {
    u = uint32_t(h) << 16;
  } else {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    if (exponent == 0) {
      const float f = float(mantissa) * 5.9604644775390625e-08f;  // 2^-24
      return sign ? -f : f;
    }
    u = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Rows of `from` (rows, columns) become columns of `to`, tile by tile so that both stay in L1.
template <class To, class From, class Widen> void transpose(const From* from, To* to, int64_t rows, int64_t columns, Widen wide) {
  constexpr int64_t kSide = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kSide)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = r0; r < std::min(r0 + kSide, rows); ++r) to[c * rows + r] = wide(from[r * columns + c]);
}

template <class To, class From, class Widen>
void deal(const From* from, To* to, int64_t outputs, int64_t taps, bool last, bool reversed, Widen wide) {
  if (last) {
    transpose(from, to, outputs, taps, wide);
    if (reversed)
      for (int64_t t = 0; t < taps / 2; ++t) std::swap_ranges(to + t * outputs, to + (t + 1) * outputs, to + (taps - 1 - t) * outputs);
    return;
  }
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t t = 0; t < taps; ++t) to[o * taps + t] = wide(from[o * taps + (reversed ? taps - 1 - t : t)]);
}

// The type that sums of elements are kept in.
inline int32_t kept_in(int32_t dtype) { return dtype == aoti_torch_dtype_float64() ? dtype : aoti_torch_dtype_float32(); }

// Weights (outputs, taps) of a tensor, which has the type of the elements or of the sums, in the latter, their taps reversed where asked;
// (taps, outputs) where `last`.
inline void deal(const Tensor& t, void* out, int64_t outputs, int64_t taps, bool last, bool reversed) {
  const void* p = t.data();
  if (t.dtype() == aoti_torch_dtype_float64())
    return deal(static_cast<const double*>(p), static_cast<double*>(out), outputs, taps, last, reversed, [](double x) { return x; });
  float* to = static_cast<float*>(out);
  if (t.dtype() == aoti_torch_dtype_float32()) return deal(static_cast<const float*>(p), to, outputs, taps, last, reversed, [](float x) { return x; });
  const uint16_t* half = static_cast<const uint16_t*>(p);
  if (t.dtype() == aoti_torch_dtype_bfloat16()) deal(half, to, outputs, taps, last, reversed, [](uint16_t x) { return widen_half(x, true); });
  else deal(half, to, outputs, taps, last, reversed, [](uint16_t x) { return widen_half(x, false); });
}

// How many units of `work` multiply-adds make a chunk worth a thread: about ten microseconds.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, 200000 / std::max<int64_t>(work, 1)); }

}  // namespace omniconv
