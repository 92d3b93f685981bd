// Export keys of nodes, computed when somebody asks or when the node goes; and the counters.
#include <cstring>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

// Keys along a path are a chain: it is gone back to the last node whose place in the chain is known
// (or to the root), then forward. Paths longer than the scratch are done in parts.
void BlockPool::export_key(NodeId id) noexcept {
  const bool resumable = chains_[nodes_[id].space].resumable();
  while ((nodes_[id].flags & kHasExportKey) == 0) {
    size_t depth = 0;
    NodeId at = id;
    for (; !chain_known(at, resumable); at = nodes_[at].parent) ++depth;
    NodeId last = id;  // of this part
    size_t skipped = depth > path_.size() ? depth - path_.size() : 0;
    if (resumable) {
      for (size_t i = 0; i < skipped; ++i) last = nodes_[last].parent;
      depth -= skipped;
      skipped = 0;
    }
    if (skipped > 0) {  // nothing to go on from in between: a key that nobody can compute
      std::memset(nodes_[id].export_key, 0, sizeof nodes_[id].export_key);
      nodes_[id].flags |= kHasExportKey;
      return;
    }
    for (size_t i = depth; i-- > 0; last = nodes_[last].parent) path_[i] = last;
    KeyChain chain = chains_[nodes_[id].space];
    if ((nodes_[at].flags & kIsRoot) == 0) chain.resume(states_[at], groups_[0].nodes[at].depth);
    for (size_t i = 0; i < depth; ++i) {
      Node& node = nodes_[path_[i]];
      uint8_t key[sizeof(Digest)];
      chain.extend(tokens(path_[i]), 1, key);
      std::memcpy(node.export_key, key, sizeof node.export_key);
      node.flags |= kHasExportKey;
      if (resumable) states_[path_[i]] = chain.state();
    }
  }
}

bool BlockPool::chain_known(NodeId id, bool resumable) const noexcept {
  if ((nodes_[id].flags & kIsRoot) != 0) return true;
  // The hash's length needs the exact depth, which is saturating.
  return resumable && (nodes_[id].flags & kHasExportKey) != 0 &&
         groups_[0].nodes[id].depth < UINT16_MAX;
}

const Event& BlockPool::event(uint64_t sequence) noexcept {
  Event& event = events_.at(sequence);
  if (!event.has_key && nodes_[event.node].generation == event.generation) {
    export_key(event.node);
    std::memcpy(event.key, nodes_[event.node].export_key, sizeof event.key);
    event.has_key = true;
  }
  return event;
}

size_t BlockPool::announced(uint8_t* keys, size_t capacity) noexcept {
  size_t n = 0;
  for (NodeId id = kFirstNode; id < fresh_node_; ++id) {
    if (!is_node(id) || (nodes_[id].flags & kAnnounced) == 0) continue;
    if (n++ >= capacity) continue;
    export_key(id);
    std::memcpy(keys + (n - 1) * sizeof nodes_[id].export_key, nodes_[id].export_key,
                sizeof nodes_[id].export_key);
  }
  return n;
}

void BlockPool::fill(pyrt_kv_statistics& out) const noexcept {
  out.num_groups = num_groups_;
  size_t bytes = index_.bytes() + nodes_.bytes() + tokens_.bytes() + node_rows_.bytes() +
                 hot_.bytes() + seqs_.bytes() + tails_.bytes();
  for (uint32_t g = 0; g < num_groups_; ++g) {
    const Group& group = groups_[g];
    out.groups[g] = {group.options.num_blocks, group.runs.free(), group.reserved, group.listed};
    bytes += group.nodes.bytes() + group.owner.bytes() + group.shared.bytes() + group.rows.bytes() +
             group.rooms.bytes() + group.node_drops.bytes() + group.block_drops.bytes() +
             group.node_takes.bytes() + group.runs.bytes();
  }
  out.bytes = bytes;
  out.open_seqs = num_open_;
  out.promised = promised_;
  out.nodes = index_.size();
  out.steps = stats_.steps.read();
  out.failed_steps = stats_.failed_steps.read();
  out.admissions = stats_.admissions.read();
  out.asked_tokens = stats_.asked_tokens.read();
  out.hit_tokens = stats_.hit_tokens.read();
  out.allocated = stats_.allocated.read();
  out.extended = stats_.extended.read();
  out.extents = stats_.run_extents.read();
  for (int i = 0; i < kNumReasons; ++i) out.evicted[i] = stats_.evicted[i].read();
  out.published = stats_.published.read();
  out.duplicates = stats_.duplicates.read();
  out.unpublished = stats_.unpublished.read();
  out.copies = stats_.copies.read();
  out.moves = stats_.moves.read();
  out.rotations = stats_.rotations.read();
  out.rooms_halved = stats_.reservations_halved.read();
  out.score_calls = stats_.score_calls.read();
  out.score_faults = stats_.score_faults.read();
  out.step_ns = stats_.step_ns.read();
  for (int i = 0; i < kStepBuckets; ++i) out.step_us[i] = stats_.step_us[i].read();
}

}  // namespace pyruntime::kv
