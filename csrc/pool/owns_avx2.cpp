// Four pointers at a time.
#if defined(__x86_64__)

#include <immintrin.h>

#include "pool/owns.hpp"

#pragma GCC push_options
#pragma GCC target("avx2")

namespace pyruntime::pool {

bool owns_all_avx2(const PoolBounds& bounds, void* const* objects, size_t n) noexcept {
  const uint64_t sign = uint64_t{1} << 63;  // there is no unsigned comparison
  const __m256i base = _mm256_set1_epi64x(static_cast<long long>(bounds.base));
  const __m256i last = _mm256_set1_epi64x(static_cast<long long>(
      bounds.end.load(std::memory_order_acquire) - 1));  // end is at least 1, and below 2^63
  const __m256i mask = _mm256_set1_epi64x(static_cast<long long>(bounds.unit_mask));
  const __m256i last_used = _mm256_set1_epi64x(static_cast<long long>(bounds.used_bytes - 1));
  const __m256i reciprocal = _mm256_set1_epi64x(static_cast<long long>(bounds.reciprocal));
  const __m256i reciprocal_high =
      _mm256_set1_epi64x(static_cast<long long>(bounds.reciprocal >> 32));
  const __m256i flip = _mm256_set1_epi64x(static_cast<long long>(sign));
  const __m256i last_product =
      _mm256_set1_epi64x(static_cast<long long>((bounds.reciprocal - 1) ^ sign));
  __m256i wrong = _mm256_setzero_si256();
  size_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const __m256i offset =
        _mm256_sub_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(objects + i)), base);
    const __m256i within = _mm256_and_si256(offset, mask);
    // within is below 2^32, so two products of 32 bits are the low 64 bits of the whole.
    const __m256i product =
        _mm256_add_epi64(_mm256_mul_epu32(within, reciprocal),
                         _mm256_slli_epi64(_mm256_mul_epu32(within, reciprocal_high), 32));
    wrong = _mm256_or_si256(wrong, offset);  // its sign: below the base
    wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi64(offset, last));
    wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi64(within, last_used));
    wrong =
        _mm256_or_si256(wrong, _mm256_cmpgt_epi64(_mm256_xor_si256(product, flip), last_product));
  }
  if (_mm256_movemask_pd(_mm256_castsi256_pd(wrong)) != 0) return false;
  for (; i < n; ++i) {
    if (!bounds.has(objects[i])) return false;
  }
  return true;
}

}  // namespace pyruntime::pool

#pragma GCC pop_options
#endif
