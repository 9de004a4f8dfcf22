// Causal depthwise convolution with state: checks, threads and registration.
#include "kernels/causal.h"

#include "ops/checks.h"
#include "ops/isa.h"
#include "ops/library.h"
#include "ops/operand.h"
#include "ops/thread.h"

namespace omniconv {

KERNEL_TABLE(CausalTables, causal)

namespace {

// The filter of a call, and the packed weights (W, D) and biases (D) that it points to.
struct PackedFilter {
  Buffer weight, bias;
  CausalFilter filter;
};

PackedFilter pack_filter(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                         int64_t activation) {
  if (x.dim() != 3 || !is_contiguous(x)) fail(op, "x must be a contiguous (B, D, T)", text(x.size()));
  if (weight.dim() != 2 || weight.size(0) != x.size(1) || weight.size(1) < 1 || !is_contiguous(weight) ||
      !is_weight_dtype(weight.dtype(), x.dtype()))
    fail(op, "weight must be a contiguous (D, W) of the dtype of x or of its sums", text(weight.size()));
  if (!is_bias(bias, x.size(1), x.dtype()) || (bias && !is_contiguous(bias)))
    fail(op, "bias must be a contiguous (D,) of the dtype of x or of its sums", text(bias.size()));
  const Activation last = check_activation(op, activation, x.dtype());
  const int64_t channels = x.size(1), width = weight.size(1);
  Buffer w(op, "the packed weight", channels * width, element_size(accumulator_dtype(x.dtype())));
  pack_weights({weight.data(), weight.dtype(), channels, width}, Packing::column_major, false, w.data());
  Buffer b = pack_bias(op, bias);
  const CausalFilter filter{channels, width, w.data(), b.data(), last};
  return {std::move(w), std::move(b), filter};
}

// Returns the next T positions of every sequence; state (M, D, S) is updated. Row rows[b] holds the state of sequence b
// (without rows: row b); below 0 is padding, whose result is 0.
Tensor causal_update(const Tensor& x, const Tensor& state, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& rows, int64_t activation, bool flush) {
  const char* op = "causal_update";
  const CausalKernels& k = kernels_of(causal_tables(), element_of(op, x.dtype()));
  const PackedFilter packed = pack_filter(op, x, weight, bias, activation);
  const CausalFilter& f = packed.filter;
  if (state.dim() != 3 || state.dtype() != x.dtype() || state.size(1) != x.size(1) || state.size(2) < f.width - 1 ||
      (!rows && state.size(0) != x.size(0)))
    fail(op, "state must be (M, D, S) of the dtype of x with S at least W − 1", text(state.size()));
  if (rows && (rows.dim() != 1 || rows.size(0) != x.size(0) || rows.dtype() != kInt64 || !is_contiguous(rows)))
    fail(op, "rows must be a contiguous int64 (B,)", text(rows.size()));
  const int64_t batch = x.size(0), channels = f.channels, steps = x.size(2);
  const int64_t* row = rows ? static_cast<const int64_t*>(rows.data()) : nullptr;
  for (int64_t b = 0; row && b < batch; ++b)
    if (row[b] >= state.size(0))
      fail(op, "rows must be below " + std::to_string(state.size(0)), std::to_string(row[b]));
  Tensor y = new_tensor(op, x.size(), x.dtype());
  if (!y.numel()) return y;
  constexpr int64_t kChannels = 64;  // a unit of work: whole vectors at every instruction set
  const int64_t units = (channels + kChannels - 1) / kChannels;
  const Work work{batch * units, grain_of(kChannels * steps * f.width * 4), k.scratch_bytes(f.width), flush};
  for_each_part(op, work, [&](int64_t first, int64_t last, void* scratch) {
    for (int64_t u = first; u < last; ++u) {
      const int64_t b = u / units, c0 = u % units * kChannels, c1 = std::min(c0 + kChannels, channels),
                    m = row ? row[b] : b;
      if (m < 0) {
        std::memset(address(y, (b * channels + c0) * steps), 0, size_t(c1 - c0) * steps * element_size(y.dtype()));
        continue;
      }
      const CausalState s{address(state, m * state.stride()[0]), state.size(2), state.stride()[1], state.stride()[2]};
      k.update(f, c0, c1, steps, address(x, b * channels * steps), s, address(y, b * channels * steps), scratch);
    }
  });
  return y;
}

// Returns, for each row, the positions whose window reaches into another sequence than their own, or that have no
// owner.
std::vector<Ints> boundary_positions(const Tensor& owner, int64_t width) {
  const int64_t batch = owner.size(0), steps = owner.size(1);
  std::vector<Ints> positions(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* own = static_cast<const int64_t*>(owner.data()) + b * steps;
    int64_t changed = -width;  // the last position whose owner is not its predecessor's
    for (int64_t t = 0; t < steps; ++t) {
      if (t && own[t] != own[t - 1]) changed = t;
      if (own[t] < 0 || t - changed < width - 1) positions[b].push_back(t);
    }
  }
  return positions;
}

// Computes again, in y (B, D, T), a causal convolution of x, the positions whose window reaches into another sequence.
void causal_fixup_boundaries(const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const Tensor& owner, int64_t activation, bool flush) {
  const char* op = "causal_fixup_boundaries";
  const CausalKernels& k = kernels_of(causal_tables(), element_of(op, x.dtype()));
  const PackedFilter packed = pack_filter(op, x, weight, bias, activation);
  const CausalFilter& f = packed.filter;
  if (y.size() != x.size() || y.dtype() != x.dtype() || !is_contiguous(y))
    fail(op, "y must be contiguous and of the shape and dtype of x", text(y.size()));
  if (owner.dim() != 2 || owner.size(0) != x.size(0) || owner.size(1) != x.size(2) || owner.dtype() != kInt64 ||
      !is_contiguous(owner))
    fail(op, "owner must be a contiguous int64 (B, T)", text(owner.size()));
  const int64_t channels = f.channels, steps = x.size(2);
  const std::vector<Ints> positions = boundary_positions(owner, f.width);
  const int64_t* own = static_cast<const int64_t*>(owner.data());
  for_each_part(op, {x.size(0) * channels, 16, 0, flush}, [&](int64_t first, int64_t last, void*) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t b = p / channels;
      k.fixup_boundaries(f, p % channels, own + b * steps, positions[b].data(), int64_t(positions[b].size()),
                         address(x, p * steps), address(y, p * steps));
    }
  });
}

const Register<causal_update> kUpdate(
    "causal_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? rows, int activation, bool "
    "flush) -> Tensor");
const Register<causal_fixup_boundaries> kFixupBoundaries(
    "causal_fixup_boundaries(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor owner, int activation, "
    "bool flush) -> ()");

}  // namespace
}  // namespace omniconv
