// Both buckets of a key in one comparison of 16 or 32 bytes, or two of 32: included by each x86-64
// level, whose target it takes. A 64-byte register would not help: two buckets rarely fill it.
//
// A vector load is atomic by words, which is all it need be: what it finds is a hint, and the
// compare-and-swap of one word decides.
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

// Stores a fingerprint without relocating any; false if both buckets are full. Chooses as
// insert_directly does, without a branch that depends on where there is room.
template <int W, int B>
inline __attribute__((always_inline)) bool store(const View& view, uint64_t* first,
                                                 uint64_t* second, uint32_t fingerprint) {
  constexpr int kHalf = W * B / 8;
  constexpr uint64_t kFirst = (uint64_t{1} << kHalf) - 1;
  const uint64_t free = match<W, B>(first, second, 0);
  if (__builtin_expect(free == 0, 0)) return false;
  const uint64_t in_first = free & kFirst, in_second = free >> kHalf;
  const int room = __builtin_popcountll(in_first);
  const bool other = (room < static_cast<int>(view.threshold) * (W / 8)) &
                     (__builtin_popcountll(in_second) > room);
  const int byte = __builtin_ctzll(other ? in_second : in_first);
  uint64_t* const word = (other ? second : first) + byte / 8;
  const int shift = byte % 8 * 8;
  uint64_t old = Shared::load(word);
  // Taken by another thread since, or its word has changed: the long way.
  if (__builtin_expect((old >> shift & Shape<W, B>::kLaneMask) == 0 &&
                           Shared::cas(word, old, old | uint64_t{fingerprint} << shift),
                       1)) {
    return true;
  }
  return insert_directly<Shared, W, B>(view, first, second, fingerprint);
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
  Shared::bump(view.epochs + segment);
  return Shared::cas(word, old, old & ~(Shape<W, B>::kLaneMask << shift));
}
