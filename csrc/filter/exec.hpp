// The CPU's execution space of core.hpp.
#pragma once

#include "filter/core.hpp"

namespace pyruntime::filter {

#define PYRT_EXEC_FN static inline __attribute__((always_inline))

// Any number of threads at once. The builtins are what std::atomic_ref calls, without a function
// of its own that could be emitted once per SIMD level and merged.
struct Shared {
  static constexpr bool kConcurrent = true;
  PYRT_EXEC_FN uint64_t load(const uint64_t* word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
  }
  PYRT_EXEC_FN bool cas(uint64_t* word, uint64_t& expected, uint64_t desired) {
    return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
  }
  PYRT_EXEC_FN uint32_t epoch(const uint32_t* epoch) {
    return __atomic_load_n(epoch, __ATOMIC_ACQUIRE);
  }
  PYRT_EXEC_FN void bump(uint32_t* epoch) { __atomic_fetch_add(epoch, 1, __ATOMIC_ACQ_REL); }
  PYRT_EXEC_FN void settle() {
#if !defined(__SANITIZE_THREAD__)  // it knows no fences; there the loads are acquire loads already
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
#endif
  }
  PYRT_EXEC_FN void at(Step) {}
  PYRT_EXEC_FN void count(const View& view, Counter which, uint64_t n) {
    __atomic_fetch_add(view.counters + which, n, __ATOMIC_RELAXED);
  }
  PYRT_EXEC_FN void at_least(const View& view, Counter which, uint64_t n) {
    uint64_t seen = __atomic_load_n(view.counters + which, __ATOMIC_RELAXED);
    while (seen < n && !__atomic_compare_exchange_n(view.counters + which, &seen, n, true,
                                                    __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
};

}  // namespace pyruntime::filter
