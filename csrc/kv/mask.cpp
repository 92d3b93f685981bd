// Tokens dropped inside a sequence: whole blocks go, or what is kept moves together.
#include <algorithm>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

uint32_t BlockPool::mask(SeqHandle seq, const uint64_t* keep, uint32_t tokens,
                         std::vector<Move>* moves) {
  const uint32_t slot = slot_of(seq);
  Sequence& s = seqs_[slot];
  Hot& hot = hot_[slot];
  const uint32_t size = options_.block_size;
  if ((hot.flags & kParked) != 0) fail(PYRT_ESTATE, "the sequence is swapped out");
  if (tokens != hot.held || tokens != hot.valid) {
    fail(PYRT_EINVAL, "tokens is %u; the sequence holds %u of which %u are valid", tokens, hot.held,
         hot.valid);
  }
  const auto kept = [&](uint32_t i) { return (keep[i / 64] >> (i % 64) & 1) != 0; };
  uint32_t first = 0;
  while (first < tokens && kept(first)) ++first;
  if (first == tokens) return tokens;

  if (moves == nullptr) {
    // The open block stays: tokens are still to come into it.
    for (uint32_t at = first / size; at < tokens / size; ++at) {
      bool any = false;
      for (uint32_t i = at * size; i < (at + 1) * size && !any; ++i) any = kept(i);
      if (any) continue;
      for (uint32_t g = 0; g < num_groups_; ++g) release_entry(groups_[g], slot, at);
      cut_chain(slot, at);
      node_row_of(slot)[at] = kNoNode;
    }
    hot.flags |= kStopped;
    touch(slot);
    hot.fill = 0;
    return tokens;
  }

  for (uint32_t g = 0; g < num_groups_; ++g) {
    if (groups_[g].options.window != 0) {
      fail(PYRT_EUNSUPPORTED, "tokens cannot be moved together behind a sliding window");
    }
  }
  uint32_t left = first;
  for (uint32_t i = first; i < tokens; ++i) left += kept(i);
  const uint32_t blocks = blocks_for(left);
  const uint32_t begin = first / size;
  // Published or shared blocks are not written: their places get blocks of their own.
  const auto foreign = [&](const Group& group, uint32_t at) {
    const int32_t block = row_of(group, slot)[at];
    return block < 0 || group.owner[static_cast<uint32_t>(block)] != kNoNode ||
           group.shared[static_cast<uint32_t>(block)] > 1;
  };
  checkpoint();
  moves->reserve(moves->size() + size_t{left} * num_groups_);
  std::vector<BlockId> fresh[kMaxGroups];
  for (uint32_t g = 0; g < num_groups_; ++g) {
    uint32_t count = 0;
    for (uint32_t at = begin; at < blocks; ++at) count += foreign(groups_[g], at);
    if (available(g) < count) {
      fail(PYRT_EFULL, "packing the sequence takes %u blocks and %u are to be had", count,
           available(g));
    }
    checkpoint();
    fresh[g].resize(count);
  }
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    take_many(g, fresh[g], nullptr);
    int32_t* row = row_of(group, slot);
    std::copy(row, row + s.blocks, walked_.begin());  // the old places
    size_t next = 0;
    for (uint32_t at = begin; at < blocks; ++at) {
      if (!foreign(group, at)) {
        const NodeId id = node_row_of(slot)[at];
        if (id != kNoNode) unhold(group, id);  // its own copy of content that is indexed
        continue;
      }
      const BlockId block = fresh[g][next++];
      release_entry(group, slot, at);
      row[at] = static_cast<int32_t>(block);
    }
    uint32_t to = begin * size;
    for (uint32_t from = begin * size; from < tokens; ++from) {
      if (!kept(from)) continue;
      const auto source = static_cast<int32_t>(walked_[from / size]);
      const uint64_t target = uint64_t{static_cast<uint32_t>(row[to / size])} * size + to % size;
      const uint64_t origin = uint64_t{static_cast<uint32_t>(source)} * size + from % size;
      if (source >= 0 && origin != target) moves->push_back({g, origin, target});
      ++to;
    }
    drop_room(group, slot);
  }
  stats_.moves.add(moves->size());
  cut_chain(slot, begin);
  // Entries that were released above hold their nodes no more; those behind still do.
  std::fill(node_row_of(slot) + begin, node_row_of(slot) + std::min(blocks, s.blocks), kNoNode);
  const uint32_t owed_before = owed(s);
  release_entries(slot, blocks);
  promised_ += owed(s) - uint64_t{owed_before};
  hot.held = hot.valid = left;
  hot.fill = 0;
  hot.flags = static_cast<uint16_t>((hot.flags & ~kShares) | kStopped);
  touch(slot);
  return left;
}

// The settled entries end before `at`, if they went further.
void BlockPool::cut_chain(uint32_t slot, uint32_t at) noexcept {
  Sequence& s = seqs_[slot];
  if (at >= s.published) return;
  set_tip(slot, at == 0 ? roots_[s.space] : node_row_of(slot)[at - 1]);
  s.published = at;
}

}  // namespace pyruntime::kv
