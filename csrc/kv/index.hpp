// The prefix index: a keyed chain of block hashes, and an open-addressing table from it to nodes.
//
// key(block) = mix(key(parent), hash(tokens)), where hash(tokens) does not depend on the parent:
// the hashes of a whole prompt are computed side by side and only one multiplication per block is a
// chain. A wrong hash costs time, never correctness: the pool compares tokens and parent.
//
// Slot: {node, tag}, 8 bytes, eight to a cache line; tag = low half of the key, home = tag & mask.
// Linear probing at a load of at most 1/2; erasing shifts back, so there are no tombstones and
// the cost of a lookup does not grow with the number of changes. Slots are zero when empty.
#pragma once

#include <cstring>

#include "kv/types.hpp"

namespace pyruntime::kv {

class Index {
 public:
  Index() = default;
  Index(uint32_t max_nodes, uint64_t seed);

  // Chain key of a namespace's root.
  uint64_t root_key(const void* salt, size_t bytes) const noexcept;

  // Keys of `n` consecutive blocks behind a block with key `parent`.
  void keys(uint64_t parent, const int32_t* tokens, uint32_t block_size, uint32_t n,
            uint64_t* out) const noexcept;

  void prefetch(uint64_t key) const noexcept { __builtin_prefetch(&slots_[home(key)]); }

  // First slot that may hold the key's node: its node id or 0; `at` walks on.
  NodeId first(uint64_t key, size_t& at) const noexcept {
    at = home(key);
    return scan(static_cast<uint32_t>(key), at);
  }
  NodeId next(uint64_t key, size_t& at) const noexcept {
    at = (at + 1) & mask_;
    return scan(static_cast<uint32_t>(key), at);
  }

  void insert(uint64_t key, NodeId node) noexcept {
    size_t at = home(key);
    while (slots_[at].node != kNoNode) at = (at + 1) & mask_;
    slots_[at] = {node, static_cast<uint32_t>(key)};
    ++size_;
  }
  void erase(uint64_t key, NodeId node) noexcept;

  size_t size() const noexcept { return size_; }
  size_t capacity() const noexcept { return mask_ + 1; }
  size_t bytes() const noexcept { return slots_.bytes(); }

  // For the checker: calls visit(node, tag, at) for every occupied slot.
  template <class Visit>
  void each(Visit&& visit) const {
    for (size_t at = 0; at <= mask_; ++at) {
      if (slots_[at].node != kNoNode) visit(slots_[at].node, slots_[at].tag, at);
    }
  }

  // Test hook: all keys become equal, so that only the exact comparison separates contents.
  void collide_for_test() noexcept { collide_ = true; }

 private:
  struct Slot {
    NodeId node;
    uint32_t tag;
  };

  size_t home(uint64_t key) const noexcept { return static_cast<uint32_t>(key) & mask_; }
  NodeId scan(uint32_t tag, size_t& at) const noexcept {
    for (;; at = (at + 1) & mask_) {
      const Slot slot = slots_[at];
      if (slot.node == kNoNode || slot.tag == tag) return slot.node;
    }
  }

  Array<Slot> slots_;
  size_t mask_ = 0;
  size_t size_ = 0;
  uint64_t secret_[9] = {};
  bool collide_ = false;
};

// Whether two blocks hold the same tokens.
inline bool same_tokens(const int32_t* a, const int32_t* b, uint32_t n) noexcept {
  if (n != 16) return std::memcmp(a, b, size_t{n} * 4) == 0;
  // Eight words compared without a branch: misses are decided by the key, hits are what is common.
  const auto word = [](const int32_t* p, int i) {
    uint64_t value;
    std::memcpy(&value, p + 2 * i, sizeof value);
    return value;
  };
  const uint64_t low = (word(a, 0) ^ word(b, 0)) | (word(a, 1) ^ word(b, 1)) |
                       (word(a, 2) ^ word(b, 2)) | (word(a, 3) ^ word(b, 3));
  const uint64_t high = (word(a, 4) ^ word(b, 4)) | (word(a, 5) ^ word(b, 5)) |
                        (word(a, 6) ^ word(b, 6)) | (word(a, 7) ^ word(b, 7));
  return (low | high) == 0;
}

}  // namespace pyruntime::kv
