// The matrix product over channels, weights as kernels take them, sums, and gradients through an activation.
#include "kernels/activation_grad.h"
#include "kernels/gemm.h"
#include "kernels/pack_weights.h"
#include "kernels/sum.h"
#include "ops/isa.h"
#include "portable.h"

namespace omniconv {
KERNEL_TABLE(GemmTables, gemm)
KERNEL_TABLE(PackTables, pack_weights)
KERNEL_TABLE(SumTables, sum)
KERNEL_TABLE(ActivationGradTables, activation_grad)
}  // namespace omniconv

namespace portable {
namespace {

void gemm(Random& random, Type type) {
  const int64_t V = vector_lanes(), N = random.between(1, 3), O = random.size(V),
                T = random.one_in(4) ? 1 : random.size(V);
  const int64_t C = random.one_in(8) ? random.of({255, 256, 257, 300}) : random.between(1, 2 * V + 3);
  omniconv::Gemm g{};
  g.samples = N, g.channels = C, g.outputs = O, g.steps = T, g.activation = exact_activation(random);
  const int64_t gap = random.between(0, 2);
  if (random.one_in(2)) g.step_stride = 1, g.channel_stride = T + gap, g.sample_stride = C * g.channel_stride + gap;
  else g.channel_stride = 1, g.step_stride = C + gap, g.sample_stride = T * g.step_stride + gap;
  if (random.one_in(8)) g.sample_stride = 0;
  if (random.one_in(8)) g.channel_stride = 0;
  if (random.one_in(2)) g.weight_channel_stride = 1, g.weight_output_stride = C + gap;
  else g.weight_output_stride = 1, g.weight_channel_stride = O + gap;
  const auto x_at = [&](int64_t n, int64_t c, int64_t t) {
    return size_t(n * g.sample_stride + c * g.channel_stride + t * g.step_stride);
  };
  const auto w_at = [&](int64_t o, int64_t c) {
    return size_t(o * g.weight_output_stride + c * g.weight_channel_stride);
  };
  const std::vector<double> xs = random.integers(int64_t(x_at(N - 1, C - 1, T - 1)) + 1, 4);
  const std::vector<double> ws = random.integers(int64_t(w_at(O - 1, C - 1)) + 1, 3), bs = random.integers(O, 9);
  const bool biased = random.one_in(2);
  std::vector<double> ys(size_t(N * O * T));
  for (int64_t n = 0; n < N; ++n)
    for (int64_t o = 0; o < O; ++o)
      for (int64_t t = 0; t < T; ++t) {
        double sum = biased ? bs[size_t(o)] : 0;
        for (int64_t c = 0; c < C; ++c) sum += ws[w_at(o, c)] * xs[x_at(n, c, t)];
        ys[size_t((n * O + o) * T + t)] = activated(g.activation, sum);
      }
  const Array x(type, xs), w(type, ws), b(accumulator(type), bs), y(type, N * O * T);
  g.x = x.at(0), g.weight = w.at(0), g.bias = biased ? b.at(0) : nullptr, g.y = y.at(0);
  begin_case("gemm", type, "N %d C %d O %d T %d strides of x %d %d %d of weight %d %d activation %d", int(N), int(C),
             int(O), int(T), int(g.sample_stride), int(g.channel_stride), int(g.step_stride),
             int(g.weight_output_stride), int(g.weight_channel_stride), int(g.activation));
  const auto& kernels = of_type(omniconv::gemm_tables(), type);
  const omniconv::GemmPlan plan = kernels.plan(g);
  const int64_t middle = random.between(0, plan.units);
  if (middle) kernels.run(g, plan, 0, middle, Scratch(plan.scratch_bytes).data());
  if (middle < plan.units) kernels.run(g, plan, middle, plan.units, Scratch(plan.scratch_bytes).data());
  check("y", y, type, ys);
}

void pack(Random& random, Type type) {
  const int64_t rows = random.size(vector_lanes()),
                columns = random.one_in(4) ? random.size(vector_lanes()) : random.between(1, 9);
  const bool reversed = random.one_in(2);
  const std::vector<double> from = random.integers(rows * columns, 100);
  std::vector<double> widened(from.size()), transposed(from.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const double v = from[size_t(r * columns + (reversed ? columns - 1 - c : c))];
      widened[size_t(r * columns + c)] = transposed[size_t(c * rows + r)] = v;
    }
  const Type sums = accumulator(type);
  const Array weights(type, from), wide(sums, rows * columns), columns_first(sums, rows * columns);
  const auto& kernels = of_type(omniconv::pack_weights_tables(), type);
  begin_case("pack_weights", type, "rows %d columns %d reversed %d", int(rows), int(columns), int(reversed));
  kernels.widened(weights.at(0), wide.at(0), rows, columns, reversed);
  check("widened", wide, sums, widened);
  kernels.transposed(weights.at(0), columns_first.at(0), rows, columns, reversed);
  check("transposed", columns_first, sums, transposed);
}

void sum(Random& random, Type type) {
  const int64_t n = random.one_in(2) ? random.size(vector_lanes()) : random.between(0, 300);
  const std::vector<double> xs = random.integers(n, 100);
  std::vector<double> total = random.integers(1, 100);
  const Array x(type, xs), made(accumulator(type), total);
  for (double v : xs) total[0] += v;
  begin_case("sum", type, "of %d", int(n));
  of_type(omniconv::sum_tables(), type)(x.at(0), n, made.at(0));
  check("sum", made, accumulator(type), total);
}

void activation_gradient(Random& random, Type type) {
  const int64_t n = random.one_in(2) ? random.size(vector_lanes()) : random.between(1, 300);
  const omniconv::Activation activation = random.one_in(2) ? omniconv::kRelu : omniconv::kRelu6;
  const std::vector<double> gs = random.integers(n, 100);
  std::vector<double> values = random.integers(n, 9), expected;
  for (double& v : values) v = activated(activation, v);
  for (size_t i = 0; i < values.size(); ++i)
    expected.push_back(values[i] <= 0 || (activation == omniconv::kRelu6 && values[i] >= 6) ? 0 : gs[i]);
  const Array grad_y(type, gs), value(type, values), grad_x(type, n);
  begin_case("activation_grad", type, "of %d, activation %d", int(n), int(activation));
  of_type(omniconv::activation_grad_tables(), type)(grad_y.at(0), value.at(0), n, activation, grad_x.at(0));
  check("grad_x", grad_x, type, expected);
}

}  // namespace

void run_gemm(int64_t cases) { run_cases(cases, {gemm}); }
void run_small(int64_t cases) { run_cases(cases, {pack, sum, activation_gradient}); }

}  // namespace portable
