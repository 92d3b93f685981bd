// Are all of these pointers objects of a pool? What every bulk put asks before it changes anything,
// so it is the larger part of a bulk put's time.
#pragma once

#include <cstddef>

#include "pyruntime/pool_cache.hpp"

namespace pyruntime::pool {

using OwnsAll = bool (*)(const PoolBounds& bounds, void* const* objects, size_t n) noexcept;

bool owns_all_scalar(const PoolBounds& bounds, void* const* objects, size_t n) noexcept;
#if defined(__x86_64__)
bool owns_all_avx2(const PoolBounds& bounds, void* const* objects, size_t n) noexcept;
#endif

// The fastest of this process.
OwnsAll owns_all() noexcept;

}  // namespace pyruntime::pool
