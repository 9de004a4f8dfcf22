// Dynamic convolution, forward; compiled once per instruction set (CMake defines ISA, the namespace, and VECTOR_BYTES).
//
// The weights of a tile of positions are made in L1 and serve all channels of the head.
#include "kernels/dynamic_apply.h"

#ifndef ISA
#define ISA isa_base
#endif

namespace omniconv {
namespace ISA {
namespace {

template <class E, class A> struct Forward {
  int64_t tile;
  A *table, *most, *column;
  Span* span;
  Arena arena;
  Application<E, A> apply;

  Forward(const DynamicGeometry& g, void* scratch)
      : tile(tile_of<A>(g, 16384)),
        arena{uintptr_t(scratch)},
        apply((table = arena.take<A>(g.kernel * tile), most = arena.take<A>(tile), column = arena.take<A>(g.kernel + 2 * kUnit),
               span = arena.take<Span>(Reach(tile, g.kernel, g.dilation).rows), arena),
              g, tile, Reach(tile, g.kernel, g.dilation).rows, g.x_step == 1) {}
};

// Row i of n whole vectors is column[i].
template <class A> void repeat(const A* column, int64_t K, int64_t n, A* table, int64_t stride) {
  for (int64_t i = 0; i < K; ++i)
    for (int64_t t = 0; t < n; t += Vec<A>::lanes) store(table + i * stride + t, broadcast(column[i]));
}

template <class E> size_t forward_bytes(const DynamicGeometry& g) { return Forward<E, typename Accumulator<E>::type>(g, nullptr).arena.at; }

template <class E>
void forward(const DynamicGeometry& g, int64_t first, int64_t last, const void* x, const void* kernels, const void* bias, const uint8_t* mask, void* yv, void* scratch) {
  typedef typename Accumulator<E>::type A;
  Forward<E, A> f(g, scratch);
  const int64_t K = g.kernel, tile = f.tile;
  f.apply.from_step = g.x_step;
  f.apply.from_channel = g.x_channel;
  f.apply.to_step = g.y_step;
  f.apply.to_channel = g.y_channel;
  f.apply.activation = g.activation;
  f.apply.skips = g.softmax;  // of any numbers an infinity shows, times zero
  f.apply.set_bias((const A*)bias);
  for (int64_t t = first; t < last; t += tile) {
    const int64_t n = min64(tile, last - t);
    const Reach reach(n, K, g.dilation);
    const Spans spans = spans_of(g, t, n, g.before, g.length, reach, mask, f.span);
    f.apply.run(spans, reach, f.table, tile, n, (const E*)x, (E*)yv + t * g.y_step, [&](int64_t h) {
      if (g.positions != 1) {
        weigh(g, h, (const E*)kernels, t, n, f.table, tile, f.most);
        return drop_rows(g, h, t, n, f.table, tile);
      }
      if (g.heads == 1 && t != first) return;
      weigh_one(g, h, (const E*)kernels, f.column);
      drop_one(g, h, f.column);
      repeat(f.column, K, n, f.table, tile);
    });
  }
}

template <class E> void drop_head(const DynamicGeometry& g, void* numbers) {
  typedef typename Accumulator<E>::type A;
  drop_rows(g, 0, 0, g.positions, (A*)numbers, g.positions);
}

}  // namespace

extern const DynamicTables dynamic;
#define OMNICONV_KERNELS(E) \
  {forward_bytes<E>, forward<E>, drop_head<E>}
const DynamicTables dynamic = {OMNICONV_KERNELS(float), OMNICONV_KERNELS(double), OMNICONV_KERNELS(bf16), OMNICONV_KERNELS(f16)};

}  // namespace ISA
}  // namespace omniconv
