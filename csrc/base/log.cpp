#include "base/log.hpp"

#include <cstdarg>
#include <cstdio>
#include <mutex>

namespace pyruntime::base {
namespace {

std::mutex callback_mutex;
pyrt_log_fn callback = nullptr;
void* callback_user = nullptr;

}  // namespace

void set_log_callback(pyrt_log_fn fn, void* user) noexcept {
  std::scoped_lock lock(callback_mutex);
  callback = fn;
  callback_user = user;
}

void log(LogLevel level, const char* format, ...) noexcept {
  pyrt_log_fn fn;
  void* user;
  {
    std::scoped_lock lock(callback_mutex);
    fn = callback;
    user = callback_user;
  }
  if (fn == nullptr) return;
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  fn(static_cast<int32_t>(level), text, user);  // outside the lock: it may take the GIL
}

}  // namespace pyruntime::base
