// Bulk calls over one table: a pipeline that hashes and prefetches one block of keys while it
// works on the block before. An insert whose two buckets are full is set aside until what is behind
// them has come from memory, so a key may go in before one that stands before it in the batch; not
// so where `unique` is asked for. Compiled once per SIMD level (batch.inc.hpp), reached by a table.
#pragma once

#include <cstddef>
#include <cstdint>

#include "filter/exec.hpp"
#include "filter/partition.hpp"
#include "simd/level.hpp"

namespace pyruntime::filter {

// Where a fingerprint is to go, and the word there as it was seen.
struct Choice {
  uint64_t* word;
  uint64_t old;
  int shift;  // of the slot, or kNoSlot
};
inline constexpr int kNoSlot = 64;

struct Kernels {
  // Statuses of keys that were stored (or, with `unique`, were there already) and of those that
  // were not. Returns how many were stored.
  uint64_t (*insert)(const View&, const uint64_t* keys, size_t n, uint8_t* status, bool unique);
  // status: 0 removed, 1 absent. Returns how many were removed.
  uint64_t (*remove)(const View&, const uint64_t* keys, size_t n, uint8_t* status);
  // out: 1 present, 0 absent. Returns how many were present.
  uint64_t (*contains)(const View&, const uint64_t* keys, size_t n, uint8_t* out);
  // Adds the copies found to out.
  void (*count)(const View&, const uint64_t* keys, size_t n, uint32_t* out);
  // The same by groups (partition.hpp): `sort` puts n keys into an empty `Sorted`, the others run
  // on one of its groups, with results by index.
  void (*sort)(const View&, const uint64_t* keys, size_t n, Sorted&);
  uint64_t (*insert_group)(const View&, const Sorted&, uint32_t group, uint8_t* status,
                           bool unique);
  uint64_t (*contains_group)(const View&, const Sorted&, uint32_t group, uint8_t* out);
  void (*count_group)(const View&, const Sorted&, uint32_t group, uint32_t* out);
};

// The four shapes of one level.
struct LevelKernels {
  Kernels w16b8, w16b16, w8b8, w8b16;
};
extern const LevelKernels kScalarKernels;
#if defined(__x86_64__)
extern const LevelKernels kAvx2Kernels;
extern const LevelKernels kAvx512Kernels;
#endif

const Kernels& kernels(simd::Level level, int bits, int slots) noexcept;

}  // namespace pyruntime::filter
