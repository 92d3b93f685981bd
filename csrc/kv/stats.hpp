// Counters of a block pool: one thread writes, any may read.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>

namespace pyruntime::kv {

class Counter {
 public:
  // Not fetch_add: there is one writer, and an unlocked add is what a hot path can afford.
  void add(uint64_t n) noexcept {
    value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }
  uint64_t read() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

enum class Reason : uint32_t { capacity = 0, demoted = 1, cleared = 2, planned = 3 };
inline constexpr int kNumReasons = 4;
inline constexpr int kStepBuckets =
    20;  // bucket i: steps of less than 2^i us, the last: all others

struct Stats {
  Counter steps, failed_steps, admissions, asked_tokens, hit_tokens;
  Counter allocated, extended, run_extents;  // blocks; of them in place; extents begun
  Counter evicted[kNumReasons];
  Counter published, duplicates, unpublished;  // blocks settled: indexed, known already, not shared
  Counter copies, moves;
  Counter rotations;  // heads of the eviction list that had resident children
  Counter reservations_halved;
  Counter score_calls, score_faults;
  Counter step_us[kStepBuckets];
  Counter step_ns;

  void took(uint64_t ns) noexcept {
    step_ns.add(ns);
    const int bucket = std::bit_width(ns / 1000);
    step_us[bucket < kStepBuckets ? bucket : kStepBuckets - 1].add(1);
  }
};

}  // namespace pyruntime::kv
