// Sums of contiguous numbers; compiled once per instruction set.
#include "kernels/sum.h"

#include "simd/vec.h"

namespace omniconv {
namespace ISA {
namespace {

template <class E> void add_up(const void* xv, int64_t n, void* sumv) {
  typedef typename Accumulator<E>::type A;
  constexpr int64_t L = Vec<A>::lanes;
  const E* x = (const E*)xv;
  typename Vec<A>::V sum[4] = {};  // an addition takes four cycles
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) sum[q] += load(x + i + q * L);
  }
  for (; i + L <= n; i += L) sum[0] += load(x + i);
  if (i < n) {
    E rest[L] = {};
    __builtin_memcpy(rest, x + i, (n - i) * sizeof(E));
    sum[1] += load(rest);
  }
  sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  A all = 0;
  for (int64_t l = 0; l < L; ++l) all += sum[0][l];
  *(A*)sumv += all;
}

}  // namespace

extern const SumTables sum;
const SumTables sum = {add_up<float>, add_up<double>, add_up<bf16>, add_up<f16>};

}  // namespace ISA
}  // namespace omniconv
