// The instruction sets that kernels are compiled for, and which of them runs.
#pragma once
#include <cstdint>
#include <initializer_list>

// The levels of this processor family, lowest first; a level runs whatever the levels below it run. CMake compiles the
// kernels for each of them.
#if defined(__x86_64__)
#define OMNICONV_LEVELS(X, ...) X(base, __VA_ARGS__) X(avx2, __VA_ARGS__) X(avx512, __VA_ARGS__)
#else
#define OMNICONV_LEVELS(X, ...) X(base, __VA_ARGS__)
#endif

namespace omniconv {

#define OMNICONV_LEVEL_NAME(level, ...) level,
#define OMNICONV_LEVEL_COUNT(level, ...) +1
enum class Isa : int64_t { OMNICONV_LEVELS(OMNICONV_LEVEL_NAME) };
constexpr int64_t kLevels = OMNICONV_LEVELS(OMNICONV_LEVEL_COUNT);

// Accumulators (float) in the widest vector of all levels.
constexpr int64_t kMaxLanes = 16;

// Returns the level in force: the best that this machine has, capped by OMNICONV_ISA, unless a test has lowered it
// through omniconv_isa.
Isa isa();

// The kernel tables of one name at the levels that they were compiled for. A level without one runs that of the best
// level below it.
template <class Tables> class ByLevel {
 public:
  struct Compiled {
    Isa level;
    const Tables* tables;
  };
  constexpr ByLevel(std::initializer_list<Compiled> lowest_first) : tables_() {
    for (const Compiled& c : lowest_first)
      for (int64_t level = int64_t(c.level); level < kLevels; ++level) tables_[level] = c.tables;
  }
  // Returns the tables that a level runs, or null where neither it nor a level below it has them.
  constexpr const Tables* at(Isa level) const { return tables_[int64_t(level)]; }

 private:
  const Tables* tables_[kLevels];
};

#define OMNICONV_DECLARE_TABLE(level, Tables, name) \
  namespace isa_##level {                           \
    extern const Tables name;                       \
  }
#define OMNICONV_COMPILED_TABLE(level, Tables, name) {Isa::level, &isa_##level::name},

// KERNEL_TABLE_AT(LEVELS, Tables, name) defines find_<name>(), which returns the tables `name` of the level in force,
// or null. LEVELS lists, as OMNICONV_LEVELS does, the levels that the file defining them is compiled for.
#define KERNEL_TABLE_AT(LEVELS, Tables, name)                                                 \
  LEVELS(OMNICONV_DECLARE_TABLE, Tables, name)                                                \
  static const Tables* find_##name() {                                                        \
    static constexpr ByLevel<Tables> by_level{LEVELS(OMNICONV_COMPILED_TABLE, Tables, name)}; \
    return by_level.at(isa());                                                                \
  }

// KERNEL_TABLE(Tables, name) defines <name>_tables(), the tables `name` of the level in force: for files that are
// compiled for every level.
#define KERNEL_TABLE(Tables, name)               \
  KERNEL_TABLE_AT(OMNICONV_LEVELS, Tables, name) \
  static const Tables& name##_tables() { return *find_##name(); }

}  // namespace omniconv
