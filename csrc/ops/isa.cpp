// Which instruction set runs: what the processor has, capped by the user, lowered by tests.
#include "ops/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace omniconv {
namespace {

// Returns the best level of which the processor has every flag that the level was compiled with: else an odd one would
// die of an illegal instruction.
Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Clang 16's __builtin_cpu_supports knows no "f16c"
  unsigned eax, ebx, ecx = 0, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

// Returns the level that OMNICONV_ISA names, or the highest: Python has refused names that it does not know.
Isa cap() {
#define OMNICONV_LEVEL_TEXT(level, ...) #level,
  constexpr const char* kNames[] = {OMNICONV_LEVELS(OMNICONV_LEVEL_TEXT)};
  const char* asked = std::getenv("OMNICONV_ISA");
  for (int64_t level = 0; asked && level < kLevels; ++level)
    if (!std::strcmp(asked, kNames[level])) return Isa(level);
  return Isa(kLevels - 1);
}

Isa best_isa() {
  static const Isa best = std::min(detect(), cap());
  return best;
}

std::atomic<int64_t> lowered{-1};  // by a test; negative: not at all

#if defined(__x86_64__)
// Tables may be missing at a level: between two that have them, and below the first.
constexpr int kLow = 0, kHigh = 0;
constexpr ByLevel<int> kGap{{Isa::base, &kLow}, {Isa::avx512, &kHigh}}, kLate{{Isa::avx2, &kHigh}};
static_assert(kGap.at(Isa::base) == &kLow && kGap.at(Isa::avx2) == &kLow && kGap.at(Isa::avx512) == &kHigh);
static_assert(!kLate.at(Isa::base) && kLate.at(Isa::avx2) == &kHigh && kLate.at(Isa::avx512) == &kHigh);
#endif

}  // namespace

Isa isa() {
  const int64_t level = lowered.load(std::memory_order_relaxed);
  return level < 0 ? best_isa() : Isa(level);
}

}  // namespace omniconv

// Reached from Python through ctypes: sets the level to at most the best one (a negative level sets the best; INT64_MIN
// leaves it) and returns the one in force.
extern "C" __attribute__((visibility("default"))) int64_t omniconv_isa(int64_t level) {
  using namespace omniconv;
  if (level != INT64_MIN) lowered = level < 0 ? -1 : std::min(level, int64_t(best_isa()));
  return int64_t(isa());
}
