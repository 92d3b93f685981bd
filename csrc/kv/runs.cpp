#include "kv/runs.hpp"

#include <algorithm>
#include <bit>

namespace pyruntime::kv {

Runs::Runs(uint32_t num_blocks) : links_(num_blocks), order_(num_blocks), num_blocks_(num_blocks) {
  std::fill(std::begin(heads_), std::end(heads_), kNone);
  // From the end, so that the lists begin with the lowest ids.
  for (BlockId end = num_blocks; end > 0;) {
    const uint32_t order = std::min<uint32_t>(kMaxOrder, std::countr_zero(end));
    end -= 1u << order;
    push(end, order);
  }
  free_ = num_blocks;
}

void Runs::push(BlockId first, uint32_t order) noexcept {
  links_[first] = {heads_[order], kNone};
  if (heads_[order] != kNone) links_[heads_[order]].prev = first;
  heads_[order] = first;
  order_[first] = static_cast<uint8_t>(order + kOrderBias);
  ++counts_[order];
}

void Runs::unlink(BlockId first, uint32_t order) noexcept {
  const Link link = links_[first];
  if (link.prev == kNone) {
    heads_[order] = link.next;
  } else {
    links_[link.prev].next = link.next;
  }
  if (link.next != kNone) links_[link.next].prev = link.prev;
  order_[first] = 0;
  --counts_[order];
}

Runs::Run Runs::chunk_of(BlockId block) const noexcept {
  for (uint32_t order = 0; order <= kMaxOrder; ++order) {
    const BlockId first = block & ~((1u << order) - 1);
    if (order_[first] == order + kOrderBias) return {first, 1u << order};
  }
  return {kNone, 0};
}

Runs::Run Runs::take(uint32_t wanted) noexcept {
  const uint32_t least =
      std::min<uint32_t>(kMaxOrder, wanted <= 1 ? 0 : std::bit_width(wanted - 1));
  for (uint32_t order = least; order <= kMaxOrder; ++order) {
    if (heads_[order] == kNone) continue;
    const BlockId first = heads_[order];
    unlink(first, order);
    // Give the upper halves back down to the size asked for.
    while (order > least) {
      --order;
      push(first + (1u << order), order);
    }
    free_ -= 1u << order;
    return {first, 1u << order};
  }
  for (uint32_t order = least; order-- > 0;) {
    if (heads_[order] == kNone) continue;
    const BlockId first = heads_[order];
    unlink(first, order);
    free_ -= 1u << order;
    return {first, 1u << order};
  }
  return {kNone, 0};
}

uint32_t Runs::take_at(BlockId first, uint32_t most) noexcept {
  if (first >= num_blocks_) return 0;
  const Run chunk = chunk_of(first);
  if (chunk.first == kNone) return 0;
  const uint32_t got = std::min(most, chunk.first + chunk.count - first);
  unlink(chunk.first, std::bit_width(chunk.count) - 1);
  free_ -= chunk.count;
  // What lies before and behind goes back; its buddies are part of what was taken.
  put(chunk.first, first - chunk.first);
  put(first + got, chunk.first + chunk.count - first - got);
  return got;
}

void Runs::put(BlockId first, uint32_t count) noexcept {
  free_ += count;
  while (count > 0) {
    uint32_t order = std::min<uint32_t>(kMaxOrder, std::bit_width(count) - 1);
    if (first != 0) order = std::min<uint32_t>(order, std::countr_zero(first));
    put_chunk(first, order);
    first += 1u << order;
    count -= 1u << order;
  }
}

void Runs::put_chunk(BlockId first, uint32_t order) noexcept {
  for (; order < kMaxOrder; ++order) {
    const BlockId buddy = first ^ (1u << order);
    if (buddy >= num_blocks_ || order_[buddy] != order + kOrderBias) break;
    unlink(buddy, order);
    first = std::min(first, buddy);
  }
  push(first, order);
}

void Runs::check() const {
  uint32_t free = 0;
  uint32_t counts[kMaxOrder + 1] = {};
  BlockId end = 0;
  each([&](BlockId first, uint32_t count) {
    const uint32_t order = std::bit_width(count) - 1;
    if (first < end || first % count != 0 || uint64_t{first} + count > num_blocks_) {
      fail(PYRT_ECORRUPT, "free run %u+%u is misplaced", first, count);
    }
    const BlockId buddy = first ^ count;
    if (order < kMaxOrder && buddy < num_blocks_ && order_[buddy] == order + kOrderBias) {
      fail(PYRT_ECORRUPT, "free runs %u and %u of %u blocks are not merged", first, buddy, count);
    }
    for (BlockId inside = first + 1; inside < first + count; ++inside) {
      if (order_[inside] != 0) fail(PYRT_ECORRUPT, "block %u is in two free runs", inside);
    }
    end = first + count;
    free += count;
    ++counts[order];
  });
  for (uint32_t order = 0; order <= kMaxOrder; ++order) {
    uint32_t listed = 0;
    BlockId before = kNone;
    for (BlockId at = heads_[order]; at != kNone; at = links_[at].next) {
      if (at >= num_blocks_ || order_[at] != order + kOrderBias || links_[at].prev != before ||
          ++listed > counts[order]) {
        fail(PYRT_ECORRUPT, "the list of free runs of 2^%u blocks is broken", order);
      }
      before = at;
    }
    if (listed != counts[order] || counts_[order] != counts[order]) {
      fail(PYRT_ECORRUPT, "%u of %u free runs of 2^%u blocks are listed", listed, counts[order],
           order);
    }
  }
  if (free != free_) fail(PYRT_ECORRUPT, "%u blocks are free, %u counted", free, free_);
}

}  // namespace pyruntime::kv
