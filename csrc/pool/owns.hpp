// Are all of these pointers objects of a pool? What every bulk put asks before it changes anything,
// so it is the larger part of a bulk put's time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyruntime::pool {

// Offset o from base is an object: o < end, o mod unit < used_bytes, o mod unit is a multiple of
// the stride (region.hpp).
struct Bounds {
  const char* base;
  uint64_t end;
  uint64_t unit_mask;
  uint64_t used_bytes;  // of a unit, which is at most 2^31
  uint64_t reciprocal;  // of the stride

  bool has(const void* object) const noexcept {
    const auto offset = reinterpret_cast<uintptr_t>(object) - reinterpret_cast<uintptr_t>(base);
    const uint64_t within = offset & unit_mask;
    return (offset < end) & (within < used_bytes) & (within * reciprocal < reciprocal);
  }
};

using OwnsAll = bool (*)(const Bounds& bounds, void* const* objects, size_t n) noexcept;

bool owns_all_scalar(const Bounds& bounds, void* const* objects, size_t n) noexcept;
#if defined(__x86_64__)
bool owns_all_avx2(const Bounds& bounds, void* const* objects, size_t n) noexcept;
#endif

// The fastest of this process.
OwnsAll owns_all() noexcept;

}  // namespace pyruntime::pool
