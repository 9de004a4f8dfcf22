// Convolutions along a sequence: causal with state, lightweight, dynamic (softmax off: its weights are the numbers as
// they are).
#include <algorithm>
#include <utility>

#include "kernels/causal.h"
#include "kernels/dynamic.h"
#include "kernels/lightweight.h"
#include "ops/isa.h"
#include "portable.h"

namespace omniconv {
KERNEL_TABLE(CausalTables, causal)
KERNEL_TABLE(LightweightTables, lightweight)
KERNEL_TABLE(DynamicTables, dynamic)
KERNEL_TABLE(DynamicGradTables, dynamic_grad)
}  // namespace omniconv

namespace portable {
namespace {

using omniconv::Mode;

// What a lightweight and a dynamic problem share.
struct Window {
  int64_t length, outputs, heads, group, kernel, dilation, before;
  Mode mode;
  bool time_first;  // positions of a channel lie side by side; otherwise channels do
};

Window random_window(Random& random, bool zeros) {
  const int64_t V = vector_lanes();
  Window p;
  p.mode = zeros || random.one_in(2) ? omniconv::kZeros : Mode(random.between(omniconv::kReflect, omniconv::kCircular));
  p.heads = random.between(1, 5);
  p.group = random.of({1, 2, 3, 4, V - 1, V, V + 1, 2 * V});
  p.time_first = random.one_in(2);
  for (p.outputs = 0; p.outputs < 1;) {
    p.length = random.one_in(8) ? random.between(1, 500) : random.size(V);
    p.kernel = random.one_in(4) ? random.between(8, 40) : random.between(1, 7);
    p.dilation = random.of({1, 1, 1, 2, 3, V});
    const int64_t reach = p.dilation * (p.kernel - 1);
    const int64_t most = p.mode == omniconv::kReflect    ? p.length - 1
                         : p.mode == omniconv::kCircular ? p.length
                                                         : reach + 2;
    p.before = random.between(0, std::min(most, reach + 2));
    p.outputs = p.length + p.before + random.between(0, std::min(most, reach + 2)) - reach;
  }
  return p;
}

// Elements between positions and between channels of a sample of `channels` channels, `length` positions.
std::pair<int64_t, int64_t> steps(const Window& p, int64_t channels, int64_t length) {
  return p.time_first ? std::make_pair(int64_t(1), length) : std::make_pair(channels, int64_t(1));
}

// f(output, tap, position) for every tap that meets an element which the mask, if there is one, does not hide.
template <class F> void for_each_product(const Window& p, const uint8_t* mask, const F& f) {
  for (int64_t t = 0; t < p.outputs; ++t)
    for (int64_t i = 0; i < p.kernel; ++i) {
      const int64_t at = source_index(t + i * p.dilation - p.before, p.length, 1, p.mode);
      if (at >= 0 && !(mask && mask[at])) f(t, i, at);
    }
}

#define WINDOW "length %d outputs %d heads %d group %d kernel %d dilation %d before %d mode %d time_first %d mask %d"
#define WINDOW_OF(p, mask)                                                                                  \
  int(p.length), int(p.outputs), int(p.heads), int(p.group), int(p.kernel), int(p.dilation), int(p.before), \
      int(p.mode), int(p.time_first), int(mask != nullptr)

// ---- causal

void causal_update(Random& random, Type type) {
  const int64_t D = random.size(vector_lanes()), W = random.between(1, 5), S = W - 1 + random.between(0, 2),
                T = random.of({1, 1, 2, 3, 63, 64, 65, 130});
  const int64_t first = random.between(0, D - 1), last = random.between(first + 1, D);
  const bool biased = random.one_in(2), rows = random.one_in(2);  // rows: a state's channels lie side by side
  const int64_t channel_stride = rows ? 1 : S + 1, step_stride = rows ? D + 1 : 1, held = (D + 1) * (S + 1);
  const omniconv::Activation activation = exact_activation(random);
  const std::vector<double> xs = random.integers(D * T, 4), ws = random.integers(W * D, 3), bs = random.integers(D, 9);
  std::vector<double> states = random.integers(held, 4), ys(size_t(D * T), -7);
  const Type sums = accumulator(type);
  const Array x(type, xs), w(sums, ws), b(sums, bs), state(type, states), y(type, ys);
  for (int64_t d = first; d < last; ++d) {
    std::vector<double> past;
    for (int64_t i = 0; i < S; ++i) past.push_back(states[size_t(d * channel_stride + i * step_stride)]);
    for (int64_t t = 0; t < T; ++t) {
      past.push_back(xs[size_t(d * T + t)]);
      double sum = biased ? bs[size_t(d)] : 0;
      for (int64_t i = 0; i < W; ++i) sum += ws[size_t(i * D + d)] * past[past.size() - size_t(W - i)];
      ys[size_t(d * T + t)] = activated(activation, sum);
    }
    for (int64_t i = 0; i < S; ++i)
      states[size_t(d * channel_stride + i * step_stride)] = past[past.size() - size_t(S - i)];
  }
  begin_case("causal", type, "channels %d of %d to %d width %d state %d steps %d activation %d rows %d", int(D),
             int(first), int(last), int(W), int(S), int(T), int(activation), int(rows));
  const auto& kernels = of_type(omniconv::causal_tables(), type);
  kernels.update({D, W, w.at(0), biased ? b.at(0) : nullptr, activation}, first, last, T, x.at(0),
                 {state.at(0), S, channel_stride, step_stride}, y.at(0), Scratch(kernels.scratch_bytes(W)).data());
  check("y", y, type, ys);
  check("state", state, type, states);
}

// Positions of one channel that are made again, each of the taps of its own sequence.
void causal_boundaries(Random& random, Type type) {
  const int64_t D = random.between(1, 3), W = random.between(1, 5), T = random.size(vector_lanes()),
                channel = random.between(0, D - 1);
  const bool biased = random.one_in(2);
  const omniconv::Activation activation = exact_activation(random);
  const std::vector<double> xs = random.integers(T, 4), ws = random.integers(W * D, 3), bs = random.integers(D, 9);
  std::vector<double> ys = random.integers(T, 9);
  std::vector<int64_t> owner, at;
  for (int64_t t = 0; t < T; ++t) {
    owner.push_back(t && random.one_in(2) ? owner.back() : random.between(-1, 5));
    if (random.one_in(2)) at.push_back(t);
  }
  const Type sums = accumulator(type);
  const Array x(type, xs), w(sums, ws), b(sums, bs), y(type, ys);
  for (int64_t t : at) {
    double sum = biased ? bs[size_t(channel)] : 0;
    for (int64_t i = 0; i < W; ++i) {
      const int64_t p = t + i - (W - 1);
      if (p >= 0 && owner[size_t(p)] == owner[size_t(t)]) sum += ws[size_t(i * D + channel)] * xs[size_t(p)];
    }
    ys[size_t(t)] = owner[size_t(t)] < 0 ? 0 : activated(activation, sum);
  }
  begin_case("causal boundaries", type, "channel %d of %d width %d steps %d", int(channel), int(D), int(W), int(T));
  of_type(omniconv::causal_tables(), type)
      .fixup_boundaries({D, W, w.at(0), biased ? b.at(0) : nullptr, activation}, channel, owner.data(), at.data(),
                        int64_t(at.size()), x.at(0), y.at(0));
  check("y", y, type, ys);
}

// ---- lightweight

omniconv::LightweightGeometry lightweight_geometry(const Window& p, omniconv::Activation activation) {
  const int64_t channels = p.heads * p.group;
  const auto x = steps(p, channels, p.length), y = steps(p, channels, p.outputs);
  return {p.length,
          p.outputs,
          channels,
          p.group,
          p.kernel,
          p.dilation,
          p.before,
          x.first,
          x.second,
          channels * p.length,
          y.first,
          y.second,
          channels * p.outputs,
          p.mode,
          activation,
          true};
}

void lightweight_forward(Random& random, Type type) {
  const Window p = random_window(random, false);
  const int64_t C = p.heads * p.group;
  const omniconv::LightweightGeometry g = lightweight_geometry(p, exact_activation(random));
  const std::vector<double> xs = random.integers(C * p.length, 4), ws = random.integers(p.heads * p.kernel, 3),
                            bs = random.integers(C, 9);
  const std::vector<uint8_t> hidden = random.mask(p.length), none = random.mask(p.outputs);
  const uint8_t *mask = random.one_in(3) ? hidden.data() : nullptr, *zeroed = random.one_in(3) ? none.data() : nullptr;
  const bool biased = random.one_in(2);
  std::vector<double> ys(size_t(C * p.outputs));
  for (int64_t c = 0; c < C; ++c) {
    const auto y = [&](int64_t t) -> double& { return ys[size_t(t * g.y_step + c * g.y_channel)]; };
    for (int64_t t = 0; t < p.outputs; ++t) y(t) = biased ? bs[size_t(c)] : 0;
    for_each_product(p, mask, [&](int64_t t, int64_t i, int64_t at) {
      y(t) += ws[size_t(c / p.group * p.kernel + i)] * xs[size_t(at * g.x_step + c * g.x_channel)];
    });
    for (int64_t t = 0; t < p.outputs; ++t) y(t) = zeroed && zeroed[t] ? 0 : activated(g.activation, y(t));
  }
  const Type sums = accumulator(type);
  const Array x(type, xs), w(sums, ws), b(sums, bs), y(type, C * p.outputs);
  begin_case("lightweight", type, WINDOW " zeroed %d activation %d", WINDOW_OF(p, mask), int(zeroed != nullptr),
             int(g.activation));
  const auto& kernels = of_type(omniconv::lightweight_tables(), type);
  const Scratch scratch(kernels.scratch_bytes(g));
  const int64_t middle = random.between(0, p.outputs);
  for (const auto& part : {std::make_pair(int64_t(0), middle), std::make_pair(middle, p.outputs)})
    if (part.first < part.second)
      kernels.forward(g, 0, C, part.first, part.second, x.at(0), w.at(0), biased ? b.at(0) : nullptr, mask, zeroed,
                      y.at(0), scratch.data());
  check("y", y, type, ys);
}

void lightweight_gradient(Random& random, Type type) {
  const Window p = random_window(random, true);
  const omniconv::LightweightGeometry g = lightweight_geometry(p, omniconv::kNone);
  const int64_t C = p.heads * p.group, samples = random.between(1, 2), h0 = random.between(0, p.heads - 1),
                h1 = random.between(h0 + 1, p.heads);
  const std::vector<double> xs = random.integers(samples * g.x_sample, 4),
                            gs = random.integers(samples * g.y_sample, 4);
  const std::vector<uint8_t> hidden = random.mask(samples * p.length);
  const uint8_t* mask = random.one_in(3) ? hidden.data() : nullptr;
  std::vector<double> weights = random.integers(p.heads * p.kernel, 9), biases = random.integers(C, 9);
  const Type sums = accumulator(type);
  const Array x(type, xs), grad_y(type, gs), grad_w(sums, weights), grad_b(sums, biases);
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = h0 * p.group; c < h1 * p.group; ++c) {
      const auto grad = [&](int64_t t) { return gs[size_t(n * g.y_sample + t * g.y_step + c * g.y_channel)]; };
      for_each_product(p, mask ? mask + n * p.length : nullptr, [&](int64_t t, int64_t i, int64_t at) {
        weights[size_t(c / p.group * p.kernel + i)] +=
            grad(t) * xs[size_t(n * g.x_sample + at * g.x_step + c * g.x_channel)];
      });
      for (int64_t t = 0; t < p.outputs; ++t) biases[size_t(c)] += grad(t);
    }
  begin_case("lightweight grad_weight", type, WINDOW " samples %d heads %d to %d", WINDOW_OF(p, mask), int(samples),
             int(h0), int(h1));
  const auto& kernels = of_type(omniconv::lightweight_tables(), type);
  kernels.grad_weight(g, h0 * p.group, h1 * p.group, samples, x.at(0), grad_y.at(0), mask, grad_w.at(0), grad_b.at(0),
                      Scratch(kernels.scratch_bytes(g)).data());
  check("grad_weight", grad_w, sums, weights);
  check("grad_bias", grad_b, sums, biases);
}

// Equal logits: each weight is one over their number, a power of two.
void lightweight_softmax(Random& random, Type type) {
  const int64_t heads = random.between(1, 20), taps = random.of({1, 2, 4, 8, 16, 32, 64});
  const Type sums = accumulator(type);
  const Array w(sums, std::vector<double>(size_t(heads * taps), double(random.between(-50, 50))));
  begin_case("lightweight softmax", type, "heads %d taps %d", int(heads), int(taps));
  of_type(omniconv::lightweight_tables(), type).softmax(heads, taps, w.at(0));
  check("weight", w, sums, std::vector<double>(size_t(heads * taps), 1.0 / double(taps)));
}

// ---- dynamic

void dynamic(Random& random, Type type) {
  Window p = random_window(random, random.one_in(2));
  // of one head, or of some that have few channels and lie side by side
  if (p.time_first) p.heads = 1;
  else p.heads = std::min(p.heads, std::max<int64_t>(1, 16 / p.group));
  const int64_t C = p.heads * p.group, positions = random.one_in(4) ? 1 : p.outputs;
  const auto xl = steps(p, C, p.length), yl = steps(p, C, p.outputs);
  omniconv::DynamicGeometry g{};
  g.length = p.length, g.outputs = p.outputs, g.heads = p.heads, g.group = p.group, g.kernel = p.kernel,
  g.dilation = p.dilation, g.before = p.before;
  g.x_step = xl.first, g.x_channel = xl.second, g.y_step = yl.first, g.y_channel = yl.second, g.positions = positions;
  g.scale = 1, g.mode = p.mode, g.activation = exact_activation(random);
  const std::vector<double> xs = random.integers(C * p.length, 3),
                            ws = random.integers(p.heads * p.kernel * positions, 3);
  const std::vector<double> bs = random.integers(C, 9), gs = random.integers(C * p.outputs, 3);
  const std::vector<uint8_t> hidden = random.mask(p.length);
  const uint8_t* mask = random.one_in(3) ? hidden.data() : nullptr;
  const bool biased = random.one_in(2);
  const auto weight_at = [&](int64_t h, int64_t i, int64_t t) {
    return size_t((h * p.kernel + i) * positions + (positions == 1 ? 0 : t));
  };
  const auto x_at = [&](int64_t c, int64_t t) { return size_t(t * g.x_step + c * g.x_channel); };
  const auto y_at = [&](int64_t c, int64_t t) { return size_t(t * g.y_step + c * g.y_channel); };
  std::vector<double> ys(gs.size()), grad_xs(xs.size()), grad_ws(ws.size());
  for (int64_t c = 0; c < C; ++c) {
    const int64_t h = c / p.group;
    for (int64_t t = 0; t < p.outputs; ++t) ys[y_at(c, t)] = biased ? bs[size_t(c)] : 0;
    for_each_product(p, mask, [&](int64_t t, int64_t i, int64_t at) {
      ys[y_at(c, t)] += ws[weight_at(h, i, t)] * xs[x_at(c, at)];
      grad_xs[x_at(c, at)] += ws[weight_at(h, i, t)] * gs[y_at(c, t)];
      grad_ws[weight_at(h, i, t)] += gs[y_at(c, t)] * xs[x_at(c, at)];
    });
    for (int64_t t = 0; t < p.outputs; ++t) ys[y_at(c, t)] = activated(g.activation, ys[y_at(c, t)]);
  }
  const Array x(type, xs), w(type, ws), b(accumulator(type), bs), grad_y(type, gs);
  const Array y(type, C * p.outputs), grad_x(type, C * p.length), grad_w(type, int64_t(ws.size()));
  // all positions [0, n), in one part or in two
  const auto in_parts = [&](int64_t n, const auto& f) {
    const int64_t middle = random.between(0, n);
    if (middle) f(int64_t(0), middle);
    if (middle < n) f(middle, n);
  };
  const auto& kernels = of_type(omniconv::dynamic_tables(), type);
  begin_case("dynamic", type, WINDOW " positions %d activation %d", WINDOW_OF(p, mask), int(positions),
             int(g.activation));
  in_parts(p.outputs, [&](int64_t from, int64_t to) {
    kernels.forward(g, from, to, x.at(0), w.at(0), biased ? b.at(0) : nullptr, mask, y.at(0),
                    Scratch(kernels.forward_bytes(g)).data());
  });
  check("y", y, type, ys);
  if (p.mode != omniconv::kZeros) return;
  const auto& gradients = of_type(omniconv::dynamic_grad_tables(), type);
  begin_case("dynamic_grad input", type, WINDOW " positions %d", WINDOW_OF(p, mask), int(positions));
  in_parts(p.length, [&](int64_t from, int64_t to) {
    gradients.grad_input(g, from, to, grad_y.at(0), w.at(0), mask, grad_x.at(0),
                         Scratch(gradients.grad_input_bytes(g)).data());
  });
  check("grad_x", grad_x, type, grad_xs);
  begin_case("dynamic_grad kernels", type, WINDOW " positions %d", WINDOW_OF(p, mask), int(positions));
  const auto grad_kernels = [&](int64_t from, int64_t to) {
    gradients.grad_kernels(g, from, to, grad_y.at(0), x.at(0), w.at(0), mask, grad_w.at(0),
                           Scratch(gradients.grad_kernels_bytes(g)).data());
  };
  if (positions == 1) grad_kernels(0, p.outputs);
  else in_parts(p.outputs, grad_kernels);
  check("grad_kernels", grad_w, type, grad_ws);
}

}  // namespace

void run_causal(int64_t cases) { run_cases(cases, {causal_update, causal_boundaries}); }
void run_lightweight(int64_t cases) {
  run_cases(cases, {lightweight_forward, lightweight_gradient, lightweight_softmax});
}
void run_dynamic(int64_t cases) { run_cases(cases, {dynamic}); }

}  // namespace portable
