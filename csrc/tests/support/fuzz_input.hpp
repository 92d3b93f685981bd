// Bytes of a fuzzer as arguments of calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "pyruntime/pyruntime.h"

namespace pyruntime::fuzz {

inline void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s (last error: %s)\n", what, pyrt_last_error());
  std::abort();
}

// Past the end it gives zeros.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool empty() const { return at_ >= size_; }
  uint64_t take(size_t bytes) {
    uint64_t value = 0;
    const size_t there = std::min(bytes, size_ - std::min(at_, size_));
    if (there > 0) std::memcpy(&value, data_ + at_, there);
    at_ += there;
    return value;
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(take(1)) % n; }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

}  // namespace pyruntime::fuzz
