// The cores' log: one process-wide callback, silent by default. Never call it on a hot path.
#pragma once

#include "pyruntime/abi.h"

namespace pyruntime::base {

enum class LogLevel : int32_t { debug = 10, info = 20, warning = 30, error = 40 };

void set_log_callback(pyrt_log_fn fn, void* user) noexcept;

__attribute__((format(printf, 2, 3))) void log(LogLevel level, const char* format, ...) noexcept;

}  // namespace pyruntime::base
