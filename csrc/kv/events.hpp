// The event ring: what became shared content and what no longer is, without a gap.
//
// Every event has the next sequence number. The ring keeps the last `capacity`; who reads too late
// learns how many are gone and takes a snapshot. A block's export key (keys.hpp) is not needed
// until somebody reads, so it is computed then, or when the node goes, whichever comes first.
#pragma once

#include "kv/types.hpp"

namespace pyruntime::kv {

enum class EventType : uint32_t { stored = 1, removed = 2, cleared = 3 };

struct Event {
  EventType type;
  uint32_t reason;  // Reason, of `removed`
  NodeId node;      // and its generation: whose key is missing
  uint32_t generation;
  uint8_t key[16];
  bool has_key;
};

class EventRing {
 public:
  EventRing() = default;
  explicit EventRing(uint32_t capacity) : ring_(capacity) {}

  bool enabled() const noexcept { return !ring_.empty(); }
  uint64_t begin() const noexcept { return end_ > ring_.size() ? end_ - ring_.size() : 0; }
  uint64_t end() const noexcept { return end_; }
  Event& at(uint64_t sequence) noexcept { return ring_[sequence % ring_.size()]; }
  // The event whose number ends in these 32 bits, if the ring still has it.
  Event* find(uint32_t low) noexcept {
    const uint32_t back = static_cast<uint32_t>(end_) - low;
    return back > 0 && back <= ring_.size() && back <= end_ ? &at(end_ - back) : nullptr;
  }
  uint64_t push(const Event& event) noexcept {
    at(end_) = event;
    return end_++;
  }

 private:
  std::vector<Event> ring_;
  uint64_t end_ = 0;
};

}  // namespace pyruntime::kv
