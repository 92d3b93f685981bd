// The memory of one pool: a reserved address range, committed unit by unit, cut into objects.
//
//   base                        base + unit_bytes             base + num_units * unit_bytes
//   |-- unit 0 -----------------|-- unit 1 ------------------ ... |
//   |obj|obj|obj| ... |obj|tail |obj|obj| ...
//    <->stride                   a tail shorter than a stride stays unused
//
// A unit is a power of two of at least 2 MiB, the smallest that wastes under 1/16 in its tail, so
// no object straddles a unit, index <-> address is a shift, a mask and one multiplication, and
// memory comes and goes in whole huge pages.
//
// Stride: object bytes rounded up to the alignment. If the caller asked for no alignment and the
// stride is a multiple of 512, one cache line is added ("colour"): first words at a power-of-two
// stride share 2 of 64 L1 sets, and walking them is several times slower (bench/bench_pool.py).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>

#include "base/os_memory.hpp"

namespace pyruntime::pool {

enum class Pages : uint32_t { automatic = 0, thp = 1, hugetlb = 2, small = 3 };
enum class Prefault : uint32_t { none = 0, sync = 1, background = 2 };

struct Geometry {
  size_t object_bytes = 0;
  size_t stride = 0;
  size_t unit_bytes = 0;
  uint32_t unit_shift = 0;
  uint32_t per_unit = 0;    // objects in a unit
  uint64_t reciprocal = 0;  // ceil(2^64 / stride): exact quotients for 32-bit dividends
  uint64_t used_bytes = 0;  // of a unit: per_unit * stride

  // align 0: natural, and coloured. guard: a page of its own behind each object.
  static Geometry of(size_t object_bytes, size_t align, bool guard);

  uint64_t units_for(uint64_t objects) const { return (objects + per_unit - 1) / per_unit; }

  size_t offset_of(uint64_t index) const {
    return ((index / per_unit) << unit_shift) + (index % per_unit) * stride;
  }

  uint64_t index_of(size_t offset) const {
    const uint64_t within = offset & (unit_bytes - 1);
    const auto slot =
        static_cast<uint64_t>((static_cast<unsigned __int128>(within) * reciprocal) >> 64);
    return (offset >> unit_shift) * per_unit + slot;
  }
};

class Region {
 public:
  struct Options {
    Pages pages = Pages::automatic;
    int node = -1;
    bool exclude_from_fork = false;
    bool lazy = false;  // leave units inaccessible; the owner opens objects one by one
  };

  // Reserves address space for `max_units`; commits nothing.
  Region(const Geometry& geometry, uint64_t max_units, const Options& options);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  const Geometry& geometry() const { return geometry_; }
  char* base() const { return base_; }
  uint64_t max_units() const { return max_units_; }
  uint64_t committed_units() const { return committed_units_.load(std::memory_order_acquire); }
  size_t committed_bytes() const { return committed_units() << geometry_.unit_shift; }
  size_t reserved_bytes() const { return max_units_ << geometry_.unit_shift; }

  // Commits the next unit; false when the system refuses or all are committed. Serialised by
  // caller.
  bool commit_next();

  // Gives a unit's memory back, and takes it into use again.
  void park(uint64_t unit);
  void revive(uint64_t unit);

  // Faults in every committed 2 MiB piece that `skip(unit)` does not name, then asks for huge pages
  // where they are missing. Stops early when `stop` rises. Returns 0 or the errno that stopped it.
  template <class Skip>
  int prefault(const std::atomic<bool>& stop, Skip&& skip);

  size_t huge_bytes() const;
  uint64_t num_fallbacks() const { return fallbacks_.load(std::memory_order_relaxed); }

 private:
  char* unit_address(uint64_t unit) const { return base_ + (unit << geometry_.unit_shift); }
  int prefault_unit(uint64_t unit, const std::atomic<bool>& stop);
  void collapse_missing();

  Geometry geometry_;
  Options options_;
  uint64_t max_units_;
  char* base_ = nullptr;
  std::atomic<uint64_t> committed_units_{0};
  std::atomic<uint64_t> fallbacks_{0};
};

template <class Skip>
int Region::prefault(const std::atomic<bool>& stop, Skip&& skip) {
  const uint64_t units = committed_units();
  for (uint64_t unit = 0; unit < units; ++unit) {
    if (skip(unit)) continue;
    if (const int error = prefault_unit(unit, stop)) return error;
  }
  if (!stop.load(std::memory_order_relaxed)) collapse_missing();
  return 0;
}

}  // namespace pyruntime::pool
