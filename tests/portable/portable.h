// What the cases of the kernel tables share: random problems, memory behind a guard, rounding, and how a result is
// judged.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "kernels/activation.h"
#include "kernels/depthwise.h"

namespace portable {

enum Type { kFloat32, kFloat64, kBfloat16, kFloat16 };
constexpr Type kTypes[] = {kFloat32, kFloat64, kBfloat16, kFloat16};

// The type that a kernel keeps its sums in.
inline Type accumulator(Type type) { return type == kFloat64 ? kFloat64 : kFloat32; }

// The entry of tables by element type.
template <class Tables> const auto& of_type(const Tables& tables, Type type) {
  switch (type) {
    case kFloat32: return tables.f32;
    case kFloat64: return tables.f64;
    case kBfloat16: return tables.bf16;
    default: return tables.f16;
  }
}

// Returns x as a number of the type, to nearest even. Whole numbers below 2^16 alone: there are neither subnormals nor
// infinities.
double rounded(Type type, double x);

// Memory that ends where the next byte may not be touched; what lies before it is watched.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return data_; }
  bool is_intact() const;

 private:
  char *map_, *data_;
  size_t mapped_;
};

// Numbers of a type as the kernels see them.
class Array {
 public:
  Array(Type type, int64_t size) : Array(type, std::vector<double>(size_t(size))) {}
  Array(Type type, const std::vector<double>& values);
  void* at(int64_t i) const;
  double operator[](int64_t i) const;
  void set(int64_t i, double value);
  bool is_intact() const { return memory_.is_intact(); }

 private:
  Type type_;
  Memory memory_;
};

// Scratch as a kernel is promised it: aligned, of the bytes asked for, full of NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_((bytes + 63) / 64 * 64) {}
  void* data() const { return memory_.data(); }

 private:
  Memory memory_;
};

class Random {
 public:
  explicit Random(int64_t seed) : state_(uint64_t(seed) * 2 + 1) {}
  uint64_t next();
  int64_t between(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  int64_t of(std::initializer_list<int64_t> values) { return values.begin()[between(0, int64_t(values.size()) - 1)]; }
  // A size about a vector of V elements, seldom much more.
  int64_t size(int64_t V) {
    return of({1, 2, 3, V - 1, V, V + 1, 2 * V - 1, 2 * V, 2 * V + 1, 3 * V, between(1, 9 * V)});
  }
  std::vector<double> integers(int64_t n, int64_t most);
  std::vector<uint8_t> mask(int64_t n);

 private:
  uint64_t state_;
};

// The activations that take whole numbers to whole numbers.
inline omniconv::Activation exact_activation(Random& random) {
  return omniconv::Activation(random.of({omniconv::kNone, omniconv::kNone, omniconv::kRelu, omniconv::kRelu6}));
}
double activated(omniconv::Activation activation, double x);

// The index that a position reads of `size` elements with input_dilation − 1 zeros between them, or −1 for a zero.
int64_t source_index(int64_t position, int64_t size, int64_t input_dilation, omniconv::Mode mode);

// The case being run, printed should it fail or crash.
void begin_case(const char* table, Type type, const char* format, ...) __attribute__((format(printf, 3, 4)));
// Compares what a kernel made, to the bit but for the sign of zero.
void check(const char* what, const Array& made, Type type, const std::vector<double>& expected);

// Lanes of float32 in a vector of the level in force.
int64_t vector_lanes();

// Runs each function on `cases` random problems in every type.
using Case = void (*)(Random&, Type);
void run_cases(int64_t cases, std::initializer_list<Case> functions);

void run_depthwise_nchw(int64_t cases);
void run_depthwise_nhwc(int64_t cases);
void run_causal(int64_t cases);
void run_lightweight(int64_t cases);
void run_dynamic(int64_t cases);
void run_gemm(int64_t cases);
void run_small(int64_t cases);

}  // namespace portable
