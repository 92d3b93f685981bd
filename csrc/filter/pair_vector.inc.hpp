// Both buckets of a key in one comparison of 16 or 32 bytes, or two of 32: included by each x86-64
// level, whose target it takes. A 64-byte register would not help: two buckets rarely fill it.
//
// A vector load is atomic by words, which is all it need be: what it finds is a hint, and the
// compare-and-swap of one word decides.
//
// `match` gives the slots that hold a fingerprint as W / 8 bits each, the first bucket's in the
// lower half.
template <int W, int B>
inline __attribute__((always_inline)) uint64_t match(const uint64_t* first, const uint64_t* second,
                                                     uint32_t fingerprint) {
  const auto load = [](const uint64_t* words) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  };
  const __m256i wanted = W == 16 ? _mm256_set1_epi16(static_cast<short>(fingerprint))
                                 : _mm256_set1_epi8(static_cast<char>(fingerprint));
  const auto equal = [&](__m256i slots) __attribute__((always_inline)) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(W == 16 ? _mm256_cmpeq_epi16(slots, wanted)
                                                              : _mm256_cmpeq_epi8(slots, wanted)));
  };
  if constexpr (W * B == 64) {
    return equal(_mm256_castsi128_si256(
               _mm_set_epi64x(static_cast<long long>(*second), static_cast<long long>(*first)))) &
           0xffffU;
  } else if constexpr (W * B == 128) {
    return equal(_mm256_set_m128i(load(second), load(first)));
  } else {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    return equal(a) | static_cast<uint64_t>(equal(b)) << 32;
  }
}

// Without a branch: which bucket it is, and where that has room, is chance.
template <int W, int B>
inline __attribute__((always_inline)) Choice choose(uint64_t* first, uint64_t* second) {
  constexpr int kHalf = W * B / 8;
  constexpr uint64_t kFirst = (uint64_t{1} << kHalf) - 1;
  const uint64_t free = match<W, B>(first, second, 0);
  const uint64_t in_first = free & kFirst, in_second = free >> kHalf;
  // Written so that the compiler makes no jump of it.
  const uint64_t other =
      -static_cast<uint64_t>(__builtin_popcountll(in_second) > __builtin_popcountll(in_first));
  const auto here = reinterpret_cast<uintptr_t>(first), there = reinterpret_cast<uintptr_t>(second);
  const uint64_t slots = in_first ^ ((in_first ^ in_second) & other);
  const int byte = static_cast<int>(_tzcnt_u64(slots)) & (kHalf - 1);  // 0 for none
  auto* const word = reinterpret_cast<uint64_t*>(here ^ ((here ^ there) & other)) + byte / 8;
  return {word, Shared::load(word), byte % 8 * 8 | static_cast<int>(free == 0) * kNoSlot};
}

// Takes one copy out of the pair; false if none was seen, or it went to another thread.
template <int W, int B>
inline __attribute__((always_inline)) bool pull(const View& view, uint64_t segment, uint64_t* first,
                                                uint64_t* second, uint32_t fingerprint) {
  constexpr int kHalf = W * B / 8;
  const uint64_t found = match<W, B>(first, second, fingerprint);
  if (__builtin_expect(found == 0, 0)) return false;
  const int byte = __builtin_ctzll(found);
  uint64_t* const word = (byte < kHalf ? first : second - kHalf / 8) + byte / 8;
  const int shift = byte % 8 * 8;
  uint64_t old = Shared::load(word);
  if (__builtin_expect((old >> shift & Shape<W, B>::kLaneMask) != fingerprint, 0)) return false;
  // Alone, it is the copy of the key itself (core.hpp).
  if (__builtin_expect(__builtin_popcountll(found) != W / 8, 0))
    Shared::bump(view.epochs + segment);
  return Shared::cas(word, old, old & ~(Shape<W, B>::kLaneMask << shift));
}
