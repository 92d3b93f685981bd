// The border between cores and the C ABI: exceptions become a status and a thread-local message.
#pragma once

#include <new>

#include "base/status.hpp"

namespace pyruntime::capi {

// Keeps `message` for pyrt_last_error() of this thread and returns `status`.
pyrt_status set_error(pyrt_status status, const char* message) noexcept;

// Runs `body` and translates what it throws. `body` returns nothing.
template <class Body>
pyrt_status guard(Body&& body) noexcept {
  try {
    body();
    return PYRT_OK;
  } catch (const Error& error) {
    return set_error(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return set_error(PYRT_ENOMEM, "out of memory");
  } catch (const std::exception& error) {
    return set_error(PYRT_EINTERNAL, error.what());
  } catch (...) {
    return set_error(PYRT_EINTERNAL, "unknown exception");
  }
}

// Throws PYRT_EINVAL naming the argument when `pointer` is null.
inline void require(const void* pointer, const char* name) {
  if (pointer == nullptr) fail(PYRT_EINVAL, "%s must not be NULL", name);
}

}  // namespace pyruntime::capi
