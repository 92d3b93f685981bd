// Experts of a store in limited memory, plane by plane, computed while others are still loading.
//
// Memory. Every plane of the store has its own place in one reserved range of addresses; a plane in
// memory has pages there, one that is not has none. So nothing fragments and nothing is moved:
// loading reads straight into the place, evicting gives its pages back.
//
//   range | layer 0: expert 0 [plane 0 | plane 1 | ...] expert 1 [...] | layer 1: ...
//            ^ page-aligned, padded as on disk
//
//   used = padded bytes of planes in memory or on their way <= capacity <= limit
//
// With a budget, capacity is what the cache has reserved of it, in units of 2 MiB; it grows while
// the budget has room that nobody else wants and shrinks when the budget asks (refinement planes
// go first, the coldest expert's first, then base planes), never below `minimum`.
//
// A call (ffn). Experts that are in memory are computed at once, missing planes are queued in the
// order of moe/plan.hpp and each expert is computed when its planes are in. An expert is admitted
// to the queue only when there is room for all it lacks: so what was admitted can always finish,
// and a layer larger than memory goes through in waves. Calls on one cache run one after another.
//
// Eviction. An expert loses its highest plane first, so planes nest. The victim is the expert whose
// highest plane has the lowest worth: uses, halving every kHalfLife calls per layer, per byte; with
// `worth_errors` times the error the plane takes away. Experts in use or loading are never victims,
// and a layer keeps its `floor` last base planes. Uses are kept as log2 of a sum that never decays
// (Cormode et al. 2009, "forward decay"), so that the order of experts needs no updates.
//
// Failure. A read that fails is tried again (kAttempts in all, backing off); a checksum that
// differs once more, another way, then the plane is quarantined. A token whose expert has no base
// plane fails, a token that only lacks a refinement gets the lower width and a mark (`strict`: it
// fails). Other tokens are not touched, and the cache goes on.
//
// Threads. `mutex_` guards the table; it is not held while reading or computing. The budget's mutex
// may be taken inside it, never the reverse: the cache never asks other clients for memory. Loader
// threads sleep on a condition variable. Fork: calls in a child give PYRT_ESTATE.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "moe/ffn.hpp"
#include "moe/plan.hpp"
#include "moe/reader.hpp"
#include "pool/budget.hpp"

namespace pyruntime::moe {

// As pyrt_moe_cache_statistics, which says what the fields are.
struct CacheStatistics {
  uint64_t limit_bytes, capacity_bytes, used_bytes;
  uint64_t resident[kMaxLevels];
  uint64_t hits[kMaxLevels], misses[kMaxLevels];
  uint64_t bytes_read, evictions, evicted_bytes;
  uint64_t prefetched_bytes, prefetch_useful_bytes, prefetch_wasted_bytes, prefetch_cancelled;
  uint64_t read_errors, checksum_errors, quarantined, failed_tokens, degraded_tokens;
  uint64_t calls, waits, wait_nanoseconds;
  uint32_t prefetching;
  char backend[12];
};

class Cache {
 public:
  struct Options {
    uint64_t limit_bytes = 0;
    pool::Budget* budget = nullptr;
    int32_t priority = 0;
    int32_t floor = 1;    // base planes a layer keeps
    int32_t threads = 4;  // loaders
    bool strict = true;
    bool worth_errors = false;
    Order order = Order::kHebf;
    int64_t scratch_bytes = int64_t{64} << 20;
  };

  static constexpr int kAttempts = 3;
  static constexpr double kHalfLife = 64;

  // Throws PYRT_EFULL when the limit, or the budget, has less than minimum_bytes().
  Cache(const Store& store, std::unique_ptr<Reader> reader, const Options& options);
  ~Cache();
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // What one expert at its widest takes; with a budget in whole units.
  uint64_t minimum_bytes() const noexcept { return minimum_; }

  // As moe::ffn on `layer`, loading what is missing. floors[n, top_k] (may be null) are levels that
  // must be there: above them a slot takes what is in memory, so results depend on the past.
  // status[n] (may be null): 0, 1 failed (the row is zero), 2 computed at a lower level.
  void ffn(int64_t layer, const Routing& routing, const uint8_t* floors, float* out,
           uint8_t* status);
  // Loads planes 0..level of experts that are likely to be wanted soon, when loaders are idle and
  // nothing more valuable has to go; a later call for the same layer cancels what has not begun.
  void prefetch(int64_t layer, const int32_t* experts, int64_t count, int level);
  // Bytes that computing these experts at `level` would have to read.
  uint64_t missing_bytes(int64_t layer, const int32_t* experts, int64_t count, int level);
  // Evicts what is not in use until `bytes` are used at most; returns the bytes still used.
  uint64_t shrink(uint64_t bytes);
  // Waits until nothing is loading.
  void drain();
  CacheStatistics statistics();
  void check();  // throws PYRT_ECORRUPT

 private:
  // Admitted: it has room, and is about to be queued.
  enum class State : uint8_t { kAbsent, kAdmitted, kQueued, kLoading, kResident, kBad };
  struct Plane {
    State state = State::kAbsent;
    bool prefetched = false;  // and not used since
    uint8_t error = 0;        // status of the last load, if it failed
    double uses = 0;          // log2 of the decayed count
    uint64_t offset = 0;      // in the range
    const Record* record = nullptr;
  };
  struct Expert {
    int32_t pins = 0;      // calls that will compute it, and its loads
    int32_t loads = 0;     // queued or on their way
    int32_t resident = 0;  // planes 0..resident-1 are in memory
    bool listed = false;   // in victims_, under `key`
    double key = 0;
  };
  struct Layer {
    LayerExperts experts{};
    std::vector<const uint8_t*> planes;  // [experts, levels]
    std::vector<float> units;
    int32_t base_planes = 0;
  };
  class Call;  // cache_call.cpp

  Plane& plane(uint32_t expert, int level) {
    return planes_[expert * levels_ + static_cast<uint32_t>(level)];
  }
  uint32_t index(int64_t slot, int64_t expert) const {
    return static_cast<uint32_t>(slot * experts_ + expert);
  }
  Layer& layer_of(uint32_t expert) { return layers_[expert / static_cast<uint32_t>(experts_)]; }
  int64_t slot_of(int64_t layer) const;  // throws
  int64_t check_wanted(int64_t layer, const int32_t* experts, int64_t count, int level) const;
  void require_this_process() const;
  void lay_out();
  void join_budget();
  void stop_loaders();

  double now() const { return static_cast<double>(calls_) / static_cast<double>(slots_); }
  double worth(uint32_t expert, int level);
  void touch(Plane& plane);
  void list(uint32_t expert);
  void pin(uint32_t expert);
  void unpin(uint32_t expert);
  void release(uint32_t expert, int level);
  void evict_top(uint32_t expert);
  bool grow();
  int64_t victim(double below, int32_t floor, int32_t least_resident);
  bool make_room(uint64_t bytes, double below);
  static uint64_t on_reclaim(void* self, uint64_t bytes);
  uint64_t reclaim(uint64_t bytes);

  bool admit(uint32_t expert, int to, double below);
  void discard_orphans(uint32_t expert);
  void cancel_ahead(int64_t slot);
  void judge_prefetch();
  int quarantined_below(uint32_t expert, int level);
  pyrt_status read(const Plane& plane, uint64_t bytes);
  void loader();
  void finish(uint32_t job, pyrt_status status);
  std::vector<uint8_t> resolve(int64_t slot, const Routing& routing, const uint8_t* floors,
                               std::vector<int32_t>& wished);

  const Store& store_;
  const std::unique_ptr<Reader> reader_;
  const Options options_;
  const int64_t process_;
  const uint32_t levels_;
  const uint32_t experts_;  // per layer
  int64_t slots_ = 0;       // sparse layers
  uint64_t plane_bytes_[kMaxLevels] = {};
  uint64_t minimum_ = 0;
  uint64_t range_bytes_ = 0;
  char* base_ = nullptr;
  std::vector<int32_t> slot_of_layer_;
  std::vector<Layer> layers_;
  pool::BudgetClient* client_ = nullptr;

  std::mutex call_mutex_;  // one call at a time, which uses scratch_; taken before mutex_
  const Scratch scratch_;
  std::mutex mutex_;  // guards what follows, and layers_[].planes
  std::condition_variable work_, done_;
  std::vector<Plane> planes_;
  std::vector<Expert> table_;
  std::set<std::pair<double, uint32_t>> victims_;
  std::deque<uint32_t> demand_, ahead_;  // planes to load: for a call, for later
  uint64_t capacity_ = 0, used_ = 0;
  uint64_t calls_ = 0;
  uint64_t prefetch_paused_until_ = 0;
  uint64_t window_useful_ = 0, window_wasted_ = 0;
  int32_t loading_ = 0;
  double load_seconds_per_byte_ = 1e-9;      // as they come out, for plans
  double compute_seconds_per_byte_ = 1e-10;  // of planes, per token
  bool stop_ = false;
  CacheStatistics counters_{};
  std::vector<std::thread> threads_;
};

}  // namespace pyruntime::moe
