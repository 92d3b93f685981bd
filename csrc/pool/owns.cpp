#include "pool/owns.hpp"

#include "simd/level.hpp"

namespace pyruntime::pool {

bool owns_all_scalar(const PoolBounds& bounds, void* const* objects, size_t n) noexcept {
  bool all = true;
  for (size_t i = 0; i < n; ++i) all &= bounds.has(objects[i]);
  return all;
}

OwnsAll owns_all() noexcept {
#if defined(__x86_64__)
  if (simd::level() != simd::Level::scalar) return owns_all_avx2;
#endif
  return owns_all_scalar;
}

}  // namespace pyruntime::pool
