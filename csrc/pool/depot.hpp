// Magazines and the lock-free stacks that hold them at rest.
//
// A magazine is an array of free objects' addresses; ownership of one passes whole, so its contents
// need no atomics. Magazines are named by 24-bit indices into an append-only segmented array that
// lives as long as the pool ("type-stable"), hence a stale reader never touches unmapped memory and
// neither hazard pointers nor epochs are needed.
//
// Head word: {tag:40 | index:24}. The tag grows by one on EVERY push and pop, so a head that went
// A -> B -> A differs from the one a suspended thread read; at 50 M operations a second 40 bits
// wrap after ~6 h of suspension at exactly that instruction.
//
// Memory orders. push: `next` relaxed store, CAS release. pop: head acquire, `next` relaxed atomic
// load (a stale reader races with the new owner's store, so a plain read would be undefined), CAS
// acquire. Heads are changed by read-modify-writes only, so release sequences stay unbroken and the
// acquire of a pop sees the push that published the magazine.
//
// `Atomic` is a parameter so that tests can drive every interleaving (tests/test_depot_model).
#pragma once

#include <atomic>
#include <cstdint>

namespace pyruntime::pool {

inline constexpr uint32_t kMagazineItems = 256;  // 2 KiB: 128 halves burst throughput, see bench

struct alignas(64) Magazine {
  std::atomic<uint32_t> next{0};
  uint32_t count = 0;
  uint32_t index = 0;  // own name, never 0
  void* items[kMagazineItems];
};

// A Treiber stack of indices 1 .. 2^24 - 1; 0 is "none". `Next` maps an index to its atomic link.
template <template <class> class Atomic, unsigned TagBits = 40>
class TaggedStack {
 public:
  static constexpr unsigned kIndexBits = 24;
  static constexpr uint64_t kIndexMask = (uint64_t{1} << kIndexBits) - 1;
  static constexpr uint64_t kTagMask = ((uint64_t{1} << TagBits) - 1) << kIndexBits;

  template <class Next>
  void push(uint32_t index, Next&& next) noexcept {
    uint64_t head = head_.load(std::memory_order_relaxed);
    uint64_t replacement;
    do {
      next(index).store(static_cast<uint32_t>(head & kIndexMask), std::memory_order_relaxed);
      replacement = advanced(head) | index;
    } while (!head_.compare_exchange_weak(head, replacement, std::memory_order_release,
                                          std::memory_order_relaxed));
  }

  template <class Next>
  uint32_t pop(Next&& next) noexcept {
    uint64_t head = head_.load(std::memory_order_acquire);
    for (;;) {
      const auto index = static_cast<uint32_t>(head & kIndexMask);
      if (index == 0) return 0;
      const uint64_t replacement = advanced(head) | next(index).load(std::memory_order_relaxed);
      if (head_.compare_exchange_weak(head, replacement, std::memory_order_acquire,
                                      std::memory_order_acquire)) {
        return index;
      }
    }
  }

 private:
  static constexpr uint64_t advanced(uint64_t head) noexcept {
    return (head + (kIndexMask + 1)) & kTagMask;
  }

  alignas(128) Atomic<uint64_t> head_{0};
};

template <class T>
using StdAtomic = std::atomic<T>;

// The magazines of one pool: full, partly filled and empty ones, and the store they live in.
class Depot {
 public:
  Depot() = default;
  ~Depot();
  Depot(const Depot&) = delete;
  Depot& operator=(const Depot&) = delete;

  Magazine* pop_full() noexcept { return pop(full_); }
  Magazine* pop_partial() noexcept { return pop(partial_); }
  Magazine* pop_empty() noexcept { return pop(empty_); }
  // Allocates until the pool owns `count` magazines; false without memory. Serialised by caller.
  bool reserve(uint64_t count) noexcept;
  // Files a magazine by its count against `capacity`, the items a full one has in this pool.
  void put(Magazine* magazine, uint32_t capacity) noexcept;

  uint32_t num_magazines() const noexcept { return num_magazines_.load(std::memory_order_relaxed); }

 private:
  using Stack = TaggedStack<StdAtomic>;
  static constexpr uint32_t kSegmentShift = 6;
  static constexpr uint32_t kSegmentItems = 1u << kSegmentShift;
  static constexpr uint32_t kMaxSegments = 1u << (Stack::kIndexBits - kSegmentShift);

  Magazine& at(uint32_t index) noexcept {
    Magazine* segment = segments_[index >> kSegmentShift].load(std::memory_order_acquire);
    return segment[index & (kSegmentItems - 1)];
  }
  Magazine* pop(Stack& stack) noexcept;
  bool add_segment() noexcept;

  Stack full_;
  Stack partial_;
  Stack empty_;
  std::atomic<uint32_t> num_magazines_{0};
  std::atomic<uint32_t> num_segments_{0};
  std::atomic<Magazine*>* segments_ = allocate_table();
  static std::atomic<Magazine*>* allocate_table();
};

}  // namespace pyruntime::pool
