// Every invariant of the page in block_pool.hpp, walked; a hash of the state; a picture of it.
#include <algorithm>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {
namespace {

__attribute__((format(printf, 1, 2))) [[noreturn]] void broken(const char* format, ...) {
  char text[256];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Error(PYRT_ECORRUPT, std::string("the block pool is inconsistent: ") + text);
}

class Hash {
 public:
  void add(uint64_t value) noexcept {
    const auto product = static_cast<unsigned __int128>(value ^ state_) * 0x9e3779b97f4a7c15ull;
    state_ = (state_ << 7 | state_ >> 57) ^ static_cast<uint64_t>(product) ^
             static_cast<uint64_t>(product >> 64);
  }
  uint64_t value() const noexcept { return state_; }

 private:
  uint64_t state_ = 0x243f6a8885a308d3ull;
};

}  // namespace

void BlockPool::check() const {
  for (uint32_t g = 0; g < num_groups_; ++g) check_group(g);
  check_nodes();
  check_sequences();
}

// Blocks are in one state each; holders are counted; the eviction lists hold what is cached.
void BlockPool::check_group(uint32_t g) const {
  const Group& group = groups_[g];
  const uint32_t blocks = group.options.num_blocks;
  group.runs.check();
  enum : uint8_t { kFree = 1, kReserved = 2 };
  std::vector<uint8_t> state(blocks);
  group.runs.each([&](BlockId first, uint32_t count) {
    for (uint32_t i = 0; i < count; ++i) state[first + i] = kFree;
  });
  uint64_t reserved = 0;
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
    const Room& room = group.rooms[slot];
    if ((hot_[slot].flags & kOpen) == 0) {
      if (room.count != 0 || room.bin != 0) broken("a closed sequence has room");
      continue;
    }
    if (room.count > 0 && room.bin == 0) broken("room of %u blocks is in no list", room.count);
    for (uint32_t i = 0; i < room.count; ++i) {
      if (room.begin + i >= blocks || state[room.begin + i] != 0) {
        broken("reserved block %u is free or reserved twice", room.begin + i);
      }
      state[room.begin + i] = kReserved;
    }
    reserved += room.count;
  }
  if (reserved != group.reserved) {
    broken("%llu blocks are reserved, %u counted", static_cast<unsigned long long>(reserved),
           group.reserved);
  }
  for (uint32_t bin = 0; bin < kBins; ++bin) {
    uint32_t before = 0, steps = 0;
    for (uint32_t at = group.bins[bin]; at != 0; at = group.rooms[at - 1].next) {
      const Room& room = group.rooms[at - 1];
      if (room.bin != bin + 1 || room.prev != before || ++steps > fresh_slot_) {
        broken("the list of rooms %u is broken", bin);
      }
      before = at;
    }
  }

  std::vector<uint32_t> holds(fresh_node_), shares(blocks);
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
    if ((hot_[slot].flags & kOpen) == 0) continue;
    const int32_t* row = row_of(group, slot);
    for (uint32_t at = 0; at < seqs_[slot].blocks; ++at) {
      const NodeId id = node_row_of(slot)[at];
      if (id != kNoNode && !is_node(id)) broken("entry %u of slot %u has no node", at, slot);
      if (row[at] < 0) continue;
      if (static_cast<uint32_t>(row[at]) >= blocks) broken("block %d does not exist", row[at]);
      if (id != kNoNode) ++holds[id];
      if (id == kNoNode || group.nodes[id].block != static_cast<BlockId>(row[at]))
        ++shares[row[at]];
    }
  }
  uint64_t pins = 0;
  for (BlockId block = 0; block < blocks; ++block) {
    const NodeId owner = group.owner[block];
    if (group.shared[block] != shares[block] + group.external[block]) {
      broken("block %u is in %u tables, held %u times outside, and counted %u times", block,
             shares[block], group.external[block], group.shared[block]);
    }
    if (owner != kNoNode) {
      pins += group.shared[block];
      if (!is_node(owner) || group.nodes[owner].block != block) {
        broken("block %u and its node %u do not agree", block, owner);
      }
    } else if (group.shared[block] > 0) {
      pins += group.shared[block] - 1;
    }
    const bool used = owner != kNoNode || group.shared[block] > 0;
    if (used == (state[block] != 0)) {
      broken("block %u is %s", block, used ? "in use and free" : "lost");
    }
    if (group.block_drops[block] != 0) broken("a plan left its counts");
  }
  if (pins != group.pins) {
    broken("further holders are %llu, %llu counted", static_cast<unsigned long long>(pins),
           static_cast<unsigned long long>(group.pins));
  }

  std::vector<uint32_t> kids(fresh_node_);
  uint32_t cached = 0;
  for (NodeId id = kFirstNode; id < fresh_node_; ++id) {
    const GroupNode& node = group.nodes[id];
    if (group.node_drops[id] != 0 || group.node_takes[id] != 0) broken("a plan left its counts");
    if (!is_node(id)) continue;
    const uint32_t wanted = holds[id] + (node.uses > 0 ? 1 : 0);
    if (node.hold != wanted) {
      broken("node %u is held %u times, %u counted", id, wanted, node.hold);
    }
    if (node.block == kNone) {
      if (node.hold != 0 || (node.flags & kListed) != 0) broken("node %u holds no block", id);
      continue;
    }
    if (group.owner[node.block] != id) broken("node %u and its block do not agree", id);
    ++kids[nodes_[id].parent];
    const bool idle = node.hold == 0 && group.shared[node.block] == 0;
    if (idle != ((node.flags & kListed) != 0)) {
      broken("node %u is %s", id, idle ? "cached and not listed" : "listed and in use");
    }
    cached += idle;
  }
  for (NodeId id = kFirstNode; id < fresh_node_; ++id) {
    if (is_node(id) && group.nodes[id].kids != kids[id]) {
      broken("node %u has %u resident children, %u counted", id, kids[id], group.nodes[id].kids);
    }
  }
  uint32_t listed = 0, protected_listed = 0;
  for (NodeId head = 0; head < kFirstNode; ++head) {
    NodeId before = head;
    for (NodeId id = group.nodes[head].next; id != head; id = group.nodes[id].next) {
      const GroupNode& node = group.nodes[id];
      if (!is_node(id) || node.prev != before || (node.flags & kListed) == 0 ||
          ((node.flags & kProtected) != 0) != (head == 1) || ++listed > cached) {
        broken("the eviction list of group %u is broken at node %u", g, id);
      }
      protected_listed += head == 1;
      before = id;
    }
    if (group.nodes[head].prev != before) broken("the eviction list of group %u has no end", g);
  }
  if (listed != cached || listed != group.listed || protected_listed != group.protected_listed) {
    broken("%u blocks are cached, %u listed, %u counted", cached, listed, group.listed);
  }
}

// Nodes hang together, are found by their content, and exist for a reason.
void BlockPool::check_nodes() const {
  std::vector<uint32_t> children(fresh_node_);
  size_t indexed = 0;
  uint32_t in_use = 0;
  for (NodeId id = kFirstNode; id < fresh_node_; ++id) {
    if (!is_node(id)) continue;
    ++in_use;
    const Node& node = nodes_[id];
    if ((node.flags & kIsRoot) != 0) {
      if (node.parent != kNoNode || roots_.at(node.space) != id) broken("root %u is none", id);
      continue;
    }
    ++indexed;
    if (!is_node(node.parent) || nodes_[node.parent].space != node.space) {
      broken("node %u has no parent in its namespace", id);
    }
    ++children[node.parent];
    uint64_t key;
    index_.keys(nodes_[node.parent].key, tokens(id), options_.block_size, 1, &key);
    if (key != node.key) broken("node %u has another key than its tokens", id);
    if (find_child(node.parent, key, tokens(id)) != id) broken("node %u is not indexed", id);
  }
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
    if ((hot_[slot].flags & kOpen) != 0) ++children[seqs_[slot].tip];
  }
  for (NodeId id = kFirstNode; id < fresh_node_; ++id) {
    if (!is_node(id)) continue;
    const Node& node = nodes_[id];
    if (node.children != children[id]) {
      broken("node %u is continued %u times, %u counted", id, children[id], node.children);
    }
    bool needed = node.children > 0 || (node.flags & kIsRoot) != 0;
    for (uint32_t g = 0; g < num_groups_; ++g) needed |= groups_[g].nodes[id].block != kNone;
    for (const uint32_t slot : node.tier) needed |= slot != kNone;
    if (!needed) broken("node %u is needed by nobody", id);
  }
  if (indexed != index_.size()) broken("%zu nodes, %zu indexed", indexed, index_.size());
  index_.each([&](NodeId id, uint32_t tag, size_t) {
    if (!is_node(id) || static_cast<uint32_t>(nodes_[id].key) != tag) {
      broken("the index names node %u", id);
    }
  });
  uint32_t free = 0;
  for (NodeId id = free_node_; id != kNoNode; id = nodes_[id].parent) {
    if (id >= fresh_node_ || is_node(id) || ++free > fresh_node_) broken("the free nodes");
  }
  if (free + in_use + kFirstNode != fresh_node_) broken("a node is lost");
}

void BlockPool::check_sequences() const {
  uint32_t open = 0;
  uint64_t promised = 0;
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
    const Hot& hot = hot_[slot];
    const Sequence& s = seqs_[slot];
    if ((hot.flags & kOpen) == 0) continue;
    ++open;
    promised += owed(s);
    if (s.blocks > max_blocks_ || s.published > s.blocks || hot.valid > hot.held ||
        blocks_for(hot.held) > s.blocks || hot.fill > options_.block_size) {
      broken("slot %u: %u blocks, %u published, %u held, %u valid, %u known", slot, s.blocks,
             s.published, hot.held, hot.valid, hot.fill);
    }
    NodeId before = roots_.at(s.space);
    for (uint32_t at = 0; at < s.published; ++at) {
      const NodeId id = node_row_of(slot)[at];
      if (!is_node(id) || nodes_[id].parent != before) broken("slot %u: no chain", slot);
      before = id;
    }
    if (s.tip != before) broken("slot %u: its tip is not its last settled entry", slot);
  }
  if (open != num_open_) broken("%u sequences are open, %u counted", open, num_open_);
  if (promised != promised_) broken("promised blocks are counted wrongly");
  uint32_t free = 0;
  for (uint32_t at = free_slot_; at != 0; at = seqs_[at - 1].next_free) {
    if (at > fresh_slot_ || (hot_[at - 1].flags & kOpen) != 0 || ++free > fresh_slot_) {
      broken("the free slots");
    }
  }
  if (free + open != fresh_slot_) broken("a slot is lost");
}

uint64_t BlockPool::state_hash() const {
  Hash hash;
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
    const Hot& hot = hot_[slot];
    hash.add(uint64_t{hot.generation} << 32 | hot.flags);
    if ((hot.flags & kOpen) == 0) continue;
    const Sequence& s = seqs_[slot];
    for (const uint32_t value :
         {hot.held, hot.valid, uint32_t{hot.fill}, s.space, s.tip, s.blocks, s.published,
          s.promised, s.layers, s.layered, s.plan_blocks, s.plan_uses}) {
      hash.add(value);
    }
    for (uint32_t i = 0; i < hot.fill; ++i) {
      hash.add(static_cast<uint32_t>(tails_[size_t{slot} * options_.block_size + i]));
    }
    for (uint32_t at = 0; at < s.blocks; ++at) {
      hash.add(node_row_of(slot)[at]);
      for (uint32_t g = 0; g < num_groups_; ++g) {
        hash.add(static_cast<uint32_t>(row_of(groups_[g], slot)[at]));
      }
    }
  }
  for (uint32_t at = free_slot_; at != 0; at = seqs_[at - 1].next_free) hash.add(at);
  for (uint32_t g = 0; g < num_groups_; ++g) {
    const Group& group = groups_[g];
    for (NodeId head = 0; head < kFirstNode; ++head) {
      for (NodeId id = group.nodes[head].next; id != head; id = group.nodes[id].next) hash.add(id);
    }
    for (BlockId block = 0; block < group.options.num_blocks; ++block) {
      hash.add(uint64_t{group.owner[block]} << 32 | group.shared[block]);
      hash.add(uint64_t{group.external[block]});
    }
    for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
      hash.add(uint64_t{group.rooms[slot].begin} << 32 | group.rooms[slot].count);
    }
    group.runs.each_listed(
        [&](BlockId first, uint32_t count) { hash.add(uint64_t{first} << 32 | count); });
    for (const uint64_t value : {uint64_t{group.listed}, uint64_t{group.reserved}, group.pins}) {
      hash.add(value);
    }
  }
  for (NodeId id = kFirstNode; id < fresh_node_; ++id) {
    const Node& node = nodes_[id];
    hash.add(node.generation);
    if (!is_node(id)) continue;
    hash.add(node.key);
    hash.add(uint64_t{node.parent} << 32 | node.children);
    hash.add(static_cast<uint64_t>(node.expiry_ns));
    for (const uint32_t slot : node.tier) hash.add(slot);
    for (uint32_t g = 0; g < num_groups_; ++g) {
      const GroupNode& at = groups_[g].nodes[id];
      hash.add(uint64_t{at.block} << 32 | at.hold);
      hash.add(uint64_t{at.uses} << 32 | at.hits);
    }
  }
  for (NodeId id = free_node_; id != kNoNode; id = nodes_[id].parent) hash.add(id);
  for (const uint64_t value : {uint64_t{num_open_}, promised_, uint64_t{fresh_node_},
                               uint64_t{roots_.size()}, uint64_t{index_.size()}, events_.end()}) {
    hash.add(value);
  }
  return hash.value();
}

// One character for every num_blocks / width blocks: what most of them are.
std::string BlockPool::picture(uint32_t g, uint32_t width) const {
  const Group& group = groups_[group_of(g)];
  const uint32_t blocks = group.options.num_blocks;
  if (width == 0) fail(PYRT_EINVAL, "width must not be 0");
  enum { kFree, kReserved, kCached, kPrivate, kShared, kPinned, kStates };
  static constexpr char kSigns[] = ".-coS#";
  std::vector<uint8_t> state(blocks, kFree);
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) {
    const Room& room = group.rooms[slot];
    for (uint32_t i = 0; i < room.count; ++i) state[room.begin + i] = kReserved;
  }
  for (BlockId block = 0; block < blocks; ++block) {
    const NodeId id = group.owner[block];
    if (id != kNoNode) {
      const GroupNode& node = group.nodes[id];
      state[block] = group.shared[block] > 0 ? kPinned
                     : node.hold > 1         ? kShared
                     : node.hold == 1        ? kPrivate
                                             : kCached;
    } else if (group.shared[block] > 0) {
      state[block] = group.shared[block] > 1 ? kShared : kPrivate;
    }
  }
  const uint32_t cells = std::min(width, blocks);
  std::string picture(cells, '.');
  for (uint32_t cell = 0; cell < cells; ++cell) {
    const auto from = static_cast<uint32_t>(uint64_t{cell} * blocks / cells);
    const auto to = static_cast<uint32_t>(uint64_t{cell + 1} * blocks / cells);
    uint32_t counts[kStates] = {};
    for (BlockId block = from; block < to; ++block) ++counts[state[block]];
    picture[cell] = kSigns[std::max_element(counts, counts + kStates) - counts];
  }
  return picture;
}

}  // namespace pyruntime::kv
