// Words of eight bytes, on any machine.
#include "filter/batch.hpp"
#include "filter/evict.hpp"

namespace pyruntime::filter {

namespace scalar {

// Only whether there is any.
template <int W, int B>
inline __attribute__((always_inline)) uint64_t match(const uint64_t* first, const uint64_t* second,
                                                     uint32_t fingerprint) {
  uint64_t equal = 0;
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    equal |= equal_lanes<W, B>(Shared::load(first + i), fingerprint);
  }
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    equal |= equal_lanes<W, B>(Shared::load(second + i), fingerprint);
  }
  return equal;
}

template <int W, int B>
inline __attribute__((always_inline)) Choice choose(uint64_t* first, uint64_t* second) {
  const bool other = free_slots<Shared, W, B>(second) > free_slots<Shared, W, B>(first);
  uint64_t* const bucket = other ? second : first;
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    const uint64_t word = Shared::load(bucket + i);
    const uint64_t free = zero_lanes<W, B>(word);
    if (free != 0) return {bucket + i, word, first_lane<W>(free) * W};
  }
  return {first, 0, kNoSlot};
}

template <int W, int B>
inline __attribute__((always_inline)) bool pull(const View& view, uint64_t segment, uint64_t* first,
                                                uint64_t* second, uint32_t fingerprint) {
  return take<Shared, W, B>(view, segment, first, fingerprint) ||
         take<Shared, W, B>(view, segment, second, fingerprint);
}

#include "filter/batch.inc.hpp"

}  // namespace scalar

extern constinit const LevelKernels kScalarKernels = scalar::make_level();

const Kernels& kernels(simd::Level level, int bits, int slots) noexcept {
  const LevelKernels* set = &kScalarKernels;
  // A vector load of a bucket is atomic per word, which is all that is needed, but the thread
  // sanitizer takes it for a plain load.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
  if (level == simd::Level::avx2) set = &kAvx2Kernels;
  if (level == simd::Level::avx512 || level == simd::Level::avx512_vnni) set = &kAvx512Kernels;
#else
  static_cast<void>(level);
#endif
  if (bits == 16) return slots == 8 ? set->w16b8 : set->w16b16;
  return slots == 8 ? set->w8b8 : set->w8b16;
}

}  // namespace pyruntime::filter
