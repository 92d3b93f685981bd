// The border between cores and the C ABI: exceptions become a status and a thread-local message.
#pragma once

#include <cstdint>
#include <initializer_list>
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

// As require, and the elements must be aligned: what is behind a misaligned address is undefined.
template <class T>
void require_array(const T* array, const char* name) {
  require(array, name);
  if (reinterpret_cast<uintptr_t>(array) % alignof(T) != 0) {
    fail(PYRT_EINVAL, "%s is %p; it must be aligned to its %zu-byte elements", name,
         static_cast<const void*>(array), sizeof(T));
  }
}

// Throws PYRT_EINVAL when an array of these extents (none negative) exceeds any address space,
// which also means that indices into it cannot overflow.
inline void require_extents(std::initializer_list<int64_t> extents, const char* name) {
  constexpr int64_t kMaxElements = int64_t{1} << 47;
  unsigned __int128 elements = 1;
  for (const int64_t extent : extents) {
    elements *= static_cast<uint64_t>(extent);
    if (elements > kMaxElements) {
      fail(PYRT_EINVAL, "%s would have more than 2^47 elements; no address space holds it", name);
    }
  }
}

}  // namespace pyruntime::capi
