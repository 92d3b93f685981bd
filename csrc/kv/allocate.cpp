// Blocks for sequences: in place, out of free runs, from others' room, by eviction.
#include <algorithm>
#include <bit>
#include <cstdlib>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

void BlockPool::unbin(Group& group, uint32_t slot) noexcept {
  Room& room = group.rooms[slot];
  if (room.bin == 0) return;
  if (room.prev == 0) {
    group.bins[room.bin - 1] = room.next;
  } else {
    group.rooms[room.prev - 1].next = room.next;
  }
  if (room.next != 0) group.rooms[room.next - 1].prev = room.prev;
  room.bin = 0;
}

// Lists a sequence's room under its size class. Rooms shrink as sequences grow into them; they are
// moved to their class when somebody looks for a large one.
void BlockPool::bin(Group& group, uint32_t slot) noexcept {
  Room& room = group.rooms[slot];
  const auto bin = std::min<uint32_t>(kBins, std::bit_width(room.count));
  if (room.bin == bin) return;
  unbin(group, slot);
  if (bin == 0) return;
  room.bin = bin;
  room.prev = 0;
  room.next = group.bins[bin - 1];
  if (room.next != 0) group.rooms[room.next - 1].prev = slot + 1;
  group.bins[bin - 1] = slot + 1;
}

void BlockPool::set_room(Group& group, uint32_t slot, BlockId begin, uint32_t count) noexcept {
  Room& room = group.rooms[slot];
  room.begin = begin;
  room.count = count;
  group.reserved += count;
  bin(group, slot);
}

void BlockPool::drop_room(Group& group, uint32_t slot) noexcept {
  Room& room = group.rooms[slot];
  if (room.count > 0) {
    group.reserved -= room.count;
    group.runs.put(room.begin, room.count);
    room.count = 0;
  }
  unbin(group, slot);
}

// Gives the far half of the largest reservation back to the free runs.
bool BlockPool::halve_a_room(Group& group) noexcept {
  for (uint32_t bin_at = kBins; bin_at > 0; --bin_at) {
    while (group.bins[bin_at - 1] != 0) {
      const uint32_t slot = group.bins[bin_at - 1] - 1;
      Room& room = group.rooms[slot];
      if (std::min<uint32_t>(kBins, std::bit_width(room.count)) != bin_at) {
        bin(group, slot);  // it has shrunk since
        continue;
      }
      const uint32_t back = (room.count + 1) / 2;
      room.count -= back;
      group.reserved -= back;
      group.runs.put(room.begin + room.count, back);
      bin(group, slot);
      stats_.reservations_halved.add(1);
      return true;
    }
  }
  return false;
}

// Appends `n` blocks to a sequence's table; the plan has seen to it that there are as many.
void BlockPool::take(uint32_t g, uint32_t slot, uint32_t n,
                     std::vector<Eviction>* evicted) noexcept {
  Group& group = groups_[g];
  int32_t* row = row_of(group, slot);
  uint32_t at = seqs_[slot].blocks;
  const auto use = [&](BlockId first, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) {
      row[at + i] = static_cast<int32_t>(first + i);
      group.shared[first + i] = 1;
    }
    at += count;
    n -= count;
  };
  stats_.allocated.add(n);
  Room& room = group.rooms[slot];
  if (room.count > 0) {
    const uint32_t count = std::min(n, room.count);
    const BlockId first = room.begin;
    room.begin += count;
    room.count -= count;
    group.reserved -= count;
    stats_.extended.add(count);
    use(first, count);
  }
  const uint32_t total = group.options.num_blocks;  // reserved is kept below 1/16 of it
  uint32_t run = options_.run_blocks;
  while (n > 0) {
    const uint32_t free = group.runs.free();
    if (free > 0) {
      if (run > 1 && free > total / 10 * 3) run = options_.run_blocks * 4;
      const uint32_t spare = run > 1 ? run : 0;
      BlockId first = kNone;
      uint32_t got = 0;
      if (run > 1 && at > 0 && row[at - 1] >= 0) {
        first = static_cast<BlockId>(row[at - 1]) + 1;
        got = group.runs.take_at(first, n + spare);
        if (got > 0) stats_.extended.add(std::min(n, got));
      }
      if (got == 0) {
        const Runs::Run found = group.runs.take(std::max(n, spare));
        first = found.first;
        got = found.count;
        stats_.run_extents.add(1);
      }
      const uint32_t count = std::min(n, got);
      use(first, count);
      const uint32_t rest = got - count;
      if (rest == 0) continue;
      // The room of a sequence that still lacks blocks would be taken from it at once.
      const uint32_t keep = n == 0 ? std::min(rest, spare) : 0;
      if (keep > 0) set_room(group, slot, first + count, keep);
      if (rest > keep) group.runs.put(first + count + keep, rest - keep);
    } else if (group.reserved > 0 && (group.listed == 0 || group.reserved > total / 16)) {
      halve_a_room(group);
    } else {
      if (group.listed == 0) std::abort();  // the plan was wrong: a bug
      // A run of victims, so that the next blocks of this sequence lie behind this one: some
      // content goes earlier than it had to, never more than a sixteenth of the pool.
      uint32_t extra = n < run && group.reserved < total / 16 ? run - n : 0;
      extra =
          std::min({extra, total / 16 - std::min(total / 16, group.reserved), group.listed / 8});
      const uint32_t wanted = std::min(n + extra, group.listed);
      BlockId* victims = victims_.data();
      for (uint32_t left = wanted; left > 0;) {
        const auto count = std::min<uint32_t>(left, static_cast<uint32_t>(victims_.size()));
        evict(g, count, victims, evicted);
        left -= count;
        // Sequences were freed end first: what they held comes in descending order.
        if (run > 1) std::sort(victims, victims + count);
        uint32_t i = 0;
        while (i < count && n > 0) use(victims[i++], 1);
        if (i == count) continue;
        uint32_t keep = i;
        while (keep < count && victims[keep] == victims[i] + (keep - i)) ++keep;
        const bool behind = at > 0 && row[at - 1] + 1 == static_cast<int32_t>(victims[i]);
        if (behind && room.count == 0) {
          set_room(group, slot, victims[i], keep - i);
          i = keep;
        }
        while (i < count) group.runs.put(victims[i++], 1);
      }
    }
  }
}

// Blocks that must be copied before the sequence writes its next token: 1 if that one is shared.
uint32_t BlockPool::copies_for(uint32_t g, uint32_t slot) const noexcept {
  const Hot& hot = hot_[slot];
  const uint32_t at = hot.valid / options_.block_size;
  if ((hot.flags & kShares) == 0 || at >= seqs_[slot].blocks) return 0;
  const Group& group = groups_[g];
  const int32_t block = row_of(group, slot)[at];
  if (block < 0) return 0;
  return group.owner[static_cast<uint32_t>(block)] != kNoNode ||
         group.shared[static_cast<uint32_t>(block)] > 1;
}

// One block for nobody in particular; the plan has seen to it that there is one.
BlockId BlockPool::take_loose(uint32_t g, std::vector<Eviction>* evicted) noexcept {
  Group& group = groups_[g];
  while (group.runs.free() == 0) {
    const bool few = group.reserved <= group.options.num_blocks / 16;
    if (group.reserved > 0 && (group.listed == 0 || !few)) {
      halve_a_room(group);
      continue;
    }
    if (group.listed == 0) std::abort();  // the plan was wrong: a bug
    BlockId block;
    evict(g, 1, &block, evicted);
    group.shared[block] = 1;
    return block;
  }
  const BlockId block = group.runs.take(1).first;
  group.shared[block] = 1;
  return block;
}

void BlockPool::copy_on_write(uint32_t slot, StepResult& result) noexcept {
  const uint32_t at = hot_[slot].valid / options_.block_size;
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    if (at >= seqs_[slot].blocks) break;
    int32_t& entry = row_of(group, slot)[at];
    if (copies_for(g, slot) == 0) {
      // Its own copy of content that the sequence, being cut there, holds no more.
      const NodeId id = node_row_of(slot)[at];
      if (entry >= 0 && id != kNoNode) unhold(group, id);
      continue;
    }
    const auto from = static_cast<BlockId>(entry);
    const BlockId to = take_loose(g, evictions(result));
    release_entry(group, slot, at);
    entry = static_cast<int32_t>(to);
    result.copies.push_back({g, from, to});
    stats_.copies.add(1);
  }
  if (at < seqs_[slot].blocks) node_row_of(slot)[at] = kNoNode;
  hot_[slot].flags &= static_cast<uint16_t>(~kShares);
}

void BlockPool::grow(uint32_t slot, uint32_t tokens, StepResult& result) noexcept {
  Sequence& s = seqs_[slot];
  Hot& hot = hot_[slot];
  if ((hot.flags & kShares) != 0) copy_on_write(slot, result);
  touch(slot);
  const uint32_t wanted = blocks_for(tokens);
  if (wanted > s.blocks) {
    const uint32_t owed_before = owed(s);
    for (uint32_t g = 0; g < num_groups_; ++g) {
      take(g, slot, wanted - s.blocks, evictions(result));
    }
    s.blocks = wanted;
    promised_ -= owed_before - owed(s);
  }
  hot.held = std::max(hot.held, tokens);
}

}  // namespace pyruntime::kv
