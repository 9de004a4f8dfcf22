// Causal depthwise convolution with state: checks, threads and registration.
#include "kernels/causal.h"

#include <memory>

#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

namespace isa_base { extern const CausalTables causal; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const CausalTables causal; }
namespace isa_avx512 { extern const CausalTables causal; }
#endif

namespace {

const CausalTables& tables() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return isa_avx512::causal;
  if (isa() == kAvx2) return isa_avx2::causal;
#endif
  return isa_base::causal;
}

const CausalKernels& kernels_of(const char* op, int32_t dtype) { return of_dtype(op, tables(), dtype); }

// The filter of a call, its weights packed (W, D); `storage` keeps them.
CausalFilter filter(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t activation, std::unique_ptr<char[]>& storage) {
  const int32_t kept = accumulator_dtype(x.dtype());
  if (x.dim() != 3 || !dense(x, false)) fail(op, "x must be a contiguous (B, D, T)", text(x.size()));
  if (weight.dim() != 2 || weight.size(0) != x.size(1) || weight.size(1) < 1 || !dense(weight, false) || (weight.dtype() != x.dtype() && weight.dtype() != kept))
    fail(op, "weight must be a contiguous (D, W) of the dtype of x or of its sums", text(weight.size()));
  if (bias && (bias.dim() != 1 || bias.size(0) != x.size(1) || !dense(bias, false) || (bias.dtype() != x.dtype() && bias.dtype() != kept)))
    fail(op, "bias must be a contiguous (D,) of the dtype of x or of its sums", text(bias.size()));
  const bool curved = activation == kSilu || activation == kGelu || activation == kSigmoid;
  if (activation < kNone || activation > kSigmoid || (curved && x.dtype() == aoti_torch_dtype_float64()))
    fail(op, "the activation must be one that is fused", std::to_string(activation));
  const int64_t channels = x.size(1), width = weight.size(1), sum = element_size(kept);
  storage.reset(new char[size_t(channels) * (width + 1) * sum]);
  char* b = storage.get() + size_t(channels) * width * sum;
  pack_weights(weight, storage.get(), channels, width, true, false);
  if (bias) pack_weights(bias, b, channels, 1, false, false);
  return {channels, width, storage.get(), bias ? b : nullptr, Activation(activation)};
}

char* at(const Tensor& t, int64_t elements) { return static_cast<char*>(t.data()) + elements * element_size(t.dtype()); }

// The next T positions of every sequence; state (M, D, S) is updated. Row rows[b] holds the state of sequence b (none given: row b);
// below 0 is padding, whose result is 0.
Tensor causal_update(const Tensor& x, const Tensor& state, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& rows, int64_t activation, bool flush) {
  const char* op = "causal_update";
  const CausalKernels& k = kernels_of(op, x.dtype());
  std::unique_ptr<char[]> storage;
  const CausalFilter f = filter(op, x, weight, bias, activation, storage);
  if (state.dim() != 3 || state.dtype() != x.dtype() || state.size(1) != x.size(1) || state.size(2) < f.width - 1 || (!rows && state.size(0) != x.size(0)))
    fail(op, "state must be (M, D, S) of the dtype of x with S at least W − 1", text(state.size()));
  if (rows && (rows.dim() != 1 || rows.size(0) != x.size(0) || rows.dtype() != aoti_torch_dtype_int64() || !dense(rows, false)))
    fail(op, "rows must be a contiguous int64 (B,)", text(rows.size()));
  const int64_t batch = x.size(0), channels = f.channels, steps = x.size(2);
  const int64_t* row = rows ? static_cast<const int64_t*>(rows.data()) : nullptr;
  for (int64_t b = 0; row && b < batch; ++b)
    if (row[b] >= state.size(0)) fail(op, "rows must be below " + std::to_string(state.size(0)), std::to_string(row[b]));
  Tensor y = Tensor::empty(x.size(), strides(x.size(), false), x.dtype());
  if (!y.numel()) return y;
  constexpr int64_t kChannels = 64;  // a unit of work: whole vectors at every instruction set
  const int64_t units = (channels + kChannels - 1) / kChannels;
  const size_t scratch = k.scratch_bytes(f.width);
  parallel_for(batch * units, grain(kChannels * steps * f.width * 4), [&](int64_t first, int64_t last) {
    Flush guard(flush);
    Scratch space(scratch);
    for (int64_t u = first; u < last; ++u) {
      const int64_t b = u / units, c0 = u % units * kChannels, c1 = std::min(c0 + kChannels, channels), from = row ? row[b] : b;
      if (from < 0) {
        std::memset(at(y, (b * channels + c0) * steps), 0, size_t(c1 - c0) * steps * element_size(x.dtype()));
        continue;
      }
      const CausalState s{at(state, from * state.stride()[0]), state.size(2), state.stride()[1], state.stride()[2]};
      k.update(f, c0, c1, steps, at(x, b * channels * steps), s, at(y, b * channels * steps), space.data());
    }
  });
  return y;
}

// In y (B, D, T), a causal convolution of x, every position is made again whose window reaches into another sequence than its own.
void causal_fixup_boundaries(const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& owner, int64_t activation, bool flush) {
  const char* op = "causal_fixup_boundaries";
  const CausalKernels& k = kernels_of(op, x.dtype());
  std::unique_ptr<char[]> storage;
  const CausalFilter f = filter(op, x, weight, bias, activation, storage);
  if (y.size() != x.size() || y.dtype() != x.dtype() || !dense(y, false)) fail(op, "y must be contiguous and of the shape and dtype of x", text(y.size()));
  if (owner.dim() != 2 || owner.size(0) != x.size(0) || owner.size(1) != x.size(2) || owner.dtype() != aoti_torch_dtype_int64() || !dense(owner, false))
    fail(op, "owner must be a contiguous int64 (B, T)", text(owner.size()));
  const int64_t batch = x.size(0), channels = f.channels, steps = x.size(2);
  std::vector<std::vector<int64_t>> broken(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* own = static_cast<const int64_t*>(owner.data()) + b * steps;
    int64_t changed = -f.width;  // the last position whose owner is not its predecessor's
    for (int64_t t = 0; t < steps; ++t) {
      if (t && own[t] != own[t - 1]) changed = t;
      if (own[t] < 0 || t - changed < f.width - 1) broken[b].push_back(t);
    }
  }
  parallel_for(batch * channels, 16, [&](int64_t first, int64_t last) {
    Flush guard(flush);
    for (int64_t p = first; p < last; ++p) {
      const std::vector<int64_t>& b = broken[p / channels];
      k.mend(f, p % channels, static_cast<const int64_t*>(owner.data()) + p / channels * steps, b.data(), int64_t(b.size()), at(x, p * steps), at(y, p * steps));
    }
  });
}

const Register registered[] = {
    {"causal_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? rows, int activation, bool flush) -> Tensor", "causal_update",
     &Boxed<causal_update>::call},
    {"causal_fixup_boundaries(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor owner, int activation, bool flush) -> ()", "causal_fixup_boundaries",
     &Boxed<causal_fixup_boundaries>::call},
};

}  // namespace
}  // namespace omniconv
