// Runs the kernel tables, without torch, at every level that this processor has: whole numbers against plain loops, to
// the bit.
//
//   portable [cases]      random problems a table, type and level
#include "portable.h"

#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "ops/isa.h"

extern "C" int64_t omniconv_isa(int64_t level);

namespace portable {
namespace {

constexpr char kWatched = 0x5a;
constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};

char current[512] = "before the first case";
int64_t cases_run = 0, failures = 0;

size_t element_size(Type type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

// The bits of a number that the type holds exactly: sign, `exponent` bits of exponent, `fraction` bits of fraction.
uint16_t half_bits(double x, int exponent, int fraction) {
  if (x == 0) return std::signbit(x) ? 0x8000 : 0;
  int power;
  const double significand = std::frexp(std::fabs(x), &power) * 2 - 1;  // in [0, 1), for 2^(power − 1)
  const int biased = power - 1 + (1 << (exponent - 1)) - 1;
  return uint16_t((x < 0 ? 0x8000 : 0) | biased << fraction | int(std::ldexp(significand, fraction)));
}

double half_value(uint16_t bits, int exponent, int fraction) {
  const int biased = (bits & 0x7fff) >> fraction, bias = (1 << (exponent - 1)) - 1, part = bits & ((1 << fraction) - 1);
  if (biased == 2 * bias + 1) return NAN;  // no result is an infinity
  const double size =
      biased ? std::ldexp(part + (1 << fraction), biased - bias - fraction) : std::ldexp(part, 1 - bias - fraction);
  return bits & 0x8000 ? -size : size;
}

void crashed(int signal) {
  char text[640];
  const int n = std::snprintf(text, sizeof text, "signal %d in %s\n", signal, current);
  if (write(STDERR_FILENO, text, size_t(n)) < 0) _exit(3);
  _exit(2);
}

void fail(const std::string& why) {
  std::fprintf(stderr, "%s: %s\n", current, why.c_str());
  if (++failures == 20) std::exit(1);
}

}  // namespace

double rounded(Type type, double x) {
  if (type == kFloat64 || x == 0) return x;
  int power;
  std::frexp(x, &power);
  const double unit = std::ldexp(1, power - (type == kFloat32 ? 24 : type == kBfloat16 ? 8 : 11));
  return std::nearbyint(x / unit) * unit;
}

Memory::Memory(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), pages = (bytes + 64 + page - 1) / page;
  mapped_ = (pages + 1) * page;
  void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (map == MAP_FAILED) std::abort();
  map_ = static_cast<char*>(map);
  data_ = map_ + pages * page - bytes;
  std::memset(map_, kWatched, size_t(data_ - map_));
  std::memset(data_, 0xff, bytes);
  if (mprotect(map_ + pages * page, page, PROT_NONE)) std::abort();
}

Memory::~Memory() { munmap(map_, mapped_); }

bool Memory::is_intact() const {
  for (const char* p = map_; p < data_; ++p)
    if (*p != kWatched) return false;
  return true;
}

Array::Array(Type type, const std::vector<double>& values) : type_(type), memory_(values.size() * element_size(type)) {
  for (size_t i = 0; i < values.size(); ++i) set(int64_t(i), values[i]);
}

void* Array::at(int64_t i) const { return memory_.data() + i * int64_t(element_size(type_)); }

double Array::operator[](int64_t i) const {
  float single;
  double value;
  uint16_t half;
  switch (type_) {
    case kFloat32: std::memcpy(&single, at(i), 4); return double(single);
    case kFloat64: std::memcpy(&value, at(i), 8); return value;
    default: std::memcpy(&half, at(i), 2); return type_ == kBfloat16 ? half_value(half, 8, 7) : half_value(half, 5, 10);
  }
}

void Array::set(int64_t i, double value) {
  const float single = float(value);
  const uint16_t half = type_ == kBfloat16 ? half_bits(value, 8, 7) : type_ == kFloat16 ? half_bits(value, 5, 10) : 0;
  const void* from = type_ == kFloat64   ? static_cast<const void*>(&value)
                     : type_ == kFloat32 ? static_cast<const void*>(&single)
                                         : &half;
  std::memcpy(at(i), from, element_size(type_));
}

uint64_t Random::next() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

std::vector<double> Random::integers(int64_t n, int64_t most) {
  std::vector<double> values(static_cast<size_t>(n));
  for (double& v : values) v = double(between(-most, most));
  return values;
}

std::vector<uint8_t> Random::mask(int64_t n) {
  std::vector<uint8_t> values(static_cast<size_t>(n));
  const int64_t of = between(2, 6);
  for (uint8_t& v : values) v = one_in(of);
  return values;
}

double activated(omniconv::Activation activation, double x) {
  if (activation == omniconv::kNone) return x;
  const double positive = x < 0 ? 0 : x;
  return activation == omniconv::kRelu6 && positive > 6 ? 6 : positive;
}

int64_t source_index(int64_t position, int64_t size, int64_t input_dilation, omniconv::Mode mode) {
  if (position % input_dilation) return -1;
  const int64_t i = position / input_dilation;
  if (i >= 0 && i < size) return i;
  if (mode == omniconv::kReflect) return i < 0 ? -i : 2 * size - 2 - i;
  if (mode == omniconv::kReplicate) return i < 0 ? 0 : size - 1;
  if (mode == omniconv::kCircular) return (i + size) % size;
  return -1;
}

void begin_case(const char* table, Type type, const char* format, ...) {
  ++cases_run;
  int n = std::snprintf(current, sizeof current, "level %d, %s, %s: ", int(omniconv::isa()), table, kNames[type]);
  va_list rest;
  va_start(rest, format);
  std::vsnprintf(current + n, sizeof current - size_t(n), format, rest);
  va_end(rest);
}

void check(const char* what, const Array& made, Type type, const std::vector<double>& expected) {
  if (!made.is_intact()) return fail(std::string(what) + " is written before its beginning");
  for (size_t i = 0; i < expected.size(); ++i) {
    const double got = made[int64_t(i)], must = rounded(type, expected[i]);
    if (got == must) continue;
    return fail(std::string(what) + "[" + std::to_string(i) + "] must be " + std::to_string(must) + ", got " +
                std::to_string(got));
  }
}

void run_cases(int64_t cases, std::initializer_list<Case> functions) {
  for (Case function : functions)
    for (Type type : kTypes)
      for (int64_t seed = 0; seed < cases; ++seed) {
        Random random(seed);
        function(random, type);
      }
}

int64_t vector_lanes() { return int64_t(4) << int(omniconv::isa()); }

}  // namespace portable

int main(int count, char** arguments) {
  using namespace portable;
  const int64_t cases = count > 1 ? std::atoll(arguments[1]) : 300;
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, crashed);
  const auto start = std::chrono::steady_clock::now();
  const int64_t best = omniconv_isa(-1);
  for (int64_t level = 0; level <= best; ++level) {
    omniconv_isa(level);
    run_depthwise_nchw(cases);
    run_depthwise_nhwc(cases);
    run_causal(cases);
    run_lightweight(cases);
    run_dynamic(cases);
    run_gemm(cases);
    run_small(cases);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%lld cases at %lld level%s, %lld wrong, %.1f s\n", (long long)cases_run, (long long)best + 1,
              best ? "s" : "", (long long)failures, seconds);
  return failures != 0;
}
