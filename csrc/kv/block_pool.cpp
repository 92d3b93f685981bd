// Construction, namespaces and the life of sequences.
#include "kv/block_pool.hpp"

#include <algorithm>

namespace pyruntime::kv {
namespace {

constexpr uint32_t kSpaces = 4096;  // namespace roots that the node table has room for at least
constexpr uint32_t kVictims = 1024;
constexpr uint64_t kMostNodes = uint64_t{1} << 30;

}  // namespace

BlockPool::BlockPool(const Options& options) : options_(options) {
  const auto in_range = [](uint64_t value, uint64_t low, uint64_t high, const char* name) {
    if (value < low || value > high) {
      fail(PYRT_EINVAL, "%s is %llu; it must be in %llu..%llu", name,
           static_cast<unsigned long long>(value), static_cast<unsigned long long>(low),
           static_cast<unsigned long long>(high));
    }
  };
  in_range(options.groups.size(), 1, kMaxGroups, "num_groups");
  in_range(options.block_size, 1, 1024, "block_size");
  in_range(options.num_layers, 1, 1 << 16, "num_layers");
  in_range(options.max_seqs, 1, 1 << 20, "max_seqs");
  in_range(options.run_blocks, 1, 512, "run_blocks");
  in_range(options.extra_nodes, 0, kMostNodes, "extra_nodes");
  in_range(options.event_capacity, 0, 1 << 24, "event_capacity");
  num_groups_ = static_cast<uint32_t>(options.groups.size());
  uint64_t most = 0, nodes = kFirstNode + uint64_t{kSpaces} + options.extra_nodes;
  for (const GroupOptions& group : options.groups) {
    in_range(group.num_blocks, 1, 1 << 28, "num_blocks");
    in_range(group.window, 0, 1 << 30, "window");
    most = std::max<uint64_t>(most, group.num_blocks);
    // Behind a window content goes while the chain of its nodes stays.
    nodes += uint64_t{group.num_blocks} * (group.window == 0 ? 1 : 4);
  }
  in_range(options.max_blocks, 0, 1 << 24, "max_blocks");
  max_blocks_ = options.max_blocks;
  if (max_blocks_ == 0) max_blocks_ = static_cast<uint32_t>(std::min<uint64_t>(most, 1 << 24));
  in_range(nodes, 0, kMostNodes, "the number of content nodes");
  max_nodes_ = static_cast<uint32_t>(nodes);
  // A line more than the entries need, so that rows do not fall into the same cache sets.
  stride_ = (size_t{max_blocks_} + 15) / 16 * 16 + 16;
  const size_t slots = options.max_seqs;

  index_ = Index(max_nodes_, options.seed);
  nodes_ = Array<Node>(max_nodes_, true);
  tokens_ = Array<int32_t>(size_t{max_nodes_} * options.block_size, true);
  node_rows_ = Array<NodeId>(slots * stride_);
  hot_ = Array<Hot>(slots);
  seqs_ = Array<Sequence>(slots);
  tails_ = Array<int32_t>(slots * options.block_size);
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    const uint32_t blocks = options.groups[g].num_blocks;
    group.options = options.groups[g];
    group.nodes = Array<GroupNode>(max_nodes_, true);
    group.owner = Array<NodeId>(blocks);
    group.shared = Array<uint32_t>(blocks);
    group.external = Array<uint16_t>(blocks);
    group.rows = Array<int32_t>(slots * stride_);
    group.rooms = Array<Room>(slots);
    group.node_drops = Array<uint32_t>(max_nodes_);
    group.block_drops = Array<uint32_t>(blocks);
    group.node_takes = Array<uint32_t>(max_nodes_);
    group.runs = Runs(blocks);
    // The lists are rings; each begins and ends with its head.
    for (NodeId head = 0; head < kFirstNode; ++head) {
      group.nodes[head].block = kNone;
      group.nodes[head].prev = group.nodes[head].next = head;
    }
  }
  events_ = EventRing(options.event_capacity);
  if (events_.enabled()) {
    states_ = Array<ShaState>(max_nodes_);
    path_.resize(max_blocks_);
  }
  walked_.resize(max_blocks_);
  victims_.resize(kVictims);
  open_space("", 0);
}

void BlockPool::checkpoint() {
  if (fail_countdown_ >= 0 && fail_countdown_-- == 0) {
    fail(PYRT_ENOMEM, "a fault was injected here");
  }
}

uint32_t BlockPool::open_space(const void* salt, size_t bytes) {
  std::string name(static_cast<const char*>(salt), bytes);
  const auto found = spaces_.find(name);
  if (found != spaces_.end()) return found->second;
  checkpoint();
  const auto space = static_cast<uint32_t>(roots_.size());
  roots_.reserve(roots_.size() + 1);
  checkpoint();
  if (events_.enabled()) {
    chains_.reserve(roots_.size() + 1);
    chains_.resize(roots_.size(), KeyChain("", 0, "", 0, options_.block_size));
    chains_.emplace_back(options_.secret.data(), options_.secret.size(), salt, bytes,
                         options_.block_size);
  }
  const auto inserted = spaces_.emplace(std::move(name), space).first;
  const NodeId root = make_node(kNoNode, index_.root_key(salt, bytes), nullptr);
  if (root == kNoNode) {
    spaces_.erase(inserted);
    fail(PYRT_EFULL, "there are %u namespaces and no node is left for another", space);
  }
  nodes_[root].space = space;
  roots_.push_back(root);
  return space;
}

uint32_t BlockPool::slot_of(SeqHandle seq) const {
  const auto slot = static_cast<uint32_t>(seq);
  if (slot >= fresh_slot_ || hot_[slot].generation != seq >> 32 ||
      (hot_[slot].flags & kOpen) == 0) {
    fail(PYRT_ESTATE, "handle %#llx is no sequence of this pool, or no longer",
         static_cast<unsigned long long>(seq));
  }
  return slot;
}

bool BlockPool::alive(SeqHandle seq) const {
  const auto slot = static_cast<uint32_t>(seq);
  return slot < fresh_slot_ && hot_[slot].generation == seq >> 32 &&
         (hot_[slot].flags & kOpen) != 0;
}

// A slot for a new sequence, or max_seqs when all are taken.
uint32_t BlockPool::open_slot(uint32_t space) noexcept {
  uint32_t slot;
  if (free_slot_ != 0) {
    slot = free_slot_ - 1;
    free_slot_ = seqs_[slot].next_free;
  } else if (fresh_slot_ < options_.max_seqs) {
    slot = fresh_slot_++;
  } else {
    return options_.max_seqs;
  }
  const uint32_t mark = seqs_[slot].mark;
  seqs_[slot] = {};
  seqs_[slot].mark = mark;
  seqs_[slot].space = space;
  seqs_[slot].tip = roots_[space];
  ++nodes_[roots_[space]].children;
  hot_[slot] = {hot_[slot].generation + 1, 0, 0, 0, kOpen | kTouched};
  for (uint32_t g = 0; g < num_groups_; ++g) groups_[g].rooms[slot].released = 0;
  ++num_open_;
  return slot;
}

void BlockPool::close_slot(uint32_t slot) noexcept {
  Sequence& s = seqs_[slot];
  promised_ -= owed(s);
  s.promised = 0;
  release_entries(slot, 0);
  for (uint32_t g = 0; g < num_groups_; ++g) drop_room(groups_[g], slot);
  --nodes_[s.tip].children;
  remove_if_unused(s.tip);
  hot_[slot].flags = 0;
  ++touches_;
  s.next_free = free_slot_;
  free_slot_ = slot + 1;
  --num_open_;
}

SeqHandle BlockPool::open(uint32_t space) {
  if (space >= roots_.size()) fail(PYRT_ENOENT, "there is no namespace %u", space);
  const uint32_t slot = open_slot(space);
  if (slot == options_.max_seqs) {
    fail(PYRT_EFULL, "all %u sequences are open; free one or raise max_seqs", slot);
  }
  return handle_of(slot);
}

void BlockPool::promise(uint32_t slot, uint32_t blocks) noexcept {
  Sequence& s = seqs_[slot];
  promised_ -= owed(s);
  s.promised = blocks;
  promised_ += owed(s);
}

void BlockPool::release_entry(Group& group, uint32_t slot, uint32_t at) noexcept {
  int32_t& entry = row_of(group, slot)[at];
  if (entry < 0) return;
  const auto block = static_cast<BlockId>(entry);
  entry = -1;
  const NodeId id = node_row_of(slot)[at];
  if (id != kNoNode) {
    const bool its_own = group.nodes[id].block == block;
    unhold(group, id);
    if (its_own) return;
  }
  if (unshare(group, block)) group.runs.put(block, 1);
}

// Gives up the entries from `from` on, the last one first, and what runs they make goes back whole.
void BlockPool::release_entries(uint32_t slot, uint32_t from) noexcept {
  Sequence& s = seqs_[slot];
  NodeId* node_row = node_row_of(slot);
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    int32_t* row = row_of(group, slot);
    BlockId first = 0;  // a run of blocks that became free: first .. first + count - 1
    uint32_t count = 0;
    for (uint32_t at = s.blocks; at > from; --at) {
      if (row[at - 1] < 0) continue;
      const auto block = static_cast<BlockId>(row[at - 1]);
      const NodeId id = node_row[at - 1];
      if (id != kNoNode) {
        const bool its_own = group.nodes[id].block == block;
        unhold(group, id);
        if (its_own) continue;
      }
      if (!unshare(group, block)) continue;
      if (count > 0 && block + 1 == first) {
        first = block;
        ++count;
        continue;
      }
      if (count > 0) group.runs.put(first, count);
      first = block;
      count = 1;
    }
    if (count > 0) group.runs.put(first, count);
  }
  std::fill(node_row + from, node_row + s.blocks, kNoNode);
  s.blocks = from;
}

void BlockPool::free(std::span<const SeqHandle> seqs) {
  // All are looked at before any goes.
  next_epoch();
  for (const SeqHandle seq : seqs) {
    Sequence& s = seqs_[slot_of(seq)];
    if (s.mark == epoch_) fail(PYRT_ESTATE, "a sequence is in the list twice");
    s.mark = epoch_;
  }
  for (const SeqHandle seq : seqs) close_slot(static_cast<uint32_t>(seq));
}

void BlockPool::trim_slot(uint32_t slot, uint32_t tokens) noexcept {
  Sequence& s = seqs_[slot];
  Hot& hot = hot_[slot];
  const uint32_t size = options_.block_size;
  const uint32_t left = blocks_for(tokens);
  touch(slot);
  const uint64_t owed_before = owed(s);
  if (left < s.blocks) {
    for (uint32_t g = 0; g < num_groups_; ++g) drop_room(groups_[g], slot);  // it lay behind them
  }
  const uint32_t full = tokens / size;
  // A block of indexed content that is cut is written again only by a copy.
  const NodeId partial = full < left ? node_row_of(slot)[full] : kNoNode;
  if (full < s.published) {
    const NodeId tip = full == 0 ? roots_[s.space] : node_row_of(slot)[full - 1];
    const uint16_t fill = static_cast<uint16_t>(tokens - full * size);
    if (partial != kNoNode) {
      const int32_t* known = this->tokens(partial);
      std::copy(known, known + fill, &tails_[size_t{slot} * size]);
    }
    hot.fill = fill;
    s.published = full;
    set_tip(slot, tip);
  } else {
    const uint32_t begin = s.published * size;
    hot.fill =
        static_cast<uint16_t>(std::min<uint32_t>(hot.fill, tokens > begin ? tokens - begin : 0));
  }
  if (left < s.blocks) release_entries(slot, left);
  if (partial != kNoNode) hot.flags |= kShares;
  hot.held = std::min(hot.held, tokens);
  hot.valid = std::min(hot.valid, tokens);
  s.layered = std::min(s.layered, tokens);
  for (uint32_t g = 0; g < num_groups_; ++g) {
    groups_[g].rooms[slot].released = std::min(groups_[g].rooms[slot].released, left);
  }
  promised_ += owed(s) - owed_before;
}

void BlockPool::trim(SeqHandle seq, uint32_t tokens) {
  const uint32_t slot = slot_of(seq);
  check_trim(slot, tokens);
  trim_slot(slot, tokens);
}

void BlockPool::check_trim(uint32_t slot, uint32_t tokens) const {
  if (tokens > hot_[slot].held) {
    fail(PYRT_EINVAL, "tokens is %u; the sequence holds %u", tokens, hot_[slot].held);
  }
  if ((hot_[slot].flags & kParked) != 0) fail(PYRT_ESTATE, "the sequence is swapped out");
  for (uint32_t g = 0; g < num_groups_; ++g) {
    const Group& group = groups_[g];
    const uint32_t size = options_.block_size;
    // What the next token attends to, and where it is written, must not have been given up.
    const uint32_t window = group.options.window;
    const uint32_t seen = window != 0 && tokens >= window ? tokens - window + 1 : 0;
    const bool gone = window != 0 && tokens > seen && group.rooms[slot].released * size > seen;
    if (gone || (tokens % size != 0 && row_of(group, slot)[tokens / size] < 0)) {
      fail(PYRT_EINVAL, "a window or a mask has given up what is needed behind %u tokens", tokens);
    }
  }
}

SeqHandle BlockPool::fork(SeqHandle parent, bool published_only) {
  const uint32_t from = slot_of(parent);
  if ((hot_[from].flags & kParked) != 0) fail(PYRT_ESTATE, "the sequence is swapped out");
  checkpoint();
  const uint32_t slot = open_slot(seqs_[from].space);
  if (slot == options_.max_seqs) {
    fail(PYRT_EFULL, "all %u sequences are open; free one or raise max_seqs", slot);
  }
  const Sequence& p = seqs_[from];
  Sequence& s = seqs_[slot];
  const uint32_t size = options_.block_size;
  const uint32_t tokens = published_only ? p.published * size : hot_[from].valid;
  const uint32_t blocks = blocks_for(tokens);
  std::copy(node_row_of(from), node_row_of(from) + blocks, node_row_of(slot));
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    int32_t* row = row_of(group, slot);
    std::copy(row_of(group, from), row_of(group, from) + blocks, row);
    for (uint32_t at = 0; at < blocks; ++at) {
      if (row[at] < 0) continue;
      const NodeId id = node_row_of(slot)[at];
      // A pin takes the block that is found, not a second copy of it.
      if (published_only) row[at] = static_cast<int32_t>(group.nodes[id].block);
      const auto block = static_cast<BlockId>(row[at]);
      if (id != kNoNode) hold(group, id);
      if (id == kNoNode || group.nodes[id].block != block) share(group, block);
    }
    group.rooms[slot].released = std::min(group.rooms[from].released, blocks);
  }
  s.blocks = blocks;
  s.published = std::min(p.published, blocks);
  set_tip(slot, p.tip);
  Hot& hot = hot_[slot];
  hot.held = hot.valid = tokens;
  hot.flags |= hot_[from].flags & kStopped;
  const uint32_t begin = s.published * size;
  hot.fill = static_cast<uint16_t>(
      std::min<uint32_t>(hot_[from].fill, tokens > begin ? tokens - begin : 0));
  std::copy_n(&tails_[size_t{from} * size], hot.fill, &tails_[size_t{slot} * size]);
  if (published_only) return handle_of(slot);
  // Either of them may write next what both hold.
  hot.flags |= kShares;
  hot_[from].flags |= kShares;
  touch(from);
  return handle_of(slot);
}

void BlockPool::plan(SeqHandle seq, uint32_t tokens, uint32_t uses) {
  const uint32_t slot = slot_of(seq);
  if (uses >= 1u << 24) fail(PYRT_EINVAL, "uses is %u; it must be below 2^24", uses);
  Sequence& s = seqs_[slot];
  if (uses > 0 && s.plan_uses != 0) fail(PYRT_ESTATE, "the sequence has a plan already");
  const uint32_t planned = uses > 0 ? tokens / options_.block_size : s.plan_blocks;
  for (uint32_t at = 0; at < std::min(planned, s.published); ++at) {
    const NodeId id = node_row_of(slot)[at];
    for (uint32_t g = 0; g < num_groups_; ++g) {
      if (row_of(groups_[g], slot)[at] < 0) continue;
      GroupNode& node = groups_[g].nodes[id];
      if (uses > 0) {
        if (node.uses == 0) ++node.hold;
        node.uses += uses + 1;  // this sequence's own release counts as well
      } else if (node.uses > 0) {
        --node.hold;  // not the last: the sequence holds it
        node.uses = 0;
      }
    }
  }
  s.plan_blocks = uses > 0 ? planned : 0;
  s.plan_uses = uses > 0 ? uses + 1 : 0;
}

uint32_t BlockPool::available(uint32_t g) const {
  const Group& group = groups_[g];
  return group.runs.free() + group.reserved + group.listed;
}

bool BlockPool::fits(uint32_t tokens) const {
  const uint32_t wanted = blocks_for(tokens);
  if (wanted > max_blocks_) return false;
  for (uint32_t g = 0; g < num_groups_; ++g) {
    if (wanted > groups_[g].options.num_blocks) return false;
  }
  return true;
}

}  // namespace pyruntime::kv
