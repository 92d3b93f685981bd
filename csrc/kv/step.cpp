// The step: a plan that may fail and changes nothing, then a commit that cannot fail.
#include <algorithm>
#include <chrono>

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

// Simulates giving up the entries from `from` on: adds the blocks that would become available to
// `gains`. Exact also where several sequences of one plan share blocks, because drops are counted
// over all of them: the drop that leaves no holder counts. clear_drops() takes the counts back.
void BlockPool::count_drops(uint32_t slot, uint32_t from, int64_t* gains) noexcept {
  const Sequence& s = seqs_[slot];
  const NodeId* node_row = node_row_of(slot);
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    const int32_t* row = row_of(group, slot);
    for (uint32_t at = from; at < s.blocks; ++at) {
      if (row[at] < 0) continue;
      const auto block = static_cast<BlockId>(row[at]);
      const NodeId held = node_row[at];
      if (held != kNoNode) {
        ++group.node_drops[held];
        gains[g] += would_be_cached(group, held, 0);
        if (group.nodes[held].block == block) continue;
      }
      ++group.block_drops[block];
      const NodeId owner = group.owner[block];
      gains[g] += owner == kNoNode ? group.block_drops[block] == group.shared[block]
                                   : would_be_cached(group, owner, 0);
    }
  }
}

// Whether a node's block would be in the eviction list after the drops counted so far, and is not
// there now.
bool BlockPool::would_be_cached(const Group& group, NodeId id, uint32_t taken) const noexcept {
  const GroupNode& node = group.nodes[id];
  const uint32_t drops = group.node_drops[id];
  const uint32_t plan = node.uses > 0 && node.uses <= drops ? 1 : 0;
  return node.hold + taken == drops + plan &&
         group.shared[node.block] == group.block_drops[node.block] && (node.flags & kListed) == 0;
}

void BlockPool::clear_drops(uint32_t slot, uint32_t from) noexcept {
  const Sequence& s = seqs_[slot];
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    const int32_t* row = row_of(group, slot);
    for (uint32_t at = from; at < s.blocks; ++at) {
      if (row[at] < 0) continue;
      group.node_drops[node_row_of(slot)[at]] = 0;
      group.block_drops[static_cast<uint32_t>(row[at])] = 0;
    }
  }
}

void BlockPool::next_epoch() noexcept {
  if (++epoch_ != 0) return;
  for (uint32_t slot = 0; slot < fresh_slot_; ++slot) seqs_[slot].mark = 0;
  epoch_ = 1;
}

// Throws for what no state of the pool could do; marks the slots that are freed.
void BlockPool::validate(const StepOps& ops) {
  next_epoch();
  for (const SeqHandle seq : ops.frees) {
    Sequence& s = seqs_[slot_of(seq)];
    if (s.mark == epoch_) fail(PYRT_ESTATE, "a sequence is to be freed twice");
    s.mark = epoch_;
  }
  checkpoint();
  const uint32_t freed = epoch_;
  next_epoch();
  for (const Growth& trim : ops.trims) {
    const uint32_t slot = slot_of(trim.seq);
    if (seqs_[slot].mark == freed) fail(PYRT_ESTATE, "a sequence is freed and trimmed at once");
    if (seqs_[slot].mark == epoch_) fail(PYRT_ESTATE, "a sequence is trimmed twice");
    check_trim(slot, trim.tokens);
    seqs_[slot].mark = epoch_;
    seqs_[slot].trim_to = trim.tokens;
  }
  checkpoint();
  trim_epoch_ = epoch_;
  next_epoch();
  for (const Growth& growth : ops.grows) {
    const uint32_t slot = slot_of(growth.seq);
    const uint32_t mark = seqs_[slot].mark;
    if (mark == freed) fail(PYRT_ESTATE, "a sequence is freed and grown at once");
    if (mark == epoch_) fail(PYRT_ESTATE, "a sequence is grown twice");
    if ((hot_[slot].flags & kParked) != 0) fail(PYRT_ESTATE, "a sequence is swapped out");
    seqs_[slot].mark = epoch_;
    seqs_[slot].trimmed = mark == trim_epoch_;
  }
  for (const Admission& a : ops.admissions) {
    if (a.space >= roots_.size()) fail(PYRT_ENOENT, "there is no namespace %u", a.space);
  }
  checkpoint();
}

// Adds what a sequence needs to hold `tokens`: blocks at its end, and one for the entry it writes
// next if that is shared (the first of two sequences to write copies, the other need not).
void BlockPool::plan_growth(uint32_t slot, uint32_t tokens, uint32_t valid, int64_t* need) {
  const Sequence& s = seqs_[slot];
  uint32_t blocks = s.blocks;
  bool shares = (hot_[slot].flags & kShares) != 0;
  if (s.trimmed) {
    blocks = std::min(blocks, blocks_for(s.trim_to));
    valid = std::min(valid, s.trim_to);
    shares |= valid < s.published * options_.block_size;
  }
  const uint32_t wanted = blocks_for(tokens);
  const uint32_t at = valid / options_.block_size;
  for (uint32_t g = 0; g < num_groups_; ++g) {
    Group& group = groups_[g];
    need[g] += wanted > blocks ? wanted - blocks : 0;
    if (!shares || at >= blocks || row_of(group, slot)[at] < 0) continue;
    const auto block = static_cast<BlockId>(row_of(group, slot)[at]);
    if (group.owner[block] != kNoNode) {
      ++need[g];
    } else if (group.shared[block] - group.block_drops[block] > 1) {
      copied_.emplace_back(g, block);
      ++group.block_drops[block];
      ++need[g];
    }
  }
}

// Notes which blocks an admission finds and what it needs beyond them.
uint32_t BlockPool::plan_admission(const Admission& a, size_t at, int64_t* need) {
  const uint32_t blocks =
      a.num_tokens == 0 ? 0 : std::min((a.num_tokens - 1) / options_.block_size, max_blocks_);
  hits_.resize(at + blocks);
  taken_.reserve(at + blocks);
  checkpoint();
  uint32_t found = 0;
  if (options_.sharing) {
    found = walk(roots_[a.space], a.tokens, blocks, hits_.data() + at);
    found = resident(hits_.data() + at, found);
  }
  const uint32_t wanted = blocks_for(a.room);
  for (uint32_t g = 0; g < num_groups_; ++g) need[g] += wanted > found ? wanted - found : 0;
  return found;
}

bool BlockPool::step(const StepOps& ops, StepResult& result, bool dry) {
  const auto begin = std::chrono::steady_clock::now();
  result.num_grown = result.num_admitted = 0;
  result.never_fits = false;
  result.copies.clear();
  result.evicted.clear();
  validate(ops);

  int64_t left[kMaxGroups], gains[kMaxGroups] = {};
  for (uint32_t g = 0; g < num_groups_; ++g) left[g] = available(g);
  for (const SeqHandle seq : ops.frees) count_drops(static_cast<uint32_t>(seq), 0, gains);
  for (const Growth& trim : ops.trims) {
    count_drops(static_cast<uint32_t>(trim.seq), blocks_for(trim.tokens), gains);
  }
  struct Restore {  // the simulation's counts, whatever happens
    BlockPool& pool;
    const StepOps& ops;
    std::vector<NodeId>& taken;
    ~Restore() {
      for (const SeqHandle seq : ops.frees) pool.clear_drops(static_cast<uint32_t>(seq), 0);
      for (const Growth& trim : ops.trims) {
        pool.clear_drops(static_cast<uint32_t>(trim.seq), pool.blocks_for(trim.tokens));
      }
      for (const NodeId id : taken) {
        for (uint32_t g = 0; g < pool.num_groups_; ++g) pool.groups_[g].node_takes[id] = 0;
      }
      taken.clear();
      for (const auto& [g, block] : pool.copied_) pool.groups_[g].block_drops[block] = 0;
      pool.copied_.clear();
    }
  } restore{*this, ops, taken_};

  int64_t promised = static_cast<int64_t>(promised_);
  for (const SeqHandle seq : ops.frees) promised -= owed(seqs_[static_cast<uint32_t>(seq)]);
  uint32_t fits_grows = 0, fits_admissions = 0;
  bool all = true;
  uint64_t total_need = 0;
  const auto subtract = [&](const int64_t* need) {
    bool enough = true;
    for (uint32_t g = 0; g < num_groups_; ++g) {
      left[g] -= need[g];
      total_need += static_cast<uint64_t>(need[g]);
      enough &= left[g] + gains[g] >= 0;
    }
    return enough;
  };
  const auto too_large = [&](uint64_t tokens) {
    if (tokens <= UINT32_MAX && fits(static_cast<uint32_t>(tokens))) return false;
    return result.never_fits = true;
  };
  for (uint32_t g = 0; g < num_groups_; ++g) result.need[g] = 0;
  for (const Growth& growth : ops.grows) {
    const auto slot = static_cast<uint32_t>(growth.seq);
    int64_t need[kMaxGroups] = {};
    plan_growth(slot, growth.tokens, hot_[slot].valid, need);
    for (uint32_t g = 0; g < num_groups_; ++g) result.need[g] += static_cast<uint32_t>(need[g]);
    const bool large = too_large(growth.tokens);
    all = subtract(need) && !large && all;
    if (all) ++fits_grows;
  }
  checkpoint();

  size_t hits = 0;
  found_.clear();
  for (const Admission& a : ops.admissions) {
    int64_t need[kMaxGroups] = {};
    const uint32_t found = plan_admission(a, hits, need);
    found_.push_back(found);
    for (uint32_t g = 0; g < num_groups_; ++g) {
      result.need[g] += static_cast<uint32_t>(need[g]);
      // Content that it takes out of the eviction list is not to be had any more.
      for (uint32_t i = first_seen(g, found); i < found; ++i) {
        const NodeId id = hits_[hits + i];
        Group& group = groups_[g];
        if (group.node_takes[id]++ == 0) {
          need[g] += (group.nodes[id].flags & kListed) != 0 || would_be_cached(group, id, 0);
        }
      }
    }
    taken_.insert(taken_.end(), hits_.begin() + static_cast<ptrdiff_t>(hits),
                  hits_.begin() + static_cast<ptrdiff_t>(hits + found));
    hits += found;
    const bool large = too_large(std::max<uint64_t>({a.room, a.reserve, 1}));
    bool enough = subtract(need) && !large;
    if (ops.keep_promises) {
      const int64_t more = blocks_for(std::max(a.room, a.reserve));
      promised += std::max<int64_t>(0, more - blocks_for(a.room));
      for (uint32_t g = 0; g < num_groups_; ++g) enough &= left[g] + gains[g] >= promised;
    }
    enough &= num_open_ + fits_admissions - ops.frees.size() < options_.max_seqs;
    all = all && enough;
    if (all) ++fits_admissions;
  }
  for (uint32_t g = 0; g < num_groups_; ++g) result.left[g] = left[g] + gains[g];
  if (dry) {
    result.num_grown = fits_grows;
    result.num_admitted = fits_admissions;
    return all;
  }
  if (!all && !ops.prefix) {
    if (!ops.attempt) stats_.failed_steps.add(1);
    return false;
  }
  result.copies.reserve(size_t{fits_grows} * num_groups_);
  checkpoint();
  if (tiers_ != nullptr) {
    // Each taker may evict a run beyond its need.
    result.evicted.reserve(total_need + size_t{4} * options_.run_blocks * num_groups_ *
                                            (size_t{fits_grows} + fits_admissions + 1));
  }
  checkpoint();

  // From here on nothing fails.
  ++stamp_;
  for (const SeqHandle seq : ops.frees) {
    clear_drops(static_cast<uint32_t>(seq), 0);
    close_slot(static_cast<uint32_t>(seq));
  }
  for (const Growth& trim : ops.trims) {
    const auto slot = static_cast<uint32_t>(trim.seq);
    clear_drops(slot, blocks_for(trim.tokens));
    trim_slot(slot, trim.tokens);
  }
  // Hits are held before anything is evicted.
  hits = 0;
  for (uint32_t i = 0; i < fits_admissions; ++i) {
    Admission& a = ops.admissions[i];
    const uint32_t slot = open_slot(a.space);
    a.seq = handle_of(slot);
    acquire(slot, hits_.data() + hits, found_[i]);
    promise(slot, blocks_for(a.reserve));
    a.cached = found_[i] * options_.block_size;
    hits += found_[i];
    stats_.admissions.add(1);
    stats_.asked_tokens.add(a.num_tokens);
    stats_.hit_tokens.add(a.cached);
  }
  for (uint32_t i = 0; i < fits_grows; ++i) {
    grow(static_cast<uint32_t>(ops.grows[i].seq), ops.grows[i].tokens, result);
  }
  for (uint32_t i = 0; i < fits_admissions; ++i) {
    grow(static_cast<uint32_t>(ops.admissions[i].seq), ops.admissions[i].room, result);
  }
  result.num_grown = fits_grows;
  result.num_admitted = fits_admissions;
  stats_.steps.add(1);
  const auto spent = std::chrono::steady_clock::now() - begin;
  stats_.took(
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count()));
  return all;
}

// The first of `found` matched blocks that a group holds: behind a window the ones before are not.
uint32_t BlockPool::first_seen(uint32_t g, uint32_t found) const noexcept {
  const uint64_t window = groups_[g].options.window;
  const uint64_t tokens = uint64_t{found} * options_.block_size;
  if (window == 0 || tokens < window) return 0;
  return static_cast<uint32_t>((tokens - window + 1) / options_.block_size);
}

}  // namespace pyruntime::kv
