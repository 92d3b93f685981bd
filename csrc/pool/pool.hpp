// A pool of fixed-size objects: magazines over a lock-free depot, on verified huge pages.
//
// What it is. Bonwick's magazine allocator (vmem/slab) with the depot as lock-free stacks of
// magazines (cf. TurboMem, arXiv 2603.18690, which stacks single objects):
//
//   thread --- Cache{cur, alt} --- one CAS pair per magazine --- Depot{full, partial, empty}
//                                                                 |
//   Region{unit 0, unit 1, ...} --- fresh objects, carved in order when the depot is empty
//
// Layout: region.hpp (memory), depot.hpp (magazines, head words), cache.hpp (thread caches). There
// is no header inside an object and nothing is written to a free one (except in the check modes).
//
// Ownership. An object belongs to the caller between get and put, else to the magazine that holds
// it or to the uncarved rest. A magazine belongs to a cache or to one of the depot's stacks. Caches
// are owned by threads through registry.hpp and come back to the pool when the thread ends.
//
// Concurrency. get/put touch their own cache only; depot exchanges are lock-free. Everything rare
// (growing, stealing at exhaustion, trim, registering a thread, fork) runs under `mutex_`. Lock
// order: registry mutex, then a pool's mutex_, then a cache's asymmetric lock, then the depot's
// segment mutex. A thread inside a cache never waits for mutex_.
//
// Exhaustion. depot empty -> fresh objects -> under mutex_: a parked or new unit -> a magazine out
// of any thread's cache. So get fails only when every object is in a caller's hands.
//
// Failure. A refused put or a get that finds nothing leaves everything as it was. A put needs a
// magazine with room; there always is one, by counting: the pool allocates, before it makes objects
// or a cache available, enough magazines for every object plus four per cache (two in it, two in
// transit). What can fail is the first call of a thread, before it changes anything.
//
// Fork. The child keeps the forking thread's cache; the caches of threads that do not exist there
// are drained into the depot, but for those caught in mid exchange (counted as lost_in_fork). With
// Fork::exclude the memory is not inherited and every call in the child gives PYRT_ESTATE.
//
// Complexity. O(1), amortised 1/capacity depot exchanges; exhaustion and trim O(threads + objects).
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "pool/cache.hpp"
#include "pool/depot.hpp"
#include "pool/owns.hpp"
#include "pool/region.hpp"
#include "pyruntime/pool.h"

namespace pyruntime::pool {

enum class Check : uint32_t { range = 0, state = 1, guard = 2 };
enum class Fork : uint32_t { cow = 0, exclude = 1 };

struct Options {
  size_t object_bytes = 0;
  size_t align = 0;
  uint64_t capacity = 0;
  uint64_t max_capacity = 0;
  uint32_t cache_objects = 0;
  Pages pages = Pages::automatic;
  Prefault prefault = Prefault::none;
  Check check = Check::range;
  Fork fork = Fork::cow;
  int node = -1;
};

class Pool {
 public:
  explicit Pool(const Options& options);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Through the calling thread's cache, which is made on first use.
  void* get() noexcept;
  pyrt_status put(void* object) noexcept;
  bool get_bulk(void** out, size_t n) noexcept {
    Cache* const c = thread_cache();
    return c != nullptr && get_bulk(*c, out, n);
  }
  pyrt_status put_bulk(void* const* objects, size_t n) noexcept {
    Cache* const c = thread_cache();
    return c == nullptr ? PYRT_ENOMEM : put_bulk(*c, objects, n);
  }

  // Through an explicit one, which one thread at a time may use.
  void* get(Cache& cache) noexcept;
  pyrt_status put(Cache& cache, void* object) noexcept;
  bool get_bulk(Cache& cache, void** out, size_t n) noexcept;
  pyrt_status put_bulk(Cache& cache, void* const* objects, size_t n) noexcept;
  uint64_t handles();  // explicit caches in use

  // Status and message of the last refused put, for the C ABI; built off the hot path.
  void describe_refusal(pyrt_status status, const void* object, char* text, size_t size) const;

  bool owns(const void* object) const noexcept { return bounds_.has(object); }
  const Geometry& geometry() const { return region_.geometry(); }
  const Region& region() const { return region_; }
  uint64_t max_capacity() const { return limit_; }
  // A cache that nobody may use in this forked child.
  bool unusable(const Cache& cache) const { return forked_away() || cache.lost; }
  bool forked_away() const { return forked_away_.load(std::memory_order_relaxed); }

  int prefault_now();
  uint64_t trim();
  void flush_this_thread();
  uint64_t objects_out();
  pyrt_pool_statistics statistics();
  void check();  // throws PYRT_ECORRUPT

  // Used by registry.cpp.
  uint64_t serial() const { return serial_; }
  Cache* take_cache(bool handle = false);
  void retire(Cache* cache);
  void lock_for_fork();
  void unlock_after_fork();
  void restart_in_child(Cache* survivor);

 private:
  Cache* thread_cache() noexcept;
  // After the fast path: with this thread's cache, or nullptr if it has none yet.
  __attribute__((noinline)) void* get_first(Cache* cache) noexcept;
  __attribute__((noinline)) pyrt_status put_first(Cache* cache, void* object) noexcept;
  void* get_slowly(Cache& cache) noexcept;
  void widen_bounds() noexcept;
  void give_back(Cache& cache, void* const* objects, size_t n) noexcept;
  bool refill(Cache& cache) noexcept;
  bool spill(Cache& cache) noexcept;
  void* get_when_exhausted(Cache& cache) noexcept;
  void wait_for_lock_holder() noexcept;
  Magazine* find_magazine(const Cache& thief);
  uint32_t carve(void** items, uint32_t n) noexcept;
  bool add_unit();
  bool reserve_magazines(uint64_t objects, size_t caches) noexcept;
  void revive_unit();
  Magazine* steal(const Cache& thief) noexcept;
  void lock(Cache& cache) noexcept;
  void drain(Cache& cache) noexcept;
  std::vector<Magazine*> empty_depot();
  void refile(const std::vector<Magazine*>& magazines) noexcept;
  void start_background_prefault();
  void stop_background_prefault();
  int64_t objects_out_locked() const;
  void lock_caches() noexcept;
  void unlock_caches() noexcept;

  // Check modes.
  bool mark_out(void* object) noexcept;
  bool mark_free(void* object) noexcept;
  bool mark_all_free(void* const* objects, size_t n) noexcept;

  const Options options_;
  Region region_;
  const uint64_t limit_;      // objects at most
  const size_t last_offset_;  // of the last of them
  PoolBounds bounds_;
  const OwnsAll owns_all_ = owns_all();
  std::atomic<uint64_t> available_;  // objects of committed units, at most limit_
  std::atomic<uint64_t> carved_{0};  // objects ever put into circulation: 0 .. carved_ - 1
  uint32_t magazine_items_;
  const uint64_t serial_;
  uint32_t slot_ = 0;  // in the registry
  Depot depot_;
  std::atomic<bool> forked_away_{false};

  std::mutex maintenance_mutex_;  // prefault and trim; taken before mutex_
  std::mutex mutex_;              // guards what follows
  std::vector<std::unique_ptr<Cache>> caches_;
  std::vector<bool> unit_parked_;
  std::vector<uint64_t> parked_units_;
  uint64_t parked_objects_ = 0;
  uint64_t steals_ = 0;
  uint64_t grows_ = 0;
  uint64_t trims_ = 0;
  uint64_t lost_in_fork_ = 0;
  std::atomic<uint64_t> overwrites_{0};

  std::atomic<uint8_t>* states_ = nullptr;  // check modes: 1 = out
  size_t states_bytes_ = 0;

  std::thread prefaulter_;
  std::atomic<bool> stop_prefault_{false};
};

}  // namespace pyruntime::pool
