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
  full_.resize(rows());
  touched_.resize(rows());
  keys_.resize(rows());
  for (uint32_t row = 0; row < rows(); ++row) {
    // The first step looks at every row with care.
    pool.hot_[slots_[row]].flags |= BlockPool::kTouched;
    write_row(row);
    if (lengths_ != nullptr) lengths_[row] = static_cast<int32_t>(pool.hot_[slots_[row]].held);
  }
}

void Batch::write_row(uint32_t row) {
  const uint32_t slot = slots_[row];
  const uint32_t blocks = pool_.seqs_[slot].blocks;
  const uint32_t held = pool_.hot_[slot].held;
  for (uint32_t g = 0; g < pool_.num_groups_; ++g) {
    const int32_t* entries = pool_.row_of(pool_.groups_[g], slot);
    if (arrays_[g].tables != nullptr) {
      int32_t* out = arrays_[g].tables + row * arrays_[g].stride;
      std::copy(entries, entries + blocks, out);
      std::fill(out + blocks, out + arrays_[g].stride, -1);
    }
    if (held == 0) continue;
    bases_[g][row] = entries[(held - 1) / pool_.options_.block_size] *
                     static_cast<int32_t>(pool_.options_.block_size);
  }
}

bool Batch::advance(const int32_t* tokens, StepResult& result) {
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
  Hot* hot = pool_.hot_.data();
  uint32_t num_full = 0, num_touched = 0;
  uint32_t ended = 0;
  for (uint32_t row = 0; row < count; ++row) {
    const Hot& h = hot[slots_[row]];
    ended |= (h.generation ^ generations_[row]) | (~h.flags & BlockPool::kOpen) |
             (h.flags & BlockPool::kParked);
    const bool plain = (h.flags & ~BlockPool::kStopped) == BlockPool::kOpen;
    full_[num_full] = touched_[num_touched] = row;
    num_touched += !plain;
    num_full += plain && h.fill == size;
  }
  if (ended != 0) fail(PYRT_ESTATE, "a sequence of the batch has ended or was swapped out");
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
    const uint32_t slot = slots_[full_[i]];
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
    require_column(full_[i]);
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
  bool enough = !result.never_fits;
  for (uint32_t g = 0; g < groups; ++g) {
    result.need[g] = static_cast<uint32_t>(need[g]);
    result.left[g] = pool_.available(g) - need[g];
    enough &= result.left[g] >= 0;
  }
  if (!enough) {
    pool_.stats_.failed_steps.add(1);
    return false;
  }
  result.copies.reserve(size_t{num_touched} * groups);
  pool_.checkpoint();
  if (pool_.tiers_ != nullptr) {
    result.evicted.reserve(size_t{pool_.options_.run_blocks + 1} * (num_full + 2 * num_touched) *
                           groups);
  }
  pool_.checkpoint();

  // Commit: nothing fails from here on.
  ++pool_.stamp_;
  for (uint32_t i = 0; i < num_full; ++i) {
    const uint32_t slot = slots_[full_[i]];
    pool_.index_.keys(pool_.nodes_[pool_.seqs_[slot].tip].key, &pool_.tails_[size_t{slot} * size],
                      size, 1, &keys_[i]);
    pool_.index_.prefetch(keys_[i]);
  }
  uint32_t next_full = 0, next_touched = 0;
  int32_t* tails = pool_.tails_.data();
  for (uint32_t row = 0; row < count; ++row) {
    if (next_full < num_full && full_[next_full] == row) {
      open_block(row, tokens[row], keys_[next_full], result);
      ++next_full;
    } else if (next_touched < num_touched && touched_[next_touched] == row) {
      general(row, tokens[row], result);
      ++next_touched;
    } else {
      const uint32_t slot = slots_[row];
      Hot& h = hot[slot];
      tails[size_t{slot} * size + h.fill] = tokens[row];
      ++h.fill;
      h.valid = h.held;
      ++h.held;
    }
  }
  if (lengths_ != nullptr) {
    for (uint32_t row = 0; row < count; ++row) {
      lengths_[row] = static_cast<int32_t>(hot[slots_[row]].held);
    }
  }
  for (uint32_t g = 0; g < groups; ++g) {
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

// A row whose block is full: that one is settled, the token begins the next.
void Batch::open_block(uint32_t row, int32_t token, uint64_t key, StepResult& result) {
  const uint32_t slot = slots_[row];
  const uint32_t size = pool_.options_.block_size;
  BlockPool::Hot& h = pool_.hot_[slot];
  BlockPool::Sequence& s = pool_.seqs_[slot];
  int32_t* tail = &pool_.tails_[size_t{slot} * size];
  h.valid = h.held;
  if ((h.flags & BlockPool::kStopped) == 0 &&
      (!pool_.options_.sharing || !pool_.settle(slot, key, tail))) {
    pool_.stop(slot);
  }
  const bool windows = pool_.num_groups_ > 1 || pool_.groups_[0].options.window != 0;
  if (windows) pool_.slide_windows(slot);
  if (h.held >= uint64_t{s.blocks} * size) {
    const uint32_t owed_before = BlockPool::owed(s);
    for (uint32_t g = 0; g < pool_.num_groups_; ++g) pool_.take(g, slot, 1, &result.evicted);
    ++s.blocks;
    pool_.promised_ -= owed_before - BlockPool::owed(s);
  }
  const uint32_t at = h.held / size;
  for (uint32_t g = 0; g < pool_.num_groups_; ++g) {
    const int32_t entry = pool_.row_of(pool_.groups_[g], slot)[at];
    bases_[g][row] = entry * static_cast<int32_t>(size);
    if (arrays_[g].tables == nullptr) continue;
    int32_t* out = arrays_[g].tables + row * arrays_[g].stride;
    out[at] = entry;
    if (!windows || pool_.groups_[g].options.window == 0) continue;
    const uint32_t released = pool_.groups_[g].rooms[slot].released;
    for (uint32_t i = released; i > 0 && out[i - 1] >= 0; --i) out[i - 1] = -1;
  }
  tail[0] = token;
  h.fill = 1;
  ++h.held;
}

// A row that was changed elsewhere, or that shares the block it writes.
void Batch::general(uint32_t row, int32_t token, StepResult& result) {
  const uint32_t slot = slots_[row];
  const uint32_t size = pool_.options_.block_size;
  BlockPool::Hot& h = pool_.hot_[slot];
  h.valid = h.held;
  pool_.publish(slot, nullptr, 0);
  pool_.slide_windows(slot);
  const uint32_t before = h.held;
  pool_.grow(slot, before + 1, result);
  const bool known = pool_.seqs_[slot].published * size + h.fill == before;
  if ((h.flags & BlockPool::kStopped) == 0 && !known) pool_.stop(slot);
  if ((h.flags & BlockPool::kStopped) != 0) {
    h.fill = static_cast<uint16_t>(before % size + 1);  // only counts
  } else {
    pool_.tails_[size_t{slot} * size + h.fill] = token;
    ++h.fill;
  }
  h.flags &= static_cast<uint16_t>(~BlockPool::kTouched);
  write_row(row);
}

}  // namespace pyruntime::kv
