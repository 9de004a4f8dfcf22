// What every op does with its operands: looks at how they lie in memory, makes new ones, and packs its weights for the
// kernels.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "ops/dtype.h"

namespace omniconv {

enum class MemoryFormat { contiguous, channels_last };

// Returns the axis that is the i-th fastest of a format: W H D C N, or C W H D N.
inline int64_t axis_by_speed(int64_t i, int64_t dim, MemoryFormat format) {
  if (format == MemoryFormat::contiguous) return dim - 1 - i;
  return i == 0 ? 1 : i == dim - 1 ? 0 : dim - i;
}

// Returns whether a tensor's elements follow each other without gaps in a format; axes of size 1 do not count.
inline bool is_contiguous(const Tensor& x, MemoryFormat format = MemoryFormat::contiguous) {
  int64_t expected = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    const int64_t axis = axis_by_speed(i, x.dim(), format);
    if (x.size(axis) == 1) continue;
    if (x.stride()[axis] != expected) return false;
    expected *= x.size(axis);
  }
  return true;
}

inline Ints contiguous_strides(const Ints& size, MemoryFormat format = MemoryFormat::contiguous) {
  const int64_t dim = int64_t(size.size());
  Ints stride(dim);
  int64_t step = 1;
  for (int64_t i = 0; i < dim; ++i) {
    const int64_t axis = axis_by_speed(i, dim, format);
    stride[axis] = step;
    if (__builtin_mul_overflow(step, std::max<int64_t>(size[axis], 1), &step)) step = INT64_MAX;  // no memory holds it
  }
  return stride;
}

// Returns how many bytes an array takes, or -1 for more than 2^63.
inline int64_t bytes_of(const Ints& size, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  bool overflow = false, empty = false;
  for (int64_t s : size) {
    empty |= s == 0;
    overflow |= __builtin_mul_overflow(bytes, s, &bytes);
  }
  return empty ? 0 : overflow ? -1 : bytes;
}

// Refuses a call that there is no memory for; `what` is too large.
[[noreturn]] inline void fail_to_allocate(const char* op, const std::string& what, const Ints& size,
                                          int64_t element_bytes) {
  const int64_t bytes = bytes_of(size, element_bytes);
  fail(op,
       what + " of " + (bytes < 0 ? "more than 2^63" : std::to_string(bytes)) + " bytes (sizes " + joined(size) +
           ") must fit into memory",
       "an allocation failure");
}

// Returns a new tensor, not initialised; `what` it is, for the error of one that does not fit into memory.
inline Tensor new_tensor(const char* op, const Ints& size, int32_t dtype,
                         MemoryFormat format = MemoryFormat::contiguous, const char* what = "the result") {
  const int64_t bytes = element_size(dtype);
  Tensor t = bytes_of(size, bytes) < 0 ? Tensor() : Tensor::try_empty(size, contiguous_strides(size, format), dtype);
  if (!t) fail_to_allocate(op, what, size, bytes);
  return t;
}

// Returns a tensor's address `elements` from its first element, strides aside.
inline char* address(const Tensor& t, int64_t elements = 0) {
  return static_cast<char*>(t.data()) + elements * element_size(t.dtype());
}

// Returns the same numbers in a contiguous tensor.
inline Tensor copied(const char* op, const Tensor& t) {
  Tensor copy = new_tensor(op, t.size(), t.dtype(), MemoryFormat::contiguous, "a contiguous copy");
  const int64_t n = t.numel(), bytes = element_size(t.dtype());
  const char* from = address(t);
  char* to = address(copy);
  Ints index(t.dim());
  for (int64_t i = 0, offset = 0; i < n; ++i) {
    std::memcpy(to + i * bytes, from + offset * bytes, bytes);
    for (int64_t axis = t.dim() - 1; axis >= 0; --axis) {
      offset += t.stride()[axis];
      if (++index[axis] < t.size(axis)) break;
      offset -= t.stride()[axis] * index[axis];
      index[axis] = 0;
    }
  }
  return copy;
}

// A tensor, or a contiguous copy of one that is neither contiguous nor in the format that its op accepts. Callers see
// to this themselves, but an exported program has forgotten to where nothing was to do.
class Contiguous {
 public:
  Contiguous(const char* op, const Tensor& t, MemoryFormat accepted = MemoryFormat::contiguous)
      : copy_(!t || is_contiguous(t, accepted) ? Tensor() : copied(op, t)), used_(copy_ ? copy_ : t) {}
  Contiguous(const Contiguous&) = delete;
  Contiguous& operator=(const Contiguous&) = delete;
  const Tensor& operator*() const { return used_; }
  const Tensor* operator->() const { return &used_; }

 private:
  Tensor copy_;
  const Tensor& used_;
};

// Memory of one call, not initialised; `what` it is, for the error of one that does not fit into memory.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const char* op, const char* what, int64_t count, int64_t bytes)
      : data_(static_cast<char*>(std::malloc(size_t(std::max<int64_t>(count * bytes, 1))))) {
    if (!data_) fail_to_allocate(op, what, {count}, bytes);
  }
  char* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
};

// A contiguous matrix of weights, a row for each output, of one of the four dtypes.
struct WeightMatrix {
  const void* data;
  int32_t dtype;
  int64_t rows, columns;
};

enum class Packing { row_major, column_major };

// Writes weights in the dtype of their sums, in either order, each row reversed if asked.
void pack_weights(const WeightMatrix& weights, Packing packing, bool reversed, void* packed);

// Returns a bias in the dtype of its sums; empty for none.
inline Buffer pack_bias(const char* op, const Tensor& bias) {
  if (!bias) return {};
  const Contiguous values(op, bias);
  Buffer packed(op, "the packed bias", bias.size(0), element_size(accumulator_dtype(bias.dtype())));
  pack_weights({values->data(), bias.dtype(), 1, bias.size(0)}, Packing::row_major, false, packed.data());
  return packed;
}

}  // namespace omniconv
