#include "pool/depot.hpp"

#include <new>

#include "base/os_memory.hpp"
#include "base/status.hpp"

namespace pyruntime::pool {

// The table is 2 MiB of address space of which only the touched pages exist.
std::atomic<Magazine*>* Depot::allocate_table() {
  const size_t bytes = kMaxSegments * sizeof(std::atomic<Magazine*>);
  void* memory = base::os::reserve(bytes, base::os::page_bytes());
  if (memory == nullptr || !base::os::commit(memory, bytes)) {
    fail(PYRT_ENOMEM, "no address space for the magazine table (%zu bytes)", bytes);
  }
  return static_cast<std::atomic<Magazine*>*>(memory);  // zero pages are null pointers
}

Depot::~Depot() {
  const uint32_t segments = num_segments_.load();
  for (uint32_t i = 0; i < segments; ++i)
    ::operator delete[](segments_[i].load(), std::align_val_t{64});
  base::os::unreserve(segments_, kMaxSegments * sizeof(std::atomic<Magazine*>));
}

Magazine* Depot::pop(Stack& stack) noexcept {
  const uint32_t index =
      stack.pop([this](uint32_t i) -> std::atomic<uint32_t>& { return at(i).next; });
  return index == 0 ? nullptr : &at(index);
}

bool Depot::reserve(uint64_t count) noexcept {
  while (num_magazines() < count) {
    if (!add_segment()) return false;
  }
  return true;
}

void Depot::put(Magazine* magazine, uint32_t capacity) noexcept {
  Stack& stack = magazine->count == 0 ? empty_ : (magazine->count >= capacity ? full_ : partial_);
  stack.push(magazine->index, [this](uint32_t i) -> std::atomic<uint32_t>& { return at(i).next; });
}

bool Depot::add_segment() noexcept {
  const uint32_t segment = num_segments_.load(std::memory_order_relaxed);
  if (segment == kMaxSegments) return false;
  void* memory =
      ::operator new[](kSegmentItems * sizeof(Magazine), std::align_val_t{64}, std::nothrow);
  if (memory == nullptr) return false;
  auto* magazines = static_cast<Magazine*>(memory);
  for (uint32_t i = 0; i < kSegmentItems; ++i) {
    Magazine* magazine = new (magazines + i) Magazine;
    magazine->index = (segment << kSegmentShift) | i;
  }
  segments_[segment].store(magazines, std::memory_order_release);
  num_segments_.store(segment + 1, std::memory_order_relaxed);
  // Index 0 means "none", so the very first magazine stays unused.
  for (uint32_t i = segment == 0 ? 1 : 0; i < kSegmentItems; ++i) put(magazines + i, 1);
  num_magazines_.fetch_add(segment == 0 ? kSegmentItems - 1 : kSegmentItems,
                           std::memory_order_relaxed);
  return true;
}

}  // namespace pyruntime::pool
