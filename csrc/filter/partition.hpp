// A large batch sorted by where its keys go, so that the part of the table they are looked up in
// stays in a core's own cache.
//
// The keys of a chunk (up to 2^24) become entries of eight bytes, in the order they came, by groups
// of segments: the bulk kernels then run on one group after the other and write each result where
// the entry says. Keys of one segment thus keep their order, and what a call does to a key is the
// same as without sorting.
//
//   entry   [index in the chunk : 24][segment in the group : 11][first bucket : 13][fingerprint :
//   16]
//
// Entries are in blocks of 256, handed out as groups fill: whatever the keys are, all fit. There is
// one such object per thread and call; nothing is kept after it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "filter/layout.hpp"

namespace pyruntime::filter {

// When to sort. As measured on a machine with 512 KiB of L2 and 32 MiB of L3: a table that the L3
// holds is read as fast as keys are sorted. A chunk must be large enough to come to most lines of
// the table, and a group small enough to stay in L2 beside the entries that stream through.
struct SortLimits {
  uint64_t table_bytes = 32 << 20;  // larger tables are sorted for
  uint64_t group_bytes = 256 << 10;
  uint64_t max_chunk = 4 << 20;  // keys; 8 bytes for each, per thread
};

// How a call is cut up; `chunk` is 0 where sorting does not pay.
struct SortPlan {
  uint64_t chunk;  // keys
  uint32_t shift;  // log2 of the segments of a group
  uint32_t groups;
};
SortPlan plan_sort(const SortLimits& limits, uint64_t table_bytes, uint64_t num_segments,
                   uint64_t n, int threads) noexcept;

class Sorted {
 public:
  static constexpr uint32_t kBlockEntries = 256;
  static constexpr uint64_t kMaxChunk = uint64_t{1} << 24;
  static constexpr uint32_t kMaxShift = 11;

  // Null if the system has no memory for it.
  static std::unique_ptr<Sorted> make(const SortPlan& plan) noexcept;
  ~Sorted();
  Sorted(const Sorted&) = delete;
  Sorted& operator=(const Sorted&) = delete;

  void clear() noexcept;
  uint32_t num_groups() const noexcept { return groups_; }
  uint32_t shift() const noexcept { return shift_; }
  // Entries of a group.
  size_t count(uint32_t group) const noexcept {
    return full_[group] * size_t{kBlockEntries} + static_cast<size_t>(ends_[group] - last_[group]);
  }
  const uint64_t* first_block(uint32_t group) const noexcept {
    return entries_ + group * size_t{kBlockEntries};
  }
  const uint64_t* block_after(const uint64_t* block) const noexcept {
    return entries_ + next_[(block - entries_) / kBlockEntries] * size_t{kBlockEntries};
  }
  // Where the next entry of each group goes. Who fills a block's last place calls `extend`.
  uint64_t** ends() noexcept { return ends_; }
  void extend(uint32_t group) noexcept;
  static bool ends_block(const uint64_t* end) noexcept {
    return reinterpret_cast<uintptr_t>(end) % (kBlockEntries * sizeof(uint64_t)) == 0;
  }
  // A byte per key of the chunk.
  uint8_t* marks() noexcept { return marks_; }

  std::unique_ptr<Sorted> behind;  // in a list of idle ones

 private:
  Sorted() = default;

  uint32_t groups_ = 0, shift_ = 0;
  uint64_t* entries_ = nullptr;  // aligned to a block
  uint64_t** ends_ = nullptr;    // [groups]
  uint64_t** last_ = nullptr;    // [groups] their last blocks
  uint32_t* full_ = nullptr;     // [groups] their full blocks
  uint32_t* next_ = nullptr;     // [blocks] the block after
  uint8_t* marks_ = nullptr;
  uint32_t used_ = 0;  // blocks
  void* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace pyruntime::filter
