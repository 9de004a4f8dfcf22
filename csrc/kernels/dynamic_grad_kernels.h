// The gradient of a dynamic convolution's kernels: a product of grad_y and x, which goes back through the softmax; its
// weights are made anew. Included by kernels only; internal linkage.
#pragma once
#include "kernels/dynamic_grad_blocks.h"

namespace omniconv {
namespace {

// The gradient of head h's numbers at positions [t, t + n), from that of its weights, whose rows are changed.
template <class E, class A>
NOINLINE void softmax_backward(const DynamicGeometry& g, int64_t h, const void* kernels, int64_t t, int64_t n, A* table,
                               int64_t tile, A* largest, A* grad_weights, void* grad_kernels) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  if (g.softmax) make_weights<E>(g, h, kernels, t, n, table, tile, largest);
  drop_weights(g, h, t, n, grad_weights, tile);
  E* grad = (E*)grad_kernels + h * g.kernel * g.positions + t;
  for (int64_t p = 0; p < n; p += L) {
    V dot{};
    for (int64_t i = 0; g.softmax && i < g.kernel; ++i)
      dot += load(table + i * tile + p) * load(grad_weights + i * tile + p);
    for (int64_t i = 0; i < g.kernel; ++i) {
      const V d = load(grad_weights + i * tile + p);
      store_part<A>(grad + i * g.positions + p, g.softmax ? load(table + i * tile + p) * (d - dot) : d, n - p);
    }
  }
}

// The same of one kernel for all positions, whose weights' gradients are rows of n positions, in whole vectors, to be
// added up.
template <class E, class A>
NOINLINE void softmax_backward_of_column(const DynamicGeometry& g, int64_t h, const void* kernels, A* column,
                                         A* grad_weights, int64_t tile, int64_t n, void* grad_kernels) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  const int64_t K = g.kernel;
  make_column<E>(g, h, kernels, column);
  for (int64_t i = 0; i < K; i += L) {
    V row[L] = {};
    for (int64_t r = 0; r < min64(L, K - i); ++r)
      for (int64_t p = 0; p < n; p += L) row[r] += load(grad_weights + (i + r) * tile + p);
    store(grad_weights + i, lane_sums<A>(row));  // over rows before these, or their first vectors
  }
  drop_column(g, h, grad_weights);
  A dot = 0;
  if (g.softmax) {
    V lanes[L] = {};
    for (int64_t i = 0; i < K; i += L)
      lanes[0] += load_part<A>(column + i, K - i) * load_part<A>(grad_weights + i, K - i);
    dot = lane_sums<A>(lanes)[0];
  }
  for (int64_t i = 0; i < K; i += L) {
    const V d = load(grad_weights + i);
    store_part<A>((E*)grad_kernels + h * K + i, g.softmax ? load(column + i) * (d - broadcast(dot)) : d, K - i);
  }
}

// What knows the element type besides the edges of a tile.
template <class A> struct SoftmaxBackward {
  void (*of_tile)(const DynamicGeometry&, int64_t, const void*, int64_t, int64_t, A*, int64_t, A*, A*, void*);
  void (*of_column)(const DynamicGeometry&, int64_t, const void*, A*, A*, int64_t, int64_t, void*);
};

template <class A> struct GradKernels {
  static constexpr int64_t L = Vec<A>::lanes;
  bool in_place;  // channels side by side are read where they lie
  bool products;  // of grad_y and x, whose loads serve several outputs; else tap by tap
  int64_t tile, row, pack, taps_row;
  Arena arena;
  A *table, *grad_weights, *largest, *column, *x, *grad_y, *taps;
  const A** rows_of_x;
  Segment* segment;

  GradKernels(const DynamicGeometry& g, const Edges<A>& edges, void* scratch)
      : in_place(!edges.converts && g.x_channel == 1 && g.y_channel == 1 && g.group % L == 0 && has_few_sums(g)),
        products(!in_place && g.dilation == 1 && g.group >= 16 && (g.kernel >= 8 || g.x_step != 1)),
        tile(tile_of<A>(g, 12288)),
        arena{uintptr_t(scratch)} {
    const int64_t rows = TileInput(tile, g.kernel, g.dilation).rows;
    row = round_up(rows, kUnit) + 3 * kUnit + Vec<float>::lanes;
    pack = products ? 2 * kPack : kPack;
    taps_row = ((kMargin + g.kernel + kRows + 2 * L - 1) / L | 1) *
               L;  // an odd number of vectors: L1 would hold few rows of another
    table = arena.take<A>(g.kernel * tile);
    grad_weights = arena.take<A>((g.positions == 1 ? g.heads : 1) * g.kernel * tile);
    largest = arena.take<A>(tile);
    column = arena.take<A>(g.kernel + 2 * kUnit);
    x = arena.take<A>(in_place ? g.group : pack * row);  // in place: zeros
    grad_y = arena.take<A>(in_place ? 0 : pack * row);
    rows_of_x = arena.take<const A*>(in_place ? rows : 0);
    taps = arena.take<A>(products ? tile * taps_row : 0);
    segment = arena.take<Segment>(rows);
  }
  // Three operations a sum, against two transpositions of what the sums are made from and products with what no tap
  // meets.
  static bool has_few_sums(const DynamicGeometry& g) {
    const int64_t met = g.dilation == 1 ? round_up(g.kernel + kRows - 1, L) : 2 * g.kernel;
    return 3 * g.kernel <= (12 + met - g.kernel) * (g.group / L);
  }
  static constexpr int64_t kMargin = 16;  // before the first tap: what the later outputs of a block do not read
};

template <class A>
void grad_kernels_tiles(const DynamicGeometry& g, const Edges<A>& edges, const SoftmaxBackward<A>& softmax_backward,
                        int64_t first, int64_t last, const char* grad_y, const char* x, const void* kernels,
                        const uint8_t* mask, void* grad, void* scratch) {
  typedef typename Vec<A>::V V;
  constexpr int64_t L = Vec<A>::lanes;
  GradKernels<A> f(g, edges, scratch);
  const int64_t K = g.kernel, tile = f.tile, element = edges.element;
  const bool one = g.positions == 1;
  const int64_t whole = round_up(min64(tile, g.outputs), L);  // positions of `grad_weights` that a tile may fill
  for (int64_t i = 0; one && i < g.heads * K; ++i)
    for (int64_t p = 0; p < whole; p += L) store(f.grad_weights + i * tile + p, V{});
  for (int64_t c = 0; f.in_place && c < g.group; c += L) store(f.x + c, V{});
  for (int64_t t = first; t < last; t += tile) {
    const int64_t n = min64(tile, last - t);
    const TileInput input(n, K, g.dilation);
    const Segments segments = segments_of(g, t, n, g.before, g.length, input, mask, f.segment);
    Segment here{0, n, t};
    const Segments outputs{&here, 1};
    if (f.in_place) {
      const NonzeroRows nonzero(segments, input, K, true);
      for (int64_t h = 0; h < g.heads; ++h) {
        const int64_t c = h * g.group;
        A* grad_weights = f.grad_weights + (one ? h * K * tile : 0);
        for (int64_t i = 0; !one && i < K; ++i)
          for (int64_t p = 0; p < n; p += L) store(grad_weights + i * tile + p, V{});
        point_rows(segments, (const A*)x + c, g.x_step, f.x, f.rows_of_x);
        add_grads_of_rows(f.rows_of_x, input, nonzero, (const A*)grad_y + c + t * g.y_step, g.y_step, g.group, n,
                          grad_weights, tile);
        if (!one) softmax_backward.of_tile(g, h, kernels, t, n, f.table, tile, f.largest, grad_weights, grad);
      }
      continue;
    }
    if (f.products) {
      int64_t low = input.rows, high = 0;
      for (const Segment& at : segments)
        if (at.from >= 0) low = min64(low, at.row), high = at.row + at.count;
      for (int64_t p = 0; p < round_up(n, L) * f.taps_row; p += L) store(f.taps + p, V{});
      for (int64_t c = 0; c < g.group; c += f.pack) {
        const int64_t many = min64(f.pack, g.group - c);
        const char* grads = grad_y + c * g.y_channel * element;
        edges.pack_channels(segments, x + c * g.x_channel * element, g.x_step, g.x_channel, many, f.x, f.row);
        const A* d = (const A*)grads + t * g.y_step;
        int64_t channel = g.y_channel, step = g.y_step;
        if (edges.converts) {
          edges.pack_channels(outputs, grads, g.y_step, g.y_channel, many, f.grad_y, f.row);
          d = f.grad_y, channel = f.row, step = 1;
        }
        add_products(f.x, f.row, low, high, d, channel, step, many, K, n, f.taps + f.kMargin, f.taps_row);
      }
      transpose_taps(f.taps + f.kMargin, f.taps_row, K, n, one, f.grad_weights, tile);
      if (!one) softmax_backward.of_tile(g, 0, kernels, t, n, f.table, tile, f.largest, f.grad_weights, grad);
      continue;
    }
    // heads of few channels are packed together, a head of many a part at a time
    for (int64_t c = 0; c < g.heads * g.group; c += kPack) {
      const int64_t many = min64(kPack, g.heads * g.group - c);
      edges.pack_channels(segments, x + c * g.x_channel * element, g.x_step, g.x_channel, many, f.x, f.row);
      edges.pack_channels(outputs, grad_y + c * g.y_channel * element, g.y_step, g.y_channel, many, f.grad_y, f.row);
      for (int64_t h = 0; h < g.heads; ++h) {
        A* grad_weights = f.grad_weights + (one ? h * K * tile : 0);
        for (int64_t p = 0; !one && c == 0 && p < K * tile; p += L) store(grad_weights + p, V{});
        add_grads_of_positions(f.x + h * g.group * f.row, f.row, input.step, f.grad_y + h * g.group * f.row,
                               g.heads == 1 ? many : g.group, K, n, grad_weights, tile);
        if (!one && c + kPack >= g.heads * g.group)
          softmax_backward.of_tile(g, h, kernels, t, n, f.table, tile, f.largest, grad_weights, grad);
      }
    }
  }
  for (int64_t h = 0; one && h < g.heads; ++h)
    softmax_backward.of_column(g, h, kernels, f.column, f.grad_weights + h * K * tile, tile, whole, grad);
}

template <class E> size_t grad_kernels_bytes(const DynamicGeometry& g) {
  return GradKernels<typename Accumulator<E>::type>(g, edges<E>, nullptr).arena.at;
}
template <class E>
void grad_kernels(const DynamicGeometry& g, int64_t first, int64_t last, const void* grad_y, const void* x,
                  const void* kernels, const uint8_t* mask, void* grad, void* scratch) {
  typedef typename Accumulator<E>::type A;
  static constexpr SoftmaxBackward<A> backward{softmax_backward<E, A>, softmax_backward_of_column<E, A>};
  grad_kernels_tiles<A>(g, edges<E>, backward, first, last, (const char*)grad_y, (const char*)x, kernels, mask, grad,
                        scratch);
}

}  // namespace
}  // namespace omniconv
