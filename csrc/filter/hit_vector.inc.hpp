// Both buckets of a key in one comparison of 16 or 32 bytes: included by each x86-64 level, whose
// target it takes. A 64-byte register would not help: two buckets never fill it.
template <int W, int B>
inline __attribute__((always_inline)) bool hit(const uint64_t* first, const uint64_t* second,
                                               uint32_t fingerprint) {
  const auto load = [](const uint64_t* words) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  };
  const __m256i wanted = W == 16 ? _mm256_set1_epi16(static_cast<short>(fingerprint))
                                 : _mm256_set1_epi8(static_cast<char>(fingerprint));
  const auto equal = [&](__m256i slots) __attribute__((always_inline)) {
    return W == 16 ? _mm256_cmpeq_epi16(slots, wanted) : _mm256_cmpeq_epi8(slots, wanted);
  };
  if constexpr (W * B == 64) {
    const __m256i both = _mm256_castsi128_si256(
        _mm_set_epi64x(static_cast<long long>(*second), static_cast<long long>(*first)));
    return (_mm256_movemask_epi8(equal(both)) & 0xffff) != 0;
  } else if constexpr (W * B == 128) {
    return _mm256_movemask_epi8(equal(_mm256_set_m128i(load(second), load(first)))) != 0;
  } else {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    return _mm256_movemask_epi8(_mm256_or_si256(equal(a), equal(b))) != 0;
  }
}
