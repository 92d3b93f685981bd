// What a swap engine needs: blocks held still, blocks for content that comes back, and sequences
// that give up their blocks and get others.
#include <algorithm>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

uint32_t BlockPool::group_of(uint32_t group) const {
  if (group >= num_groups_) {
    fail(PYRT_EINVAL, "group is %u; the pool has %u", group, num_groups_);
  }
  return group;
}

void BlockPool::pin_blocks(uint32_t g, std::span<const BlockId> blocks) {
  Group& group = groups_[group_of(g)];
  for (const BlockId block : blocks) {
    if (block >= group.options.num_blocks) {
      fail(PYRT_EINVAL, "block is %u; the group has %u", block, group.options.num_blocks);
    }
    if (group.shared[block] == 0 && group.owner[block] == kNoNode) {
      fail(PYRT_ESTATE, "block %u is free; nothing in it could be pinned", block);
    }
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (++group.external[blocks[i]] != 0) continue;
    do --group.external[blocks[i]];
    while (i-- > 0);
    fail(PYRT_EFULL, "a block is pinned %u times already", UINT16_MAX);
  }
  for (const BlockId block : blocks) share(group, block);
}

void BlockPool::unpin_blocks(uint32_t g, std::span<const BlockId> blocks) {
  Group& group = groups_[group_of(g)];
  for (const BlockId block : blocks) {
    if (block >= group.options.num_blocks) {
      fail(PYRT_EINVAL, "block is %u; the group has %u", block, group.options.num_blocks);
    }
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (group.external[blocks[i]] > 0) {
      --group.external[blocks[i]];
      continue;
    }
    const BlockId block = blocks[i];
    while (i-- > 0) ++group.external[blocks[i]];
    fail(PYRT_ESTATE, "block %u is not pinned that often", block);
  }
  for (const BlockId block : blocks) {
    if (unshare(group, block)) group.runs.put(block, 1);
  }
}

// Fills `out`, in runs as long as they are to be had; the caller has checked that there are as
// many.
void BlockPool::take_many(uint32_t g, std::span<BlockId> out, std::vector<Eviction>* evicted) {
  Group& group = groups_[g];
  size_t done = 0;
  while (done < out.size()) {
    const auto wanted = static_cast<uint32_t>(out.size() - done);
    if (group.runs.free() == 0) {
      out[done] = take_loose(g, evicted);
      ++done;
      continue;
    }
    const Runs::Run run = group.runs.take(wanted);
    const uint32_t used = std::min(wanted, run.count);
    if (run.count > used) group.runs.put(run.first + used, run.count - used);
    for (uint32_t i = 0; i < used; ++i) {
      out[done++] = run.first + i;
      group.shared[run.first + i] = 1;
    }
  }
}

bool BlockPool::take_blocks(uint32_t g, std::span<BlockId> out, std::vector<Eviction>* evicted) {
  if (available(group_of(g)) < out.size()) return false;
  checkpoint();
  if (evicted != nullptr) evicted->reserve(evicted->size() + out.size());
  take_many(g, out, evicted);
  for (const BlockId block : out) groups_[g].external[block] = 1;
  return true;
}

void BlockPool::give_blocks(uint32_t g, std::span<const BlockId> blocks) {
  unpin_blocks(g, blocks);
}

void BlockPool::attach(NodeId id, uint32_t g, BlockId block) {
  Group& group = groups_[group_of(g)];
  if (!is_node(id) || (nodes_[id].flags & kIsRoot) != 0) {
    fail(PYRT_ESTATE, "node %u is not, or no longer, content", id);
  }
  if (block >= group.options.num_blocks || group.shared[block] == 0 ||
      group.owner[block] != kNoNode || group.external[block] == 0) {
    fail(PYRT_ESTATE, "block %u was not taken from this pool", block);
  }
  if (group.nodes[id].block != kNone) {
    fail(PYRT_ESTATE, "node %u has block %u already", id, group.nodes[id].block);
  }
  attach_block(group, id, block);
  group.nodes[id].stamp = stamp_;
  --group.external[block];
  if (--group.shared[block] == 0) list(group, id, false);
  announce(id, EventType::stored, Reason::capacity);
}

NodeId BlockPool::import(NodeId parent, const int32_t* tokens) {
  if (!is_node(parent)) fail(PYRT_ESTATE, "node %u is not, or no longer, content", parent);
  uint64_t key;
  index_.keys(nodes_[parent].key, tokens, options_.block_size, 1, &key);
  const NodeId found = find_child(parent, key, tokens);
  return found != kNoNode ? found : make_node(parent, key, tokens);
}

void BlockPool::release(NodeId id) {
  if (!is_node(id)) fail(PYRT_ESTATE, "node %u is not, or no longer, content", id);
  remove_if_unused(id);
}

bool BlockPool::parked(SeqHandle seq) const { return (hot_[slot_of(seq)].flags & kParked) != 0; }

void BlockPool::park(SeqHandle seq) {
  const uint32_t slot = slot_of(seq);
  Sequence& s = seqs_[slot];
  Hot& hot = hot_[slot];
  if ((hot.flags & kParked) != 0) fail(PYRT_ESTATE, "the sequence is swapped out already");
  const uint32_t blocks = s.blocks;
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    drop_room(group, slot);
    int32_t* row = row_of(group, slot);
    for (uint32_t at = blocks; at > 0; --at) {
      if (row[at - 1] < 0) continue;
      release_entry(group, slot, at - 1);
      row[at - 1] = kParkedEntry;
    }
  }
  std::fill(node_row_of(slot), node_row_of(slot) + blocks, kNoNode);
  set_tip(slot, roots_[s.space]);
  s.published = 0;
  hot.fill = 0;
  hot.flags = static_cast<uint16_t>((hot.flags & ~kShares) | kParked);
  touch(slot);
}

uint32_t BlockPool::parked_blocks(SeqHandle seq, uint32_t group) const {
  const uint32_t slot = slot_of(seq);
  const int32_t* row = row_of(groups_[group], slot);
  return static_cast<uint32_t>(std::count(row, row + seqs_[slot].blocks, kParkedEntry));
}

void BlockPool::unpark(SeqHandle seq, std::vector<Eviction>* evicted) {
  const uint32_t slot = slot_of(seq);
  const uint32_t blocks = seqs_[slot].blocks;
  if ((hot_[slot].flags & kParked) == 0) fail(PYRT_ESTATE, "the sequence is not swapped out");
  std::vector<BlockId> taken;
  taken.reserve(blocks);
  uint32_t counts[kMaxGroups];
  for (uint32_t g = 0; g < num_groups_; ++g) {
    counts[g] = parked_blocks(seq, g);
    if (available(g) < counts[g]) {
      fail(PYRT_EFULL, "%u blocks come back to group %u and %u are to be had", counts[g], g,
           available(g));
    }
  }
  checkpoint();
  if (evicted != nullptr) evicted->reserve(evicted->size() + size_t{blocks} * num_groups_);
  for (uint32_t g = 0; g < num_groups_; ++g) {
    taken.resize(counts[g]);
    take_many(g, taken, evicted);
    int32_t* row = row_of(groups_[g], slot);
    uint32_t next = 0;
    for (uint32_t at = 0; at < blocks; ++at) {
      if (row[at] == kParkedEntry) row[at] = static_cast<int32_t>(taken[next++]);
    }
  }
  hot_[slot].flags &= static_cast<uint16_t>(~kParked);
}

}  // namespace pyruntime::kv
