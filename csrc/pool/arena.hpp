// Objects of many sizes on huge pages: slab classes over one reserved range, drawing on a budget.
//
// What it is. The allocator of what is large and comes and goes by caches: experts, KV blocks.
// Every object starts on a 4 KiB boundary (direct I/O, page registration). Not for small or hot
// objects: a call takes a mutex.
//
//   range   | slab (class A, 1 unit) | free | slab (class B, 3 units)      | free ...
//            obj obj obj obj          run    obj        obj                  run
//
// A unit is 2 MiB. A slab is a run of units cut into objects of one class; it has as many units as
// it takes to waste under 1/8 of it (kMaxSlabUnits at most beyond one object's own). Classes: those
// the owner named, which fit exactly, then four to each doubling (multiples of 4 KiB).
//
// Ownership. An object belongs to the caller from acquire to release; its slab keeps one bit for
// it, so a foreign, misaligned or double release is refused. A slab without objects stays committed
// for the next acquire of its class until trim, a new slab elsewhere, or the budget asks.
//
//   committed = objects out + free objects in slabs + tails;  budget reserved = committed
//
// New slab. Room in the budget -> own empty slabs are given back -> the budget asks other clients.
// When the budget asks us, empty slabs go first; then the owner's callback may release objects.
//
// Locks. `mutex_` guards everything; it is never held over a call into the budget's reserve or the
// owner's callback (giving back takes the budget's mutex inside ours: that order is the only one).
//
// Placement. Lowest slab with room, lowest run that fits: so that high slabs empty first.
//
// Failure. PYRT_EFULL (budget or range) and PYRT_ENOMEM leave everything as it was. Fork: the
// memory is copied on write, but calls in the child give PYRT_ESTATE. Complexity: O(log slabs).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "pool/budget.hpp"
#include "pyruntime/pool.h"

namespace pyruntime::pool {

class Arena {
 public:
  struct Options {
    uint64_t reserve_bytes = 0;
    std::vector<uint64_t> class_bytes;
    bool huge = true;
    int node = -1;
    Budget* budget = nullptr;  // may be null
    std::string name = "arena";
    int32_t priority = 0;
    pyrt_budget_reclaim reclaim = nullptr;
    void* user = nullptr;
  };

  explicit Arena(const Options& options);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* acquire(uint64_t bytes);
  void release(void* object);
  uint64_t size_of(const void* object);  // bytes of its class; throws when it is not out
  uint64_t trim();
  uint64_t objects_out();
  pyrt_arena_statistics statistics();
  void check();  // throws PYRT_ECORRUPT
  // First step of destruction: throws PYRT_ESTATE from inside the arena's own callback.
  void leave_budget();

 private:
  static constexpr uint64_t kUnit = kBudgetUnit;
  static constexpr uint64_t kPage = 4096;
  static constexpr uint64_t kMaxSlabUnits = 16;

  struct Slab {
    uint64_t first_unit = 0;
    uint64_t units = 0;
    uint64_t stride = 0;
    std::vector<uint32_t> free;  // a stack of slots
    std::vector<bool> out;
    bool empty() const { return free.size() == out.size(); }
  };
  struct ByAddress {
    bool operator()(const Slab* a, const Slab* b) const { return a->first_unit < b->first_unit; }
  };
  struct Place {
    Slab* slab;
    uint32_t slot;
  };

  uint64_t stride_for(uint64_t bytes) const;
  static uint64_t slab_units(uint64_t stride);
  char* address(uint64_t unit) const { return base_ + unit * kUnit; }
  void reserve(uint64_t bytes);
  bool add_slab(uint64_t stride, uint64_t units);
  bool take_run(uint64_t units, uint64_t* first);
  void return_run(uint64_t first, uint64_t units);
  void drop(Slab* slab);
  uint64_t trim_locked();
  void* pop(std::set<Slab*, ByAddress>& open, uint64_t stride);
  Place locate(const void* object) const;
  void require_this_process() const;
  static uint64_t on_reclaim(void* self, uint64_t bytes);

  const Options options_;
  const int64_t process_;
  uint64_t num_units_;
  char* base_ = nullptr;
  BudgetClient* client_ = nullptr;

  std::mutex mutex_;                                     // guards what follows
  std::map<uint64_t, std::unique_ptr<Slab>> slabs_;      // by first unit
  std::map<uint64_t, std::set<Slab*, ByAddress>> open_;  // by stride: slabs with room
  std::map<uint64_t, uint64_t> runs_;                    // free runs: first unit -> units
  uint64_t committed_units_ = 0;
  uint64_t in_use_bytes_ = 0;
  uint64_t objects_ = 0;
  uint64_t acquires_ = 0;
  uint64_t failures_ = 0;
  uint64_t trimmed_units_ = 0;
  uint64_t fallbacks_ = 0;
};

}  // namespace pyruntime::pool
