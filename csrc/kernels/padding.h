// What the padding modes mean: which element a padded position reads, and how far each mode can reach.
#pragma once
#include <cstdint>

namespace omniconv {

enum Mode : int64_t { kZeros, kReflect, kReplicate, kCircular };

namespace {  // compiled once per instruction set: no copy may serve another

// Returns whether an input of `size` positions has the elements that so many positions of padding on one side read.
constexpr bool pad_fits(Mode mode, int64_t pad, int64_t size) {
  return mode == kReflect ? pad < size : mode == kCircular ? pad <= size : true;
}

// Returns the index that a position reads of `size` elements with input_dilation − 1 zeros between them, or -1 where it
// reads a zero. A position outside is at most as far away as pad_fits says; input_dilation is 1 unless the mode is
// kZeros.
__attribute__((always_inline)) inline int64_t source(int64_t position, int64_t size, int64_t input_dilation,
                                                     Mode mode) {
  if (input_dilation > 1) {
    const bool zero = position < 0 || position % input_dilation || position / input_dilation >= size;
    return zero ? -1 : position / input_dilation;
  }
  if (position >= 0 && position < size) return position;
  switch (mode) {
    case kReflect: return position < 0 ? -position : 2 * (size - 1) - position;
    case kReplicate: return position < 0 ? 0 : size - 1;
    case kCircular: return position < 0 ? position + size : position - size;
    default: return -1;
  }
}

}  // namespace
}  // namespace omniconv
