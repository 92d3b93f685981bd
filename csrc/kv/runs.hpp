// Free blocks of one group, as runs: buddy lists by size, links and sizes in arrays beside.
//
// A free chunk is 2^order blocks at a multiple of 2^order, order 0..kMaxOrder; `order_[first
// block]` names its order, every other entry is kNotFree. Two free buddies are always merged, so
// the chunk that a free block lies in is found in kMaxOrder steps and big requests find what there
// is.
#pragma once

#include "kv/types.hpp"

namespace pyruntime::kv {

class Runs {
 public:
  static constexpr uint32_t kMaxOrder = 10;

  Runs() = default;
  explicit Runs(uint32_t num_blocks);  // all free

  uint32_t free() const noexcept { return free_; }
  size_t bytes() const noexcept { return links_.bytes() + order_.bytes(); }

  // Takes a chunk of at least `wanted` blocks where there is one, the smallest such, else the
  // largest; returns its first block and size, {kNone, 0} when nothing is free.
  struct Run {
    BlockId first;
    uint32_t count;
  };
  Run take(uint32_t wanted) noexcept;

  // Takes up to `most` free blocks that begin with `first`; returns how many. They are taken from
  // the chunk that `first` lies in only.
  uint32_t take_at(BlockId first, uint32_t most) noexcept;

  void put(BlockId first, uint32_t count) noexcept;

  bool is_free(BlockId block) const noexcept { return chunk_of(block).first != kNone; }

  // For the checker and the picture: calls visit(first, count) for every free chunk, in order.
  template <class Visit>
  void each(Visit&& visit) const {
    for (uint32_t block = 0; block < num_blocks_;) {
      const uint8_t order = order_[block] - kOrderBias;
      if (order > kMaxOrder) {
        ++block;
        continue;
      }
      visit(block, 1u << order);
      block += 1u << order;
    }
  }
  // The same in the order in which they would be taken, size by size.
  template <class Visit>
  void each_listed(Visit&& visit) const {
    for (uint32_t order = 0; order <= kMaxOrder; ++order) {
      for (BlockId at = heads_[order]; at != kNone; at = links_[at].next) visit(at, 1u << order);
    }
  }
  void check() const;  // throws PYRT_ECORRUPT
  uint32_t chunks(uint32_t order) const noexcept { return counts_[order]; }

 private:
  static constexpr uint8_t kOrderBias = 1;  // zero pages say: not free

  Run chunk_of(BlockId block) const noexcept;
  void push(BlockId first, uint32_t order) noexcept;
  void unlink(BlockId first, uint32_t order) noexcept;
  void put_chunk(BlockId first, uint32_t order) noexcept;

  struct Link {
    BlockId next, prev;
  };
  Array<Link> links_;
  Array<uint8_t> order_;
  uint32_t heads_[kMaxOrder + 1] = {};
  uint32_t counts_[kMaxOrder + 1] = {};
  uint32_t num_blocks_ = 0;
  uint32_t free_ = 0;
};

}  // namespace pyruntime::kv
