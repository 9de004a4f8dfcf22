// Dynamic convolution and the gradient of its input; compiled once per instruction set (CMake defines ISA, the
// namespace, and VECTOR_BYTES).
//
// The weights of a tile of positions are made in L1 and serve all channels of the head. The gradient of the input is
// the same convolution of grad_y, by weights that are each moved to the position they reach.
#include "kernels/dynamic_grad_kernels.h"

namespace omniconv {
namespace ISA {
namespace {

// ---- forward

template <class A> struct Forward {
  int64_t tile;
  A *table, *largest, *column;
  Segment* segment;
  Arena arena;
  TileConvolution<A> convolution;

  Forward(const DynamicGeometry& g, const Edges<A>& edges, void* scratch)
      : tile(tile_of<A>(g, 16384)),
        arena{uintptr_t(scratch)},
        convolution((table = arena.take<A>(g.kernel * tile), largest = arena.take<A>(tile),
                     column = arena.take<A>(g.kernel + 2 * kUnit),
                     segment = arena.take<Segment>(TileInput(tile, g.kernel, g.dilation).rows), arena),
                    g, edges, tile, TileInput(tile, g.kernel, g.dilation).rows, g.x_step == 1) {}
};

// Row i of n whole vectors is column[i].
template <class A> void repeat_column(const A* column, int64_t K, int64_t n, A* table, int64_t stride) {
  for (int64_t i = 0; i < K; ++i)
    for (int64_t t = 0; t < n; t += Vec<A>::lanes) store(table + i * stride + t, broadcast(column[i]));
}

template <class A>
void forward_tiles(const DynamicGeometry& g, const Edges<A>& edges, int64_t first, int64_t last, const void* x,
                   const void* kernels, const A* bias, const uint8_t* mask, char* y, void* scratch) {
  Forward<A> f(g, edges, scratch);
  const int64_t K = g.kernel, tile = f.tile;
  f.convolution.from_step = g.x_step;
  f.convolution.from_channel = g.x_channel;
  f.convolution.to_step = g.y_step;
  f.convolution.to_channel = g.y_channel;
  f.convolution.activation = g.activation;
  f.convolution.skips = g.softmax;  // of any numbers an infinity shows, times zero
  f.convolution.set_bias(bias);
  for (int64_t t = first; t < last; t += tile) {
    const int64_t n = min64(tile, last - t);
    const TileInput input(n, K, g.dilation);
    const Segments segments = segments_of(g, t, n, g.before, g.length, input, mask, f.segment);
    f.convolution.run(segments, input, f.table, tile, n, x, y + t * g.y_step * edges.element, [&](int64_t h) {
      if (g.positions != 1) {
        edges.make_weights(g, h, kernels, t, n, f.table, tile, f.largest);
        return drop_weights(g, h, t, n, f.table, tile);
      }
      if (g.heads == 1 && t != first) return;
      edges.make_column(g, h, kernels, f.column);
      drop_column(g, h, f.column);
      repeat_column(f.column, K, n, f.table, tile);
    });
  }
}

template <class E> size_t forward_bytes(const DynamicGeometry& g) {
  return Forward<typename Accumulator<E>::type>(g, edges<E>, nullptr).arena.at;
}
template <class E>
void forward(const DynamicGeometry& g, int64_t first, int64_t last, const void* x, const void* kernels,
             const void* bias, const uint8_t* mask, void* y, void* scratch) {
  typedef typename Accumulator<E>::type A;
  forward_tiles<A>(g, edges<E>, first, last, x, kernels, (const A*)bias, mask, (char*)y, scratch);
}

template <class E> void drop_head(const DynamicGeometry& g, void* numbers) {
  typedef typename Accumulator<E>::type A;
  drop_weights(g, 0, 0, g.positions, (A*)numbers, g.positions);
}

// ---- the gradient of the input

// How many positions of x a tile has: their weights are those of K − 1 more outputs, so that a short tile makes many of
// them twice.
int64_t input_tile(const DynamicGeometry& g) {
  return round_up(min64(max64(256, g.dilation * (g.kernel - 1)), g.length), kUnit);
}

template <class A> struct GradInput {
  int64_t tile, outputs;  // positions of x, and of y whose weights they need
  A *table, *moved, *largest, *column;
  Segment* segment;
  Arena arena;
  TileConvolution<A> convolution;

  GradInput(const DynamicGeometry& g, const Edges<A>& edges, void* scratch)
      : tile(input_tile(g)),
        outputs(round_up(min64(tile + g.dilation * (g.kernel - 1), g.outputs), kUnit) + kUnit),
        arena{uintptr_t(scratch)},
        convolution(
            (table = arena.take<A>(g.positions == 1 ? 0 : g.kernel * outputs), moved = arena.take<A>(g.kernel * tile),
             largest = arena.take<A>(outputs), column = arena.take<A>(g.kernel + 2 * kUnit),
             segment = arena.take<Segment>(TileInput(tile, g.kernel, g.dilation).rows), arena),
            g, edges, tile, TileInput(tile, g.kernel, g.dilation).rows, g.y_step == 1) {}
};

// Weights of outputs [from, to), in rows or one column, become rows of the n positions that they reach: position p
// meets output low + i·dilation + p by tap K − 1 − i. Outside of the outputs the weight is 0, whatever the numbers
// hold.
template <class A>
NOINLINE void move_weights(const DynamicGeometry& g, int64_t low, int64_t from, int64_t to, int64_t n, const A* column,
                           const A* table, int64_t stride, A* moved, int64_t tile) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t K = g.kernel, dilation = g.dilation;
  for (int64_t i = 0; i < K; ++i) {
    const int64_t base = low + i * dilation;
    const int64_t left = min64(max64(from - base, 0), n), right = max64(min64(to - base, n), left);
    A* row = moved + i * tile;
    for (int64_t p = 0; p < n; p += L) store(row + p, V{});
    const A* weights = table + (K - 1 - i) * stride + base - from;
    for (int64_t p = left; p < right; p += L)
      store_part<A>(row + p, column ? broadcast(column[K - 1 - i]) : load_part<A>(weights + p, right - p), right - p);
  }
}

template <class A>
void grad_input_tiles(const DynamicGeometry& g, const Edges<A>& edges, int64_t first, int64_t last, const void* grad_y,
                      const void* kernels, const uint8_t* mask, char* grad_x, void* scratch) {
  GradInput<A> f(g, edges, scratch);
  const int64_t K = g.kernel, tile = f.tile, halo = g.dilation * (K - 1), before = halo - g.before;
  f.convolution.from_step = g.y_step;
  f.convolution.from_channel = g.y_channel;
  f.convolution.to_step = g.x_step;
  f.convolution.to_channel = g.x_channel;
  f.convolution.activation = kNone;
  f.convolution.skips = true;
  f.convolution.set_bias(nullptr);
  for (int64_t s = first; s < last; s += tile) {
    const int64_t n = min64(tile, last - s), low = s - before;  // output `low` is what tap K − 1 of position s meets
    const int64_t from = min64(max64(low, 0), g.outputs), to = max64(min64(low + n + halo, g.outputs), from);
    const TileInput input(n, K, g.dilation);
    const Segments segments = segments_of(g, s, n, before, g.outputs, input, nullptr, f.segment);
    char* out = grad_x + s * g.x_step * edges.element;
    f.convolution.run(segments, input, f.moved, tile, n, grad_y, out, [&](int64_t h) {
      if (g.positions == 1) {
        edges.make_column(g, h, kernels, f.column);
        drop_column(g, h, f.column);
      } else if (to > from) {
        edges.make_weights(g, h, kernels, from, to - from, f.table, f.outputs, f.largest);
        drop_weights(g, h, from, to - from, f.table, f.outputs);
      }
      move_weights(g, low, from, to, n, g.positions == 1 ? f.column : nullptr, f.table, f.outputs, f.moved, tile);
    });
    if (mask) edges.clear_masked(mask + s, n, g.heads * g.group, out, g.x_step, g.x_channel);
  }
}

template <class E> size_t grad_input_bytes(const DynamicGeometry& g) {
  return GradInput<typename Accumulator<E>::type>(g, edges<E>, nullptr).arena.at;
}
template <class E>
void grad_input(const DynamicGeometry& g, int64_t first, int64_t last, const void* grad_y, const void* kernels,
                const uint8_t* mask, void* grad_x, void* scratch) {
  grad_input_tiles(g, edges<E>, first, last, grad_y, kernels, mask, (char*)grad_x, scratch);
}

}  // namespace

extern const DynamicTables dynamic;
#define OMNICONV_KERNELS(E) {forward_bytes<E>, forward<E>, drop_head<E>}
const DynamicTables dynamic = {OMNICONV_KERNELS(float), OMNICONV_KERNELS(double), OMNICONV_KERNELS(bf16),
                               OMNICONV_KERNELS(f16)};
#undef OMNICONV_KERNELS

extern const DynamicGradTables dynamic_grad;
#define OMNICONV_KERNELS(E) {grad_input_bytes<E>, grad_input<E>, grad_kernels_bytes<E>, grad_kernels<E>}
const DynamicGradTables dynamic_grad = {OMNICONV_KERNELS(float), OMNICONV_KERNELS(double), OMNICONV_KERNELS(bf16),
                                        OMNICONV_KERNELS(f16)};

}  // namespace ISA
}  // namespace omniconv
