#include "filter/partition.hpp"

#include <new>

#include "base/os_memory.hpp"

namespace pyruntime::filter {

SortPlan plan_sort(const SortLimits& limits, uint64_t table_bytes, uint64_t num_segments,
                   uint64_t n, int threads) noexcept {
  constexpr uint64_t kLine = 64, kStep = 64;
  if (table_bytes <= limits.table_bytes || n == 0) return {};
  // Pieces of one size, as many for each thread.
  const uint64_t most = limits.max_chunk < Sorted::kMaxChunk ? limits.max_chunk : Sorted::kMaxChunk;
  const uint64_t at_once = most * static_cast<uint64_t>(threads);
  const uint64_t pieces = (n + at_once - 1) / at_once * static_cast<uint64_t>(threads);
  SortPlan plan{};
  plan.chunk = ((n + pieces - 1) / pieces + kStep - 1) / kStep * kStep;
  if (plan.chunk < table_bytes / kLine) return {};
  const uint64_t segment_bytes = table_bytes / num_segments;
  while (plan.shift < Sorted::kMaxShift &&
         segment_bytes << (plan.shift + 1) <= limits.group_bytes &&
         (num_segments - 1) >> plan.shift > 0) {
    ++plan.shift;
  }
  plan.groups = static_cast<uint32_t>(((num_segments - 1) >> plan.shift) + 1);
  return plan;
}

std::unique_ptr<Sorted> Sorted::make(const SortPlan& plan) noexcept {
  std::unique_ptr<Sorted> made(new (std::nothrow) Sorted);
  if (made == nullptr) return nullptr;
  const size_t groups = plan.groups;
  const size_t blocks = groups + plan.chunk / kBlockEntries;
  size_t bytes = 0;
  const auto room = [&](size_t n, size_t size) {
    const size_t at = bytes;
    bytes = (bytes + n * size + 63) / 64 * 64;
    return at;
  };
  const size_t entries = room(blocks, kBlockEntries * sizeof(uint64_t));
  const size_t ends = room(groups, sizeof(uint64_t*));
  const size_t last = room(groups, sizeof(uint64_t*));
  const size_t full = room(groups, sizeof(uint32_t));
  const size_t next = room(blocks, sizeof(uint32_t));
  const size_t marks = room(plan.chunk, 1);
  constexpr size_t kPage = base::os::kHugePageBytes;
  bytes = (bytes + kPage - 1) / kPage * kPage;
  made->base_ = base::os::reserve(bytes, kPage);
  made->bytes_ = bytes;
  if (made->base_ == nullptr || !base::os::commit(made->base_, bytes)) return nullptr;
  base::os::advise_huge(made->base_, bytes, true);
  auto* const at = static_cast<char*>(made->base_);
  made->ends_ = reinterpret_cast<uint64_t**>(at + ends);
  made->last_ = reinterpret_cast<uint64_t**>(at + last);
  made->full_ = reinterpret_cast<uint32_t*>(at + full);
  made->next_ = reinterpret_cast<uint32_t*>(at + next);
  made->marks_ = reinterpret_cast<uint8_t*>(at + marks);
  made->entries_ = reinterpret_cast<uint64_t*>(at + entries);
  made->groups_ = plan.groups;
  made->shift_ = plan.shift;
  return made;
}

Sorted::~Sorted() {
  if (base_ != nullptr) base::os::unreserve(base_, bytes_);
}

void Sorted::clear() noexcept {
  for (uint32_t group = 0; group < groups_; ++group) {
    ends_[group] = last_[group] = entries_ + group * size_t{kBlockEntries};
    full_[group] = 0;
  }
  used_ = groups_;
}

void Sorted::extend(uint32_t group) noexcept {
  const auto block = static_cast<size_t>(last_[group] - entries_) / kBlockEntries;
  next_[block] = used_;
  last_[group] = ends_[group] = entries_ + used_++ * size_t{kBlockEntries};
  ++full_[group];
}

}  // namespace pyruntime::filter
