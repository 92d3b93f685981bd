// Lookup and publication: which leading blocks of a prompt are in memory, and what becomes so.
#include <algorithm>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {
namespace {

constexpr uint32_t kChunk = 64;  // blocks whose keys are computed, and lines fetched, at a time

}  // namespace

NodeId BlockPool::find_child(NodeId parent, uint64_t key, const int32_t* tokens) const noexcept {
  size_t at;
  NodeId id = index_.first(key, at);
  while (id != kNoNode && (nodes_[id].parent != parent ||
                           !same_tokens(tokens, this->tokens(id), options_.block_size))) {
    id = index_.next(key, at);
  }
  return id;
}

// Writes the nodes of the longest known chain of blocks to `out`, wherever their content is.
uint32_t BlockPool::walk(NodeId parent, const int32_t* tokens, uint32_t blocks,
                         NodeId* out) const noexcept {
  const uint32_t size = options_.block_size;
  uint64_t keys[kChunk];
  NodeId guess[kChunk];
  uint64_t key = nodes_[parent].key;
  uint32_t done = 0;
  // A miss is usually one at the very beginning: start small.
  for (uint32_t chunk = 8; done < blocks; chunk = kChunk) {
    const uint32_t count = std::min(chunk, blocks - done);
    const int32_t* at = tokens + size_t{done} * size;
    index_.keys(key, at, size, count, keys);
    for (uint32_t i = 0; i < count; ++i) index_.prefetch(keys[i]);
    for (uint32_t i = 0; i < count; ++i) {
      size_t slot;
      guess[i] = index_.first(keys[i], slot);
      __builtin_prefetch(&nodes_[guess[i]]);
      __builtin_prefetch(&tokens_[size_t{guess[i]} * size]);
      __builtin_prefetch(&groups_[0].nodes[guess[i]]);
    }
    for (uint32_t i = 0; i < count; ++i) {
      NodeId id = guess[i];
      if (id == kNoNode) return done + i;
      if (nodes_[id].parent != parent ||
          !same_tokens(at + size_t{i} * size, this->tokens(id), size)) {
        id = find_child(parent, keys[i], at + size_t{i} * size);
        if (id == kNoNode) return done + i;
      }
      out[done + i] = parent = id;
    }
    key = keys[count - 1];
    done += count;
  }
  return done;
}

// The longest prefix of a chain that every group can serve from its blocks: a full group needs all
// of them, a window those that the next query sees.
uint32_t BlockPool::resident(const NodeId* nodes, uint32_t count) const noexcept {
  for (uint32_t g = 0; g < num_groups_; ++g) {
    const Group& group = groups_[g];
    if (group.options.window != 0) continue;
    uint32_t i = 0;
    while (i < count && group.nodes[nodes[i]].block != kNone) ++i;
    count = i;
  }
  for (bool again = num_groups_ > 1 || groups_[0].options.window != 0; again;) {
    again = false;
    for (uint32_t g = 0; g < num_groups_ && count > 0; ++g) {
      const Group& group = groups_[g];
      if (group.options.window == 0) continue;
      // From the end: the first length whose window is whole.
      uint32_t length = count;
      uint32_t run = 0;  // resident blocks nodes[at .. length)
      for (uint32_t at = count; at > 0 && length > 0; --at) {
        if (group.nodes[nodes[at - 1]].block == kNone) {
          length = at - 1;
          run = 0;
          continue;
        }
        ++run;
        const uint64_t tokens = uint64_t{length} * options_.block_size;
        const uint64_t first =
            tokens >= group.options.window ? tokens - group.options.window + 1 : 0;
        if (length - run <= first / options_.block_size) break;
      }
      if (length < count) {
        count = length;
        again = true;
      }
    }
  }
  return count;
}

Match BlockPool::match(uint32_t space, const int32_t* tokens, uint32_t n,
                       std::vector<NodeId>* nodes) {
  if (space >= roots_.size()) fail(PYRT_ENOENT, "there is no namespace %u", space);
  Match match;
  // The last token is never cached: something must be left to compute.
  const uint32_t blocks = n == 0 ? 0 : std::min((n - 1) / options_.block_size, max_blocks_);
  const uint32_t known = options_.sharing ? walk(roots_[space], tokens, blocks, walked_.data()) : 0;
  match.blocks = resident(walked_.data(), known);
  for (uint32_t i = match.blocks; i < known; ++i, ++match.lower) {
    bool somewhere = false;
    for (const uint32_t slot : nodes_[walked_[i]].tier) somewhere |= slot != kNone;
    for (uint32_t g = 0; g < num_groups_; ++g) {
      somewhere |= groups_[g].nodes[walked_[i]].block != kNone;
    }
    if (!somewhere) break;
  }
  if (nodes != nullptr) {
    nodes->assign(walked_.data(), walked_.data() + match.blocks + match.lower);
  }
  return match;
}

// The first `count` entries of an empty sequence become these nodes' blocks.
void BlockPool::acquire(uint32_t slot, const NodeId* nodes, uint32_t count) noexcept {
  Sequence& s = seqs_[slot];
  Hot& hot = hot_[slot];
  if (count == 0) return;
  std::copy(nodes, nodes + count, node_row_of(slot));
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    int32_t* row = row_of(group, slot);
    uint32_t first = 0;
    if (group.options.window != 0) {
      const uint64_t tokens = uint64_t{count} * options_.block_size;
      if (tokens >= group.options.window) {
        first = static_cast<uint32_t>((tokens - group.options.window + 1) / options_.block_size);
      }
      std::fill(row, row + first, -1);
      group.rooms[slot].released = first;
    }
    for (uint32_t i = first; i < count; ++i) {
      GroupNode& node = group.nodes[nodes[i]];
      if ((node.flags & kListed) != 0) unlist(group, nodes[i]);
      ++node.hold;
      node.hits += node.hits < UINT8_MAX;
      row[i] = static_cast<int32_t>(node.block);
    }
  }
  s.blocks = s.published = count;
  hot.held = hot.valid = count * options_.block_size;
  hot.fill = 0;
  set_tip(slot, nodes[count - 1]);
}

uint32_t BlockPool::admit(SeqHandle seq, const int32_t* tokens, uint32_t n, uint32_t reserve) {
  const uint32_t slot = slot_of(seq);
  Sequence& s = seqs_[slot];
  if (s.blocks != 0 || hot_[slot].held != 0) fail(PYRT_ESTATE, "the sequence is not empty");
  if ((hot_[slot].flags & kParked) != 0) fail(PYRT_ESTATE, "the sequence is swapped out");
  const Match found = match(s.space, tokens, n, nullptr);
  touch(slot);
  promise(slot, 0);  // of an admission before this one that found nothing
  acquire(slot, walked_.data(), found.blocks);
  promise(slot, blocks_for(reserve));
  stats_.admissions.add(1);
  stats_.asked_tokens.add(n);
  stats_.hit_tokens.add(uint64_t{found.blocks} * options_.block_size);
  return found.blocks * options_.block_size;
}

void BlockPool::set_tip(uint32_t slot, NodeId node) noexcept {
  const NodeId before = seqs_[slot].tip;
  if (before == node) return;
  ++nodes_[node].children;
  seqs_[slot].tip = node;
  --nodes_[before].children;
  remove_if_unused(before);
}

// The next entry is full, valid and of known tokens: index it, or note that it is indexed already.
// False when there is no room for nodes.
bool BlockPool::settle(uint32_t slot, uint64_t key, const int32_t* tokens) noexcept {
  Sequence& s = seqs_[slot];
  const uint32_t at = s.published;
  NodeId id = find_child(s.tip, key, tokens);
  const bool known = id != kNoNode;
  if (!known) {
    id = make_node(s.tip, key, tokens);
    if (id == kNoNode) return false;
    stats_.published.add(1);
  } else {
    stats_.duplicates.add(1);
  }
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    const int32_t entry = row_of(group, slot)[at];
    if (entry < 0) continue;
    const auto block = static_cast<BlockId>(entry);
    GroupNode& node = group.nodes[id];
    if (node.block == kNone) {
      attach_block(group, id, block);
      --group.shared[block];
      node.hold = 1;
      node.stamp = stamp_;
    } else {
      if (node.block == block) {  // a fork's block that the other has published
        --group.shared[block];
        --group.pins;
      }
      hold(group, id);
    }
    if (at < s.plan_blocks) {
      if (node.uses == 0) ++node.hold;
      node.uses += s.plan_uses;
    }
  }
  node_row_of(slot)[at] = id;
  set_tip(slot, id);
  s.published = at + 1;
  announce(id, EventType::stored, Reason::capacity);
  return true;
}

void BlockPool::publish(uint32_t slot, const int32_t* ids, uint32_t n) noexcept {
  Sequence& s = seqs_[slot];
  Hot& hot = hot_[slot];
  const uint32_t size = options_.block_size;
  if ((hot.flags & kStopped) != 0) return;
  const uint32_t full = hot.valid / size;
  if (full > s.published && ids == nullptr) {
    if (hot.fill == size) {
      uint64_t key;
      const int32_t* tail = &tails_[size_t{slot} * size];
      index_.keys(nodes_[s.tip].key, tail, size, 1, &key);
      if (!options_.sharing || !settle(slot, key, tail)) return stop(slot);
      hot.fill = 0;
    }
    if (full > s.published) stop(slot);  // of tokens nobody told
    return;
  }
  if (ids == nullptr) return;
  if (!options_.sharing) return stop(slot);
  const uint32_t last = std::min(full, n / size);
  uint64_t keys[kChunk];
  while (s.published < last) {
    const uint32_t count = std::min(kChunk, last - s.published);
    const int32_t* at = ids + size_t{s.published} * size;
    index_.keys(nodes_[s.tip].key, at, size, count, keys);
    for (uint32_t i = 0; i < count; ++i) index_.prefetch(keys[i]);
    for (uint32_t i = 0; i < count; ++i) {
      if (!settle(slot, keys[i], at + size_t{i} * size)) return stop(slot);
    }
    hot.fill = 0;
  }
  if (full > s.published) return stop(slot);
  // What is known of the open block.
  const uint32_t begin = s.published * size;
  const uint32_t known = n > begin ? std::min(n - begin, size) : 0;
  if (known > hot.fill) {
    std::copy(ids + begin + hot.fill, ids + begin + known, &tails_[size_t{slot} * size] + hot.fill);
    hot.fill = static_cast<uint16_t>(known);
  }
}

void BlockPool::stop(uint32_t slot) noexcept {
  hot_[slot].flags |= kStopped;
  hot_[slot].fill = 0;
  stats_.unpublished.add(1);
}

void BlockPool::slide_windows(uint32_t slot) noexcept {
  const uint32_t valid = hot_[slot].valid;
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    const uint32_t window = group.options.window;
    if (window == 0 || valid < window) continue;
    const uint32_t passed =
        std::min((valid - window + 1) / options_.block_size, seqs_[slot].blocks);
    Room& room = group.rooms[slot];
    // The newer of them goes first into the eviction list: it is the end of what they hold.
    for (uint32_t at = passed; at > room.released; --at) release_entry(group, slot, at - 1);
    room.released = std::max(room.released, passed);
  }
}

void BlockPool::commit(SeqHandle seq, uint32_t tokens, uint32_t layers, const int32_t* ids,
                       uint32_t n) {
  const uint32_t slot = slot_of(seq);
  Hot& hot = hot_[slot];
  if (tokens > hot.held) {
    fail(PYRT_EINVAL, "tokens is %u; the sequence holds %u", tokens, hot.held);
  }
  if (layers > options_.num_layers) {
    fail(PYRT_EINVAL, "layers is %u; it must be in 0..%u", layers, options_.num_layers);
  }
  if ((hot.flags & kParked) != 0) fail(PYRT_ESTATE, "the sequence is swapped out");
  touch(slot);
  if (layers != options_.num_layers) {
    seqs_[slot].layers = layers;
    seqs_[slot].layered = tokens;
    return;
  }
  hot.valid = std::max(hot.valid, tokens);
  publish(slot, ids, n);
  slide_windows(slot);
}

}  // namespace pyruntime::kv
