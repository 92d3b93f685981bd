// The per-thread half of the pool: two magazines and an asymmetric lock.
//
//   cur  items[0 .. len)      the magazine gets and puts work on (pyruntime/pool_cache.hpp)
//   alt  all or nothing       full if alt_full, else empty
//
// A get pops cur, a put pushes it; only after a whole magazine of one-way operations does a thread
// exchange one with the depot.
//
// Asymmetric lock. The owner announces itself by a plain store to `active` and then reads `locked`;
// nothing on its path is an atomic read-modify-write or a fence. Whoever wants the cache of another
// thread (exhaustion, trim, a check) stores `locked`, makes the kernel fence every running thread
// (membarrier), and waits until `active` is 0. Either the owner's store is visible to that wait, or
// the owner's later load sees `locked`: Dekker's argument with the fence on the rare side. Thus the
// last free object is reachable from any thread, even if it lies in the cache of one that sleeps.
// Without membarrier (`fenced`; also under ThreadSanitizer) the owner's store is sequentially
// consistent instead.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pool/depot.hpp"
#include "pyruntime/pool_cache.hpp"

namespace pyruntime::pool {

class Pool;

struct Cache : PoolCacheHead {
  Magazine* cur = nullptr;  // `items` are its
  Magazine* alt = nullptr;
  bool alt_full = false;
  bool in_use = false;  // guarded by the pool's mutex, as the next two
  bool handle = false;  // an explicit one, no thread's
  bool lost = false;    // a fork caught it in mid exchange
  Pool* pool = nullptr;

  // Single writer (the owner, or who holds the lock); read by anyone for statistics.
  std::atomic<uint64_t> received{0};   // objects that came from the depot
  std::atomic<uint64_t> delivered{0};  // objects that went to the depot
  std::atomic<uint64_t> refills{0};
  std::atomic<uint64_t> spills{0};
  std::atomic<uint64_t> failures{0};

  void use(Magazine* magazine, uint32_t objects) noexcept {
    cur = magazine;
    items = magazine->items;
    len = objects;
  }

  static void add(std::atomic<uint64_t>& counter, uint64_t n) noexcept {
    counter.store(counter.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }

  // Between these two a fork in another thread would see the magazines in mid exchange.
  void begin_exchange() noexcept {
    active.store(exchanging, std::memory_order_relaxed);
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  void end_exchange() noexcept {
    std::atomic_signal_fence(std::memory_order_seq_cst);
    active.store(simple, std::memory_order_relaxed);
  }

  uint64_t held() const noexcept { return len + (alt_full ? uint64_t{capacity} : 0); }
};

}  // namespace pyruntime::pool
