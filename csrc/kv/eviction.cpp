// Nodes: made, held, cached, evicted, removed.
#include <algorithm>
#include <cmath>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {
namespace {

// The eviction order is three rings one after the other, each beginning and ending with its head.
constexpr NodeId kHead = 0;           // the list, or its first segment
constexpr NodeId kProtectedHead = 1;  // the second segment
constexpr NodeId kSpentHead = 2;      // whose plan is over: goes before all
constexpr NodeId kHeads[] = {kSpentHead, kHead, kProtectedHead};
constexpr uint32_t kWindow = 64;  // candidates that a score function sees

}  // namespace

NodeId BlockPool::make_node(NodeId parent, uint64_t key, const int32_t* tokens) noexcept {
  NodeId id = free_node_;
  if (id != kNoNode) {
    free_node_ = nodes_[id].parent;
  } else if (fresh_node_ < max_nodes_) {
    id = fresh_node_++;
  } else {
    return kNoNode;
  }
  Node& node = nodes_[id];
  const uint32_t generation = node.generation + 1;
  const bool is_root = parent == kNoNode;
  node = {};
  node.key = key;
  node.parent = parent;
  node.generation = generation;
  for (uint32_t& slot : node.tier) slot = kNone;
  node.flags = is_root ? static_cast<uint32_t>(kIsRoot) : 0;
  if (!is_root) {
    node.space = nodes_[parent].space;
    ++nodes_[parent].children;
    std::memcpy(&tokens_[size_t{id} * options_.block_size], tokens,
                size_t{options_.block_size} * sizeof(int32_t));
    index_.insert(key, id);
  }
  for (uint32_t g = 0; g < num_groups_; ++g) {
    GroupNode& at = groups_[g].nodes[id];
    at = {};
    at.block = kNone;
    if (!is_root) {
      const uint32_t depth = groups_[g].nodes[parent].depth;
      at.depth = static_cast<uint16_t>(std::min<uint32_t>(depth + 1, UINT16_MAX));
    }
  }
  return id;
}

// Removes a node that nothing needs any more, then its parent if that was its last child, and so
// on.
void BlockPool::remove_if_unused(NodeId id) noexcept {
  for (;;) {
    Node& node = nodes_[id];
    if (node.children != 0 || (node.flags & kIsRoot) != 0) return;
    for (uint32_t g = 0; g < num_groups_; ++g) {
      if (groups_[g].nodes[id].block != kNone) return;
    }
    for (const uint32_t slot : node.tier) {
      if (slot != kNone) return;
    }
    if (tiers_ != nullptr) tiers_->removed(id);
    announce(id, EventType::removed, Reason::capacity);
    index_.erase(node.key, id);
    const NodeId parent = node.parent;
    ++node.generation;
    node.parent = free_node_;
    free_node_ = id;
    --nodes_[parent].children;
    id = parent;
  }
}

bool BlockPool::is_node(NodeId id) const {
  return id >= kFirstNode && id < fresh_node_ && nodes_[id].generation % 2 == 1;
}

void BlockPool::list(Group& group, NodeId id, bool spent) noexcept {
  GroupNode* nodes = group.nodes.data();
  GroupNode& node = nodes[id];
  const bool second = policy_ == Policy::slru && node.hits > 0 && !spent;
  const NodeId head = spent ? kSpentHead : second ? kProtectedHead : kHead;
  const NodeId prev = nodes[head].prev;
  node.prev = prev;
  node.next = head;
  nodes[prev].next = id;
  nodes[head].prev = id;
  node.flags |= second ? kListed | kProtected : kListed;
  ++group.listed;
  if (!second) return;
  ++group.protected_listed;
  // The second segment gives its oldest back when it exceeds three quarters.
  while (uint64_t{group.protected_listed} * 4 > uint64_t{group.listed} * 3) {
    const NodeId oldest = nodes[kProtectedHead].next;
    unlist(group, oldest);
    nodes[oldest].hits = 0;
    list(group, oldest, false);
  }
}

void BlockPool::unlist(Group& group, NodeId id) noexcept {
  GroupNode* nodes = group.nodes.data();
  GroupNode& node = nodes[id];
  nodes[node.prev].next = node.next;
  nodes[node.next].prev = node.prev;
  --group.listed;
  if ((node.flags & kProtected) != 0) --group.protected_listed;
  node.flags &= static_cast<uint8_t>(~(kListed | kProtected));
}

void BlockPool::hold(Group& group, NodeId id) noexcept {
  GroupNode& node = group.nodes[id];
  if ((node.flags & kListed) != 0) unlist(group, id);
  ++node.hold;
}

void BlockPool::unhold(Group& group, NodeId id) noexcept {
  GroupNode& node = group.nodes[id];
  bool spent = false;
  if (node.uses > 0 && --node.uses == 0) {
    --node.hold;  // the plan's
    spent = true;
  }
  if (--node.hold > 0) return;
  node.stamp = stamp_;
  if (group.pins == 0 || group.shared[node.block] == 0) list(group, id, spent);
}

// A block that one private entry (or a tier) owns becomes the node's; who owned it holds the node.
void BlockPool::attach_block(Group& group, NodeId id, BlockId block) noexcept {
  GroupNode& node = group.nodes[id];
  node.block = block;
  group.owner[block] = id;
  const NodeId parent = nodes_[id].parent;
  ++group.nodes[parent].kids;
}

void BlockPool::share(Group& group, BlockId block) noexcept {
  ++group.shared[block];
  ++group.pins;
  const NodeId id = group.owner[block];
  if (id != kNoNode && (group.nodes[id].flags & kListed) != 0) unlist(group, id);
}

// Takes one holder from a block: a private entry, a pin, a copy in flight.
bool BlockPool::unshare(Group& group, BlockId block) noexcept {
  if (--group.shared[block] > 0) {
    --group.pins;  // each holder but the last was counted as one too many
    return false;
  }
  const NodeId id = group.owner[block];
  if (id == kNoNode) return true;
  --group.pins;
  if (group.nodes[id].hold == 0) {
    group.nodes[id].stamp = stamp_;
    list(group, id, false);
  }
  return false;
}

void BlockPool::announce(NodeId id, EventType type, Reason reason) noexcept {
  if (!events_.enabled()) return;
  Node& node = nodes_[id];
  if (type == EventType::stored) {
    if ((node.flags & kAnnounced) != 0) return;
    node.flags |= kAnnounced;
  } else {
    if ((node.flags & kAnnounced) == 0) return;
    node.flags &= ~kAnnounced;
    export_key(id);
  }
  Event event{};
  event.type = type;
  event.reason = static_cast<uint32_t>(reason);
  event.node = id;
  event.generation = node.generation;
  if (type == EventType::removed) {
    std::memcpy(event.key, node.export_key, sizeof event.key);
    event.has_key = true;
    // Its `stored` event can be completed only now: the node goes.
    Event* stored = events_.find(node.stored_event);
    if (stored != nullptr && stored->node == id && stored->generation == node.generation &&
        stored->type == EventType::stored) {
      std::memcpy(stored->key, node.export_key, sizeof event.key);
      stored->has_key = true;
    }
  }
  const uint64_t sequence = events_.push(event);
  if (type == EventType::stored) node.stored_event = static_cast<uint32_t>(sequence);
}

BlockId BlockPool::evict_node(uint32_t g, NodeId id, std::vector<Eviction>* evicted) noexcept {
  Group& group = groups_[g];
  GroupNode& at = group.nodes[id];
  unlist(group, id);
  const BlockId block = at.block;
  const bool kept = tiers_ != nullptr && tiers_->evicting(g, id, block);
  if (evicted != nullptr) evicted->push_back({g, block, id, nodes_[id].generation});
  at.block = kNone;
  at.hits = 0;
  group.owner[block] = kNoNode;
  --group.nodes[nodes_[id].parent].kids;
  stats_.evicted[static_cast<int>(kept ? Reason::demoted : Reason::capacity)].add(1);
  if (!kept) announce(id, EventType::removed, Reason::capacity);
  remove_if_unused(id);
  return block;
}

// Up to `n` nodes to evict next, in order, without touching anything but the order of nodes that
// should not go yet. At least one while the group lists any.
uint32_t BlockPool::candidates(Group& group, uint32_t n, NodeId* out) noexcept {
  GroupNode* nodes = group.nodes.data();
  const bool leaves_only = group.options.window == 0;
  uint32_t found = 0;
  for (const NodeId head : kHeads) {
    NodeId id = nodes[head].next;
    // What is moved may be the next one, into the other segment: any head ends the walk.
    for (uint32_t seen = 0; id >= kFirstNode && found < n && seen < n + kWindow; ++seen) {
      const NodeId next = nodes[id].next;
      __builtin_prefetch(&nodes_[id]);
      __builtin_prefetch(&group.owner[nodes[id].block]);
      // A node whose children are all in `out` already may go behind them.
      uint32_t kids = leaves_only ? nodes[id].kids : 0;
      for (uint32_t i = found; kids > 0 && i-- > 0;) kids -= nodes_[out[i]].parent == id;
      if (kids == 0) {
        out[found++] = id;
      } else {
        // Out of order (a tier or a pin touched a child alone): its turn comes after them.
        unlist(group, id);
        list(group, id, false);
        stats_.rotations.add(1);
      }
      id = next;
    }
    if (found > 0) return found;
  }
  // Children that are pinned keep their parents from going in order: then out of order, which
  // costs them their place in lookups until the parent is back.
  return oldest_in(group, {out, std::min(n, 1u)});
}

// Evicts `n` blocks; the plan has seen to it that there are as many.
void BlockPool::evict(uint32_t g, uint32_t n, BlockId* out,
                      std::vector<Eviction>* evicted) noexcept {
  Group& group = groups_[g];
  while (n > 0) {
    NodeId ids[kWindow];
    uint32_t count = 0;
    if (policy_ == Policy::score && score_ != nullptr) {
      count = candidates(group, kWindow, ids);
      count = std::min(n, rate(group, ids, count));
    } else {
      count = candidates(group, std::min(n, kWindow / 2), ids);
      for (uint32_t i = 0; i < count; ++i) index_.prefetch(nodes_[ids[i]].key);
    }
    for (uint32_t i = 0; i < count; ++i) *out++ = evict_node(g, ids[i], evicted);
    n -= count;
  }
}

// Orders candidates by the user's function and returns how many of them to evict before asking
// again. A function that leaves a score unwritten is switched off.
uint32_t BlockPool::rate(Group& group, NodeId* ids, uint32_t count) noexcept {
  Candidate given[kWindow];
  double scores[kWindow];
  // A quiet NaN with a payload no arithmetic makes: still there means not answered.
  constexpr uint64_t kUnset = 0x7ff8dead0000beefull;
  for (uint32_t i = 0; i < count; ++i) {
    const GroupNode& at = group.nodes[ids[i]];
    const Node& node = nodes_[ids[i]];
    given[i] = {ids[i],  at.block,      at.depth,      stamp_ - at.stamp,
                at.hits, node.children, node.expiry_ns};
    std::memcpy(&scores[i], &kUnset, sizeof kUnset);
  }
  stats_.score_calls.add(1);
  score_(given, count, scores, score_user_);
  uint32_t order[kWindow];
  for (uint32_t i = 0; i < count; ++i) {
    uint64_t bits;
    std::memcpy(&bits, &scores[i], sizeof bits);
    if (bits == kUnset) {
      stats_.score_faults.add(1);
      score_ = nullptr;
      return count;
    }
    if (std::isnan(scores[i])) scores[i] = -INFINITY;
    order[i] = i;
  }
  // Parents are behind their children in `ids`; among equals the older goes first.
  std::stable_sort(order, order + count,
                   [&](uint32_t a, uint32_t b) { return scores[a] < scores[b]; });
  NodeId sorted[kWindow];
  uint32_t taken = 0;
  for (uint32_t i = 0; i < count && taken < (count + 1) / 2; ++i) {
    const NodeId id = ids[order[i]];
    uint32_t kids = group.options.window == 0 ? group.nodes[id].kids : 0;
    for (uint32_t j = 0; kids > 0 && j < taken; ++j) kids -= nodes_[sorted[j]].parent == id;
    if (kids == 0) sorted[taken++] = id;
  }
  if (taken == 0) return 1;  // only parents of what is pinned are left
  std::copy(sorted, sorted + taken, ids);
  return taken;
}

uint32_t BlockPool::oldest(uint32_t g, std::span<NodeId> out) const {
  return oldest_in(groups_[group_of(g)], out);
}

uint32_t BlockPool::oldest_in(const Group& group, std::span<NodeId> out) noexcept {
  uint32_t found = 0;
  for (const NodeId head : kHeads) {
    for (NodeId id = group.nodes[head].next; id != head && found < out.size();
         id = group.nodes[id].next) {
      out[found++] = id;
    }
  }
  return found;
}

void BlockPool::set_policy(Policy policy, ScoreFunction score, void* user) {
  if (policy == Policy::score && score == nullptr) {
    fail(PYRT_EINVAL, "policy score needs a function");
  }
  policy_ = policy;
  score_ = score;
  score_user_ = user;
  if (policy == Policy::slru) return;
  // One segment: what was protected is the younger.
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    for (NodeId id = group.nodes[kProtectedHead].next; id != kProtectedHead;
         id = group.nodes[kProtectedHead].next) {
      unlist(group, id);
      list(group, id, false);
    }
  }
}

void BlockPool::clear() {
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    while (group.listed > 0) {
      NodeId ids[kWindow];
      const uint32_t count = candidates(group, kWindow, ids);
      for (uint32_t i = 0; i < count; ++i) {
        announce(ids[i], EventType::removed, Reason::cleared);
        unlist(group, ids[i]);
        const BlockId block = group.nodes[ids[i]].block;
        group.nodes[ids[i]].block = kNone;
        group.owner[block] = kNoNode;
        --group.nodes[nodes_[ids[i]].parent].kids;
        stats_.evicted[static_cast<int>(Reason::cleared)].add(1);
        group.runs.put(block, 1);
        remove_if_unused(ids[i]);
      }
    }
  }
}

}  // namespace pyruntime::kv
