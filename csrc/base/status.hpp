// Errors inside the cores: one exception type that carries the ABI status it becomes.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "pyruntime/abi.h"

namespace pyruntime {

// Thrown by cores, turned into (status, message) by capi/error.hpp; never crosses the C ABI.
class Error : public std::runtime_error {
 public:
  Error(pyrt_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  pyrt_status status() const noexcept { return status_; }

 private:
  pyrt_status status_;
};

// Throws Error with a printf-style message: name, value found, range allowed.
[[noreturn]] __attribute__((format(printf, 2, 3))) inline void fail(pyrt_status status,
                                                                    const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Error(status, text);
}

}  // namespace pyruntime
