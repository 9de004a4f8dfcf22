#include "ops/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace omniconv {
namespace {

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Clang 16's __builtin_cpu_supports knows no "f16c"
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  // every flag that a level was compiled with, or an odd CPU dies of an illegal instruction
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : avx2 ? kAvx2 : kBase;
#else
  return kBase;
#endif
}

Isa capped() {
  const char* asked = std::getenv("OMNICONV_ISA");
  const Isa cap = !asked ? kAvx512 : !std::strcmp(asked, "base") ? kBase : !std::strcmp(asked, "avx2") ? kAvx2 : kAvx512;
  return std::min(detect(), cap);
}

}  // namespace

static std::atomic<int64_t> current{-1};

Isa best_isa() {
  static const Isa best = capped();
  return best;
}

Isa isa() {
  const int64_t chosen = current.load(std::memory_order_relaxed);
  return chosen < 0 ? best_isa() : Isa(chosen);
}

}  // namespace omniconv

// Reached from Python through ctypes: sets the level to at most the best one (a negative level sets the best; INT64_MIN leaves it) and
// returns the one in force.
extern "C" __attribute__((visibility("default"))) int64_t omniconv_isa(int64_t level) {
  using namespace omniconv;
  if (level != INT64_MIN) current = level < 0 ? -1 : std::min<int64_t>(level, best_isa());
  return isa();
}
