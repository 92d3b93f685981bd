#include "kv/batch.hpp"

#include <algorithm>
#include <chrono>

namespace pyruntime::kv {

Batch::Batch(BlockPool& pool, std::span<const SeqHandle> seqs, std::span<const Arrays> arrays,
             int32_t* lengths)
    : pool_(pool), arrays_(arrays.begin(), arrays.end()), lengths_(lengths) {
  if (arrays.size() != pool.num_groups_) {
    fail(PYRT_EINVAL, "arrays are given for %zu groups; the pool has %u", arrays.size(),
         pool.num_groups_);
  }
  for (uint32_t g = 0; g < pool.num_groups_; ++g) {
    const uint64_t slots = uint64_t{pool.groups_[g].options.num_blocks} * pool.options_.block_size;
    if (slots > INT32_MAX) {
      fail(PYRT_EUNSUPPORTED, "group %u has %llu slots; a batch numbers them with 31 bits", g,
           static_cast<unsigned long long>(slots));
    }
  }
  pool.next_epoch();
  for (const SeqHandle seq : seqs) {
    const uint32_t slot = pool.slot_of(seq);
    if (pool.seqs_[slot].mark == pool.epoch_) fail(PYRT_ESTATE, "a sequence is in the batch twice");
    if ((pool.hot_[slot].flags & BlockPool::kParked) != 0) {
      fail(PYRT_ESTATE, "a sequence is swapped out");
    }
    pool.seqs_[slot].mark = pool.epoch_;
    for (const Arrays& each : arrays_) {
      if (each.tables != nullptr && pool.seqs_[slot].blocks > each.stride) {
        fail(PYRT_EINVAL, "a sequence has %u blocks; the table has room for %zu",
             pool.seqs_[slot].blocks, each.stride);
      }
    }
    slots_.push_back(slot);
    generations_.push_back(static_cast<uint32_t>(seq >> 32));
  }
  for (uint32_t g = 0; g < pool.num_groups_; ++g) bases_[g].resize(rows());
  begin_of_.resize(pool.options_.block_size + 1);
  rows_of_.resize(rows());
  touched_.reserve(rows());
  keys_.resize(rows());
  unwanted_.resize(rows());
  id_ = ++pool.batches_;
  for (uint32_t row = 0; row < rows(); ++row) {
    // The first step looks at every row with care.
    pool.touch(slots_[row]);
    write_row(row);
    if (lengths_ != nullptr) lengths_[row] = static_cast<int32_t>(pool.hot_[slots_[row]].held);
  }
}

// Looks at every row: which need the general way, and when the others' blocks will be full.
void Batch::look() {
  const uint32_t size = pool_.options_.block_size;
  uint32_t bad = 0;
  touched_.clear();
  std::fill(begin_of_.begin(), begin_of_.end(), 0);
  const auto plain = [&](const BlockPool::Hot& h) {
    return (h.flags & ~BlockPool::kStopped) == BlockPool::kOpen && h.fill > 0;
  };
  for (uint32_t row = 0; row < rows(); ++row) {
    const BlockPool::Hot& h = pool_.hot_[slots_[row]];
    bad |= (h.generation ^ generations_[row]) | (~h.flags & BlockPool::kOpen) |
           (h.flags & BlockPool::kParked);
    if (plain(h)) {
      ++begin_of_[h.fill % size + 1];
    } else {
      touched_.push_back(row);
    }
  }
  if (bad != 0) fail(PYRT_ESTATE, "a sequence of the batch has ended or was swapped out");
  for (uint32_t residue = 0; residue < size; ++residue) {
    begin_of_[residue + 1] += begin_of_[residue];
  }
  for (uint32_t row = rows(); row-- > 0;) {  // fills each residue's part from its end
    const BlockPool::Hot& h = pool_.hot_[slots_[row]];
    if (plain(h)) rows_of_[--begin_of_[h.fill % size + 1]] = row;
  }
  // The parts' ends have become their beginnings: shift back.
  for (uint32_t residue = 0; residue < size; ++residue) begin_of_[residue] = begin_of_[residue + 1];
  begin_of_[size] = rows() - static_cast<uint32_t>(touched_.size());
  phase_ = 0;
  seen_ = true;
  seen_touches_ = pool_.touches_;
  pool_.active_batch_ = id_;
}

void Batch::set_bases(uint32_t row, uint32_t at) {
  for (uint32_t g = 0; g < pool_.num_groups_; ++g) {
    bases_[g][row] = pool_.row_of(pool_.groups_[g], slots_[row])[at] *
                     static_cast<int32_t>(pool_.options_.block_size);
  }
}

void Batch::write_row(uint32_t row) {
  const uint32_t slot = slots_[row];
  const uint32_t blocks = pool_.seqs_[slot].blocks;
  for (uint32_t g = 0; g < pool_.num_groups_; ++g) {
    const int32_t* entries = pool_.row_of(pool_.groups_[g], slot);
    if (arrays_[g].tables != nullptr) {
      int32_t* out = arrays_[g].tables + row * arrays_[g].stride;
      std::copy(entries, entries + blocks, out);
      std::fill(out + blocks, out + arrays_[g].stride, -1);
    }
  }
}

bool Batch::advance(const int32_t* tokens, StepResult& result, bool attempt) {
  using Hot = BlockPool::Hot;
  const auto begin = std::chrono::steady_clock::now();
  const uint32_t size = pool_.options_.block_size;
  const uint32_t groups = pool_.num_groups_;
  const uint32_t count = rows();
  result.num_grown = result.num_admitted = 0;
  result.never_fits = false;
  result.copies.clear();
  result.evicted.clear();

  // Plan.
  if (!seen_ || seen_touches_ != pool_.touches_ || pool_.active_batch_ != id_) look();
  const uint32_t due = (size - phase_ % size) % size;
  const uint32_t* full = rows_of_.data() + begin_of_[due];
  const uint32_t num_full = begin_of_[due + 1] - begin_of_[due];
  const auto num_touched = static_cast<uint32_t>(touched_.size());
  Hot* hot = pool_.hot_.data();
  int64_t need[kMaxGroups] = {};
  const auto require_column = [&](uint32_t row) {
    for (uint32_t g = 0; g < groups; ++g) {
      if (arrays_[g].tables == nullptr) continue;
      if (hot[slots_[row]].held / size >= arrays_[g].stride) {
        fail(PYRT_EINVAL, "row %u is full: its table has room for %zu blocks", row,
             arrays_[g].stride);
      }
    }
  };
  for (uint32_t i = 0; i < num_full; ++i) {
    const uint32_t slot = slots_[full[i]];
    const BlockPool::Sequence& s = pool_.seqs_[slot];
    __builtin_prefetch(&pool_.nodes_[s.tip]);
    __builtin_prefetch(&pool_.tails_[size_t{slot} * size]);
    for (uint32_t g = 0; g < groups; ++g) {
      BlockPool::Group& group = pool_.groups_[g];
      need[g] += hot[slot].held >= uint64_t{s.blocks} * size;
      __builtin_prefetch(&group.rooms[slot]);
      __builtin_prefetch(pool_.row_of(group, slot) + s.blocks);
      __builtin_prefetch(&group.nodes[s.tip]);
    }
    __builtin_prefetch(pool_.node_row_of(slot) + s.published);
    require_column(full[i]);
    result.never_fits |= s.blocks >= pool_.max_blocks_;
  }
  for (uint32_t i = 0; i < num_touched; ++i) {
    const uint32_t slot = slots_[touched_[i]];
    pool_.seqs_[slot].trimmed = false;
    pool_.plan_growth(slot, hot[slot].held + 1, hot[slot].held, need);
    require_column(touched_[i]);
    result.never_fits |= !pool_.fits(hot[slot].held + 1);
  }
  for (const auto& [g, block] : pool_.copied_) pool_.groups_[g].block_drops[block] = 0;
  pool_.copied_.clear();
  for (uint32_t g = 0; g < groups; ++g) {
    if (pool_.available(g) - need[g] >= int64_t{num_full} + num_touched) continue;
    hold_back(full, num_full, need);
    break;
  }
  bool enough = !result.never_fits;
  for (uint32_t g = 0; g < groups; ++g) {
    result.need[g] = static_cast<uint32_t>(need[g]);
    result.left[g] = pool_.available(g) - need[g];
    enough &= result.left[g] >= 0;
  }
  if (!enough) {
    if (!attempt) pool_.stats_.failed_steps.add(1);
    return false;
  }
  result.copies.reserve(size_t{num_touched} * groups);
  pool_.checkpoint();
  if (pool_.tiers_ != nullptr) {
    result.evicted.reserve((size_t{4} * pool_.options_.run_blocks + 1) * groups *
                           (size_t{num_full} + 2 * size_t{num_touched} + 1));
  }
  pool_.checkpoint();

  // Commit: nothing fails from here on.
  ++pool_.stamp_;
  for (uint32_t i = 0; i < num_full; ++i) {
    const uint32_t slot = slots_[full[i]];
    pool_.index_.keys(pool_.nodes_[pool_.seqs_[slot].tip].key, &pool_.tails_[size_t{slot} * size],
                      size, 1, &keys_[i]);
    pool_.index_.prefetch(keys_[i]);
  }
  for (uint32_t i = 0; i < num_full; ++i) open_block(full[i], keys_[i], result);
  if (num_touched > 0) {
    for (const uint32_t row : touched_) general(row, result);
    seen_ = false;  // they are plain now
  }
  ++phase_;
  seen_touches_ = pool_.touches_;
  // What was written a second time is held now: the plan looks for that only when it may matter.
  for (uint32_t g = 0; g < groups; ++g) result.left[g] = pool_.available(g);

  // Every row's token, counters, and slot in the first group.
  int32_t* tails = pool_.tails_.data();
  int32_t* lengths = lengths_ != nullptr ? lengths_ : unwanted_.data();
  int32_t* first_slots = arrays_[0].slots != nullptr ? arrays_[0].slots : unwanted_.data();
  const int32_t* first_bases = bases_[0].data();
  const uint32_t* slots = slots_.data();
  for (uint32_t row = 0; row < count; ++row) {
    const uint32_t slot = slots[row];
    Hot& h = hot[slot];
    const uint32_t fill = h.fill;
    const uint32_t held = h.held;
    tails[size_t{slot} * size + fill] = tokens[row];
    h.fill = static_cast<uint16_t>(fill + 1);
    h.valid = held;
    h.held = held + 1;
    lengths[row] = static_cast<int32_t>(held + 1);
    first_slots[row] = first_bases[row] + static_cast<int32_t>(fill);
  }
  for (uint32_t g = 1; g < groups; ++g) {
    if (arrays_[g].slots == nullptr) continue;
    const int32_t* bases = bases_[g].data();
    for (uint32_t row = 0; row < count; ++row) {
      arrays_[g].slots[row] = bases[row] + hot[slots_[row]].fill - 1;
    }
  }
  result.num_grown = count;
  pool_.stats_.steps.add(1);
  const auto spent = std::chrono::steady_clock::now() - begin;
  pool_.stats_.took(
      static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count()));
  return true;
}

// Content that a row has written a second time is held from when the row's block is settled, and
// thus no longer to be evicted: adds that to the need, where it may matter.
void Batch::hold_back(const uint32_t* full, uint32_t num_full, int64_t* need) {
  const uint32_t size = pool_.options_.block_size;
  if (!pool_.options_.sharing) return;
  std::vector<NodeId>& found = pool_.hits_;
  found.clear();
  found.reserve(size_t{num_full} + touched_.size());
  const auto look_up = [&](uint32_t row) {
    const uint32_t slot = slots_[row];
    const BlockPool::Hot& h = pool_.hot_[slot];
    if ((h.flags & BlockPool::kStopped) != 0 || h.fill != size) return;
    const int32_t* tail = &pool_.tails_[size_t{slot} * size];
    const NodeId tip = pool_.seqs_[slot].tip;
    uint64_t key;
    pool_.index_.keys(pool_.nodes_[tip].key, tail, size, 1, &key);
    const NodeId id = pool_.find_child(tip, key, tail);
    if (id == kNoNode || std::find(found.begin(), found.end(), id) != found.end()) return;
    found.push_back(id);
    for (uint32_t g = 0; g < pool_.num_groups_; ++g) {
      need[g] += (pool_.groups_[g].nodes[id].flags & kListed) != 0;
    }
  };
  for (uint32_t i = 0; i < num_full; ++i) look_up(full[i]);
  for (const uint32_t row : touched_) look_up(row);
}

// A row whose block is full: that one is settled, and the next token begins another.
void Batch::open_block(uint32_t row, uint64_t key, StepResult& result) {
  const uint32_t slot = slots_[row];
  const uint32_t size = pool_.options_.block_size;
  BlockPool::Hot& h = pool_.hot_[slot];
  BlockPool::Sequence& s = pool_.seqs_[slot];
  h.valid = h.held;
  if ((h.flags & BlockPool::kStopped) == 0 &&
      (!pool_.options_.sharing || !pool_.settle(slot, key, &pool_.tails_[size_t{slot} * size]))) {
    pool_.stop(slot);
  }
  const bool windows = pool_.num_groups_ > 1 || pool_.groups_[0].options.window != 0;
  if (windows) pool_.slide_windows(slot);
  if (h.held >= uint64_t{s.blocks} * size) {
    const uint32_t owed_before = BlockPool::owed(s);
    for (uint32_t g = 0; g < pool_.num_groups_; ++g)
      pool_.take(g, slot, 1, pool_.evictions(result));
    ++s.blocks;
    pool_.promised_ -= owed_before - BlockPool::owed(s);
  }
  h.fill = 0;
  const uint32_t at = h.held / size;
  set_bases(row, at);
  for (uint32_t g = 0; g < pool_.num_groups_; ++g) {
    if (arrays_[g].tables == nullptr) continue;
    int32_t* out = arrays_[g].tables + row * arrays_[g].stride;
    out[at] = pool_.row_of(pool_.groups_[g], slot)[at];
    if (!windows || pool_.groups_[g].options.window == 0) continue;
    const uint32_t released = pool_.groups_[g].rooms[slot].released;
    for (uint32_t i = released; i > 0 && out[i - 1] >= 0; --i) out[i - 1] = -1;
  }
}

// A row that was changed elsewhere, or that shares the block it writes: afterwards it is as any
// other before its token comes.
void Batch::general(uint32_t row, StepResult& result) {
  const uint32_t slot = slots_[row];
  const uint32_t size = pool_.options_.block_size;
  BlockPool::Hot& h = pool_.hot_[slot];
  h.valid = h.held;
  pool_.publish(slot, nullptr, 0);
  pool_.slide_windows(slot);
  const uint32_t held = h.held;
  pool_.grow(slot, held + 1, result);
  h.held = held;
  const bool known = pool_.seqs_[slot].published * size + h.fill == held;
  if ((h.flags & BlockPool::kStopped) == 0 && !known) pool_.stop(slot);
  if ((h.flags & BlockPool::kStopped) != 0) {
    h.fill = static_cast<uint16_t>(held % size);  // only counts
  }
  h.flags &= static_cast<uint16_t>(~BlockPool::kTouched);
  write_row(row);
  set_bases(row, held / size);
}

}  // namespace pyruntime::kv
