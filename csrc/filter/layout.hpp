// The filter's memory layout and where a hash goes in it: shared by CPU, CUDA kernels and files.
// Compiles under g++ and nvcc: no standard containers, no exceptions.
//
//   table     num_segments segments, one after the other
//   segment   `buckets` buckets (even, at most 2^16 slots): relocations never leave it
//   bucket    B slots of W bits, aligned to its size: 8, 16 or 32 bytes
//   slot      a fingerprint, 1 .. 2^W - 1; 0 is empty. Lane 0 is the low bits of the first word;
//             words are little-endian.
//
//        bucket of 8 x 16 bits    byte 0   2   4   6     8   10  12  14
//                                 [f0][f1][f2][f3]   [f4][f5][f6][f7]     two 64-bit words
//
// A hash h gives the segment by its top bits (h * num_segments >> 64), the first bucket by bits
// 16..39 and the fingerprint by bits 0..15. These are disjoint up to 2^24 segments, which is the
// limit. Doubling num_segments splits every segment in two and changes nothing else: a table grows
// by such a generation (filter.hpp), where segment / 2 is the segment of the generation before.
//
// The other bucket is other(b) = (H(f) - b) mod buckets with H(f) odd. It is its own inverse, as an
// exclusive or would be, and since `buckets` is even and H odd it never is b itself; but unlike an
// exclusive or it needs no power of two, so a table is as large as its capacity asks and not more.
#pragma once

#include "base/hash.hpp"
#include "base/integers.hpp"

namespace pyruntime::filter {

#if defined(__CUDACC__)
#define PYRT_FILTER_FN __host__ __device__ __forceinline__
#else
// Always inlined: the batch kernels compile these once per SIMD level, and a copy that the linker
// merged across levels would run on the wrong machine.
#define PYRT_FILTER_FN inline __attribute__((always_inline))
#endif

inline constexpr uint32_t kMaxSegmentSlots = 1U << 16;
inline constexpr uint64_t kMaxSegments = 1ULL << 24;

// Relaxed statistics of the slow path.
enum Counter { kMoves = 0, kRetries = 1, kMaxPath = 2, kNumCounters = 3 };

// A table. Passed by value, to kernels too.
struct View {
  uint64_t* words;
  uint32_t* epochs;    // per segment: how often a fingerprint left a bucket (core.hpp)
  uint64_t* counters;  // kNumCounters
  uint64_t num_segments;
  uint64_t seed;
  uint32_t buckets;             // per segment
  uint32_t threshold;           // the first bucket is taken while it has this many free slots
  const View* older = nullptr;  // the generation before: half the segments; never set on a device
};

// Where a key's copies are: two buckets of one segment and what is stored there.
struct Position {
  uint64_t segment;
  uint32_t first;
  uint32_t second;
  uint32_t fingerprint;
};

template <int W, int B>
struct Shape {
  static constexpr int kBits = W;
  static constexpr int kSlots = B;
  static constexpr int kWords = W * B / 64;
  static constexpr int kLanes = 64 / W;  // per word
  static constexpr uint64_t kLaneMask = W == 16 ? 0xffff : 0xff;
  static constexpr uint64_t kOnes = W == 16 ? 0x0001000100010001ULL : 0x0101010101010101ULL;
  static constexpr uint64_t kLows = W == 16 ? 0x7fff7fff7fff7fffULL : 0x7f7f7f7f7f7f7f7fULL;
};

// h * n >> 64.
PYRT_FILTER_FN uint64_t scale_hash(uint64_t h, uint64_t n) {
  // n <= 2^24, so two halves do, and vectorise.
  return ((h >> 32) * n + ((h & 0xffffffffU) * n >> 32)) >> 32;
}

template <int W>
PYRT_FILTER_FN uint32_t fingerprint_of(uint64_t h) {
  constexpr uint32_t kValues = (1U << W) - 1;
  return 1 + (((static_cast<uint32_t>(h) & 0xffffU) * kValues) >> 16);
}

PYRT_FILTER_FN uint32_t bucket_of(uint64_t h, uint32_t buckets) {
  return static_cast<uint32_t>(((h >> 16) & 0xffffffU) * buckets >> 24);
}

// H(f): odd, below `buckets`.
PYRT_FILTER_FN uint32_t pair_sum(uint32_t fingerprint, uint32_t buckets) {
  const uint32_t mixed = fingerprint * 0x9E3779B1U;
  return static_cast<uint32_t>(static_cast<uint64_t>(mixed) * buckets >> 32) | 1U;
}

PYRT_FILTER_FN uint32_t other_bucket(uint32_t bucket, uint32_t fingerprint, uint32_t buckets) {
  const uint32_t sum = pair_sum(fingerprint, buckets);
  return sum - bucket + (sum < bucket ? buckets : 0);
}

template <int W>
PYRT_FILTER_FN Position locate_hash(const View& view, uint64_t h) {
  Position p;
  p.segment = scale_hash(h, view.num_segments);
  p.fingerprint = fingerprint_of<W>(h);
  p.first = bucket_of(h, view.buckets);
  p.second = other_bucket(p.first, p.fingerprint, view.buckets);
  return p;
}

template <int W>
PYRT_FILTER_FN Position locate(const View& view, uint64_t key) {
  return locate_hash<W>(view, base::mix64(key ^ view.seed));
}

// First word of a bucket.
template <int W, int B>
PYRT_FILTER_FN uint64_t* bucket_words(const View& view, uint64_t segment, uint32_t bucket) {
  return view.words + (segment * view.buckets + bucket) * Shape<W, B>::kWords;
}

template <int W, int B>
PYRT_FILTER_FN uint64_t table_words(const View& view) {
  return view.num_segments * view.buckets * Shape<W, B>::kWords;
}

// The highest bit of every lane that is zero; exact in every lane.
template <int W, int B>
PYRT_FILTER_FN uint64_t zero_lanes(uint64_t word) {
  constexpr uint64_t kLows = Shape<W, B>::kLows;
  return ~(((word & kLows) + kLows) | word | kLows);
}

template <int W, int B>
PYRT_FILTER_FN uint64_t equal_lanes(uint64_t word, uint32_t fingerprint) {
  return zero_lanes<W, B>(word ^ (Shape<W, B>::kOnes * fingerprint));
}

PYRT_FILTER_FN int count_bits(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

// Number of the lane that the lowest set bit of a lane mask belongs to.
template <int W>
PYRT_FILTER_FN int first_lane(uint64_t mask) {
#if defined(__CUDA_ARCH__)
  return (__ffsll(static_cast<long long>(mask)) - 1) / W;
#else
  return __builtin_ctzll(mask) / W;
#endif
}

}  // namespace pyruntime::filter
