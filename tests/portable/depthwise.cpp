// Depthwise convolution, contiguous and channels-last: forward, the input's gradient by the adjoint geometry, and the
// weight's gradient.
#include <algorithm>
#include <utility>

#include "kernels/depthwise.h"
#include "ops/isa.h"
#include "portable.h"

namespace omniconv {
KERNEL_TABLE(NchwTables, depthwise_nchw)
KERNEL_TABLE(NchwGradTables, depthwise_nchw_grad)
KERNEL_TABLE(NhwcTables, depthwise_nhwc)
KERNEL_TABLE(NaiveTables, depthwise_naive)
}  // namespace omniconv

namespace portable {
namespace {

using omniconv::DepthwiseGeometry;

int64_t volume(const int64_t* axes) { return axes[0] * axes[1] * axes[2]; }

// A forward problem of rank 1 to 3: (1, 1, T), (H, 1, W) or (D, H, W).
DepthwiseGeometry random_geometry(Random& random, bool zeros) {
  const int64_t rank = random.between(1, 3), V = vector_lanes();
  DepthwiseGeometry g;
  g.mode = zeros || random.one_in(2) ? omniconv::kZeros
                                     : omniconv::Mode(random.between(omniconv::kReflect, omniconv::kCircular));
  g.multiplier = 1;
  g.ordered = random.one_in(4);
  g.activation = omniconv::kNone;
  const bool large = random.one_in(40);  // beyond one tile
  for (int i = 0; i < 3; ++i) {
    g.in[i] = g.out[i] = g.kernel[i] = g.stride[i] = g.dilation[i] = g.spread[i] = 1;
    g.before[i] = 0;
    if ((rank == 1 && i < 2) || (rank == 2 && i == 1)) continue;
    const bool column = i == 2;
    for (int64_t after = -1; after < 0;) {
      g.in[i] = large && rank == 2 ? random.between(180, 230)
                : column           ? random.size(V)
                                   : random.between(1, rank == 3 ? 5 : 20);
      if (large && rank == 1) g.in[i] = random.between(9000, 9100);
      g.kernel[i] = rank == 1 && random.one_in(4) ? random.between(8, 40) : random.between(1, rank == 3 ? 4 : 7);
      g.stride[i] = random.of({1, 1, 2, 2, 3, 5});
      g.dilation[i] = random.of({1, 1, 1, 2, 3, V / 2});
      const int64_t reach = g.dilation[i] * (g.kernel[i] - 1);
      const int64_t most = g.mode == omniconv::kReflect    ? g.in[i] - 1
                           : g.mode == omniconv::kCircular ? g.in[i]
                                                           : reach + 2;
      g.before[i] = random.between(0, std::min(most, reach + 2));
      const int64_t behind = random.between(0, std::min(most, reach + 2)),
                    room = g.in[i] + g.before[i] + behind - reach - 1;
      if (room < 0) continue;
      g.out[i] = room / g.stride[i] + 1;
      after = behind;
    }
  }
  return g;
}

// Makes the geometry of the input's gradient: stride 1 over the output's gradient with zeros between its elements.
void make_adjoint(DepthwiseGeometry& g) {
  for (int i = 0; i < 3; ++i) {
    std::swap(g.in[i], g.out[i]);
    g.spread[i] = std::exchange(g.stride[i], 1);
    g.before[i] = g.dilation[i] * (g.kernel[i] - 1) - g.before[i];
  }
}

// f(output, tap, input) for every output and every tap of its window that meets an element.
template <class F> void for_each_product(const DepthwiseGeometry& g, const F& f) {
  int64_t o[3], k[3], at[3];
  for (int64_t output = 0; output < volume(g.out); ++output)
    for (int64_t tap = 0; tap < volume(g.kernel); ++tap) {
      o[2] = output % g.out[2], o[1] = output / g.out[2] % g.out[1], o[0] = output / g.out[2] / g.out[1];
      k[2] = tap % g.kernel[2], k[1] = tap / g.kernel[2] % g.kernel[1], k[0] = tap / g.kernel[2] / g.kernel[1];
      bool meets = true;
      for (int i = 0; i < 3; ++i) {
        at[i] = source_index(o[i] * g.stride[i] + k[i] * g.dilation[i] - g.before[i], g.in[i], g.spread[i], g.mode);
        meets = meets && at[i] >= 0;
      }
      if (meets) f(output, tap, (at[0] * g.in[1] + at[1]) * g.in[2] + at[2]);
    }
}

#define GEOMETRY \
  "in %d %d %d out %d %d %d kernel %d %d %d stride %d %d %d dilation %d %d %d before %d %d %d between %d %d %d mode %d"
#define AXES(a) int(a[0]), int(a[1]), int(a[2])
#define GEOMETRY_OF(g) \
  AXES(g.in), AXES(g.out), AXES(g.kernel), AXES(g.stride), AXES(g.dilation), AXES(g.before), AXES(g.spread), int(g.mode)

// One channel of y, before rounding: x (in…), w (taps).
std::vector<double> convolved(const DepthwiseGeometry& g, const double* x, const double* w, double bias) {
  std::vector<double> y(size_t(volume(g.out)), bias);
  for_each_product(g, [&](int64_t o, int64_t t, int64_t i) { y[size_t(o)] += w[t] * x[i]; });
  for (double& v : y) v = activated(g.activation, v);
  return y;
}

void forward_nchw(Random& random, Type type) {
  const bool adjoint = random.one_in(3);
  DepthwiseGeometry g = random_geometry(random, adjoint);
  if (adjoint) make_adjoint(g);
  else g.multiplier = random.between(1, 3), g.activation = exact_activation(random);
  const int64_t planes = random.between(1, 3), in = volume(g.in), out = volume(g.out), taps = volume(g.kernel),
                M = g.multiplier;
  const std::vector<double> xs = random.integers(planes * in, 4), ws = random.integers(planes * M * taps, 3),
                            bs = random.integers(planes * M, 9);
  const bool biased = random.one_in(2);
  std::vector<double> expected;
  for (int64_t c = 0; c < planes * M; ++c)
    for (double v : convolved(g, &xs[size_t(c / M * in)], &ws[size_t(c * taps)], biased ? bs[size_t(c)] : 0))
      expected.push_back(v);
  const Type sums = accumulator(type);
  const Array x(type, xs), w(sums, ws), b(sums, bs), y(type, planes * M * out), naive(type, M * out);
  begin_case("depthwise_nchw", type, GEOMETRY " planes %d multiplier %d activation %d ordered %d", GEOMETRY_OF(g),
             int(planes), int(M), int(g.activation), int(g.ordered));
  const auto& kernels = of_type(omniconv::depthwise_nchw_tables(), type);
  kernels.forward(g, planes, x.at(0), w.at(0), biased ? b.at(0) : nullptr, y.at(0),
                  Scratch(kernels.scratch_bytes(g)).data());
  check("y", y, type, expected);
  begin_case("depthwise_naive", type, GEOMETRY, GEOMETRY_OF(g));
  of_type(omniconv::depthwise_naive_tables(), type)(g, x.at(0), w.at(0), biased ? b.at(0) : nullptr, naive.at(0));
  expected.resize(size_t(M * out));
  check("y", naive, type, expected);
}

void gradient_nchw(Random& random, Type type) {
  DepthwiseGeometry g = random_geometry(random, true);
  const int64_t M = g.multiplier = random.between(1, 3), in = volume(g.in), out = volume(g.out),
                taps = volume(g.kernel);
  const std::vector<double> xs = random.integers(in, 4), gs = random.integers(M * out, 4);
  std::vector<double> expected = random.integers(M * taps, 9);
  const Array x(type, xs), grad_y(type, gs), grad_w(accumulator(type), expected);
  for (int64_t m = 0; m < M; ++m)
    for_each_product(g, [&](int64_t o, int64_t t, int64_t i) {
      expected[size_t(m * taps + t)] += gs[size_t(m * out + o)] * xs[size_t(i)];
    });
  begin_case("depthwise_nchw_grad", type, GEOMETRY " multiplier %d", GEOMETRY_OF(g), int(M));
  const auto& kernels = of_type(omniconv::depthwise_nchw_grad_tables(), type);
  kernels.grad_weight(g, x.at(0), grad_y.at(0), grad_w.at(0), Scratch(kernels.scratch_bytes(g)).data());
  check("grad_weight", grad_w, accumulator(type), expected);
}

// Element (c, i) of C channels at [i][c].
std::vector<double> channels_last(const std::vector<double>& of, int64_t C) {
  const int64_t n = int64_t(of.size()) / C;
  std::vector<double> to(of.size());
  for (int64_t c = 0; c < C; ++c)
    for (int64_t i = 0; i < n; ++i) to[size_t(i * C + c)] = of[size_t(c * n + i)];
  return to;
}

int64_t random_channels(Random& random) {
  const int64_t V = vector_lanes();
  return random.of({V, V + 1, 2 * V - 1, 2 * V, 2 * V + 1, 3 * V, random.between(V, 6 * V)});
}

void forward_nhwc(Random& random, Type type) {
  const bool adjoint = random.one_in(3);
  DepthwiseGeometry g = random_geometry(random, adjoint);
  if (adjoint) make_adjoint(g);
  else g.activation = exact_activation(random);
  if (volume(g.out) * volume(g.kernel) > 60000) return;
  const int64_t C = random_channels(random), in = volume(g.in), out = volume(g.out), taps = volume(g.kernel),
                rows = g.out[0] * g.out[1];
  const std::vector<double> xs = random.integers(C * in, 4), ws = random.integers(C * taps, 3),
                            bs = random.integers(C, 9);
  const bool biased = random.one_in(2);
  std::vector<double> expected;
  for (int64_t c = 0; c < C; ++c)
    for (double v : convolved(g, &xs[size_t(c * in)], &ws[size_t(c * taps)], biased ? bs[size_t(c)] : 0))
      expected.push_back(v);
  expected = channels_last(expected, C);
  const int64_t first = random.one_in(2) ? 0 : random.between(0, rows - 1), last = random.between(first + 1, rows);
  const bool part = rows == 1 && random.one_in(2);  // of a sequence
  const int64_t begin = part ? random.between(0, g.out[2] - 1) : 0,
                end = part ? random.between(begin + 1, g.out[2]) : g.out[2];
  const Type sums = accumulator(type);
  const Array x(type, channels_last(xs, C)), w(sums, channels_last(ws, C)), b(sums, bs);
  Array y(type, C * out);
  for (int64_t i = 0; i < out * C; ++i) {  // what is not asked for stays
    const int64_t row = i / C / g.out[2], column = i / C % g.out[2];
    if (row < first || row >= last || column < begin || column >= end) y.set(i, expected[size_t(i)] = -7);
  }
  begin_case("depthwise_nhwc", type, GEOMETRY " channels %d rows %d %d columns %d %d activation %d", GEOMETRY_OF(g),
             int(C), int(first), int(last), int(begin), int(end), int(g.activation));
  const auto& kernels = of_type(omniconv::depthwise_nhwc_tables(), type);
  kernels.forward(g, C, first, last, begin, end, x.at(0), w.at(0), biased ? b.at(0) : nullptr, y.at(0),
                  Scratch(kernels.scratch_bytes(g)).data());
  check("y", y, type, expected);
}

void gradient_nhwc(Random& random, Type type) {
  const DepthwiseGeometry g = random_geometry(random, true);
  const int64_t in = volume(g.in), out = volume(g.out), taps = volume(g.kernel), C = random_channels(random),
                V = vector_lanes();
  if (out * taps > 60000) return;
  const std::vector<double> xs = random.integers(C * in, 4), gs = random.integers(C * out, 4);
  const int64_t whole = C / V, first = random.between(0, whole - 1), c0 = first * V,
                c1 = random.between(first + 1, whole) * V;
  std::vector<double> weights = random.integers(C * taps, 9), biases = random.integers(C, 9);
  const Type sums = accumulator(type);
  const Array x(type, channels_last(xs, C)), grad_y(type, channels_last(gs, C)),
      grad_w(sums, channels_last(weights, C)), grad_b(sums, biases);
  for (int64_t c = c0; c < c1; ++c) {
    for_each_product(g, [&](int64_t o, int64_t t, int64_t i) {
      weights[size_t(c * taps + t)] += gs[size_t(c * out + o)] * xs[size_t(c * in + i)];
    });
    for (int64_t o = 0; o < out; ++o) biases[size_t(c)] += gs[size_t(c * out + o)];
  }
  begin_case("depthwise_nhwc grad_weight", type, GEOMETRY " channels %d of %d to %d", GEOMETRY_OF(g), int(C), int(c0),
             int(c1));
  const auto& kernels = of_type(omniconv::depthwise_nhwc_tables(), type);
  kernels.grad_weight(g, C, c0, c1, x.at(0), grad_y.at(0), grad_w.at(0), grad_b.at(0),
                      Scratch(kernels.scratch_bytes(g)).data());
  check("grad_weight", grad_w, sums, channels_last(weights, C));
  check("grad_bias", grad_b, sums, biases);
}

}  // namespace

void run_depthwise_nchw(int64_t cases) { run_cases(cases, {forward_nchw, gradient_nchw}); }
void run_depthwise_nhwc(int64_t cases) { run_cases(cases, {forward_nhwc, gradient_nhwc}); }

}  // namespace portable
