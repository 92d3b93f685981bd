// Adding one filter to another.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "base/status.hpp"
#include "filter/copies.hpp"
#include "filter/evict.hpp"
#include "filter/filter.hpp"

namespace pyruntime::filter {
namespace {

// Stores every fingerprint of `from`, which is generation `generation` of its filter, in that
// generation of `to` or an older one. False if one finds no room.
template <int W, int B, class Tables>
bool add_table(const Table& from, size_t generation, Tables& to) {
  return for_each_copy<W, B>(from.view, [&](Position p) {
    size_t into = generation;
    while (insert<Shared, W, B>(to[into]->view, p) != kOk) {
      if (into == 0) return false;
      --into;
      p.segment /= 2;
    }
    to[into]->occupied.fetch_add(1, std::memory_order_relaxed);
    return true;
  });
}

}  // namespace

void Filter::merge(const Filter& other) {
  if (&other == this) fail(PYRT_EINVAL, "a filter cannot be merged into itself");
  // In one order, whoever merges what into what.
  Gate* const gates[] = {std::min(&gate_, &other.gate_), std::max(&gate_, &other.gate_)};
  const std::unique_lock first(*gates[0]);
  const std::unique_lock second(*gates[1]);
  require_writable();
  const uint64_t num_segments = tables_.front()->view.num_segments;
  if (bits_ != other.bits_ || slots_ != other.slots_ || buckets_ != other.buckets_ ||
      num_segments != other.tables_.front()->view.num_segments || seed_ != other.seed_) {
    fail(PYRT_EINVAL,
         "filters can be merged if they were made with the same capacity, bits, slots "
         "and seed; these differ");
  }
  Tables merged;
  for (size_t i = 0; i < std::max(tables_.size(), other.tables_.size()); ++i) {
    auto table = make_table(num_segments << i);
    if (i < tables_.size()) {
      const Table& mine = *tables_[i];
      std::memcpy(table->view.words, mine.view.words, mine.words_bytes);
      std::memcpy(table->view.counters, mine.view.counters, kNumCounters * sizeof(uint64_t));
      table->occupied.store(mine.occupied.load(std::memory_order_relaxed));
    }
    push_table(merged, std::move(table));
  }
  for (size_t i = 0; i < other.tables_.size(); ++i) {
    const Table& from = *other.tables_[i];
    const bool added =
        bits_ == 16
            ? (slots_ == 8 ? add_table<16, 8>(from, i, merged) : add_table<16, 16>(from, i, merged))
            : (slots_ == 8 ? add_table<8, 8>(from, i, merged) : add_table<8, 16>(from, i, merged));
    if (!added) {
      fail(PYRT_EFULL,
           "there is no room for what is in generation %zu of the other filter; to grow "
           "makes none, for where its keys go in a younger generation is not known",
           i);
    }
  }
  tables_.swap(merged);
}

}  // namespace pyruntime::filter
