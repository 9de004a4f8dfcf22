// How ops refuse a call: "<op>: <what must hold>, got <value>".
#pragma once
#include <stdexcept>
#include <string>

#include "box.h"

namespace omniconv {

[[noreturn]] inline void fail(const char* op, const std::string& must, const std::string& got) {
  throw std::runtime_error(std::string(op) + ": " + must + ", got " + got);
}

// Returns numbers as "1, 2, 3".
inline std::string joined(const Ints& values) {
  std::string s;
  for (size_t i = 0; i < values.size(); ++i) s += (i ? ", " : "") + std::to_string(values[i]);
  return s;
}

// Returns numbers as "(1, 2, 3)".
inline std::string text(const Ints& values) { return "(" + joined(values) + ")"; }

}  // namespace omniconv
