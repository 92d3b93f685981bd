// Giving generations back.
//
// Where a fingerprint belongs in an older generation follows from where it is: segment / 2, the
// same pair of buckets. In a newer one it does not. So copies only go to older generations, which
// is the direction that keeps what filter.hpp promises of deletes: every key still has a copy of
// its own, where it looks for it. And so it is the newest generation that can go, when all of it
// fits into the others. One that does not fit is left alone: moved in part, it would cost the same
// memory and time, and its copies more false positives in a smaller table.
//
// The others are filled as they are planned and not fuller, so that the promised capacity still
// holds. The newest is only read until nothing is missing from the others; if something finds no
// room there (many copies of one key), what was added is taken out again, which leaves the same
// copies in the same pairs of buckets.
#include <algorithm>
#include <cinttypes>
#include <mutex>

#include "base/status.hpp"
#include "filter/copies.hpp"
#include "filter/evict.hpp"
#include "filter/filter.hpp"

namespace pyruntime::filter {
namespace {

bool has_room(const Table& table) {
  return table.occupied.load(std::memory_order_relaxed) < static_cast<int64_t>(table.planned);
}

// Adds what is in the newest table to the others; false, and they hold what they did, if some of
// it finds no room.
template <int W, int B, class Tables>
bool fold_newest(const Tables& tables) {
  const Table& newest = *tables.back();
  const size_t last = tables.size() - 1;
  std::vector<uint8_t> went_to;
  went_to.reserve(static_cast<size_t>(newest.occupied.load(std::memory_order_relaxed)));
  const auto in_older = [&](Position p, size_t generation) {
    p.segment >>= last - generation;
    return p;
  };
  const bool all = for_each_copy<W, B>(newest.view, [&](const Position& p) {
    for (size_t i = last; i-- > 0;) {
      Table& table = *tables[i];
      if (!has_room(table)) continue;
      if (insert<Shared, W, B>(table.view, in_older(p, i)) != kOk) continue;
      table.occupied.fetch_add(1, std::memory_order_relaxed);
      went_to.push_back(static_cast<uint8_t>(i));
      return true;
    }
    return false;
  });
  if (all) return true;
  auto went = went_to.begin();
  for_each_copy<W, B>(newest.view, [&](const Position& p) {
    if (went == went_to.end()) return false;
    Table& table = *tables[*went];
    remove<Shared, W, B>(table.view, in_older(p, *went++));
    table.occupied.fetch_sub(1, std::memory_order_relaxed);
    return true;
  });
  return false;
}

}  // namespace

uint32_t Filter::compact() {
  const std::unique_lock lock(gate_);
  require_writable();
  if (tables_.size() == 1) return 0;
  // Only their sum was exact.
  int64_t counted = 0, found = 0;
  std::vector<int64_t> occupied;
  for (const auto& table : tables_) {
    counted += table->occupied.load(std::memory_order_relaxed);
    occupied.push_back(static_cast<int64_t>(recount(*table)));
    found += occupied.back();
  }
  if (found != counted) {
    fail(PYRT_ECORRUPT, "%" PRId64 " slots are occupied; %" PRId64 " were counted", found, counted);
  }
  for (size_t i = 0; i < tables_.size(); ++i) {
    tables_[i]->occupied.store(occupied[i], std::memory_order_relaxed);
  }
  uint32_t dropped = 0;
  for (; tables_.size() > 1; ++dropped) {
    int64_t room = 0;
    for (size_t i = 0; i + 1 < tables_.size(); ++i) {
      const Table& table = *tables_[i];
      room += std::max<int64_t>(static_cast<int64_t>(table.planned) - table.occupied, 0);
    }
    if (tables_.back()->occupied > room) break;
    const bool folded =
        bits_ == 16 ? (slots_ == 8 ? fold_newest<16, 8>(tables_) : fold_newest<16, 16>(tables_))
                    : (slots_ == 8 ? fold_newest<8, 8>(tables_) : fold_newest<8, 16>(tables_));
    if (!folded) break;
    tables_.pop_back();
  }
  return dropped;
}

}  // namespace pyruntime::filter
