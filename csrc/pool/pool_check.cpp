// Check modes: object states, overwrite patterns, guard pages, and the walk over all free objects.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "base/log.hpp"
#include "base/status.hpp"
#include "pool/pool.hpp"

namespace pyruntime::pool {
namespace {

enum State : uint8_t { fresh = 0, out = 1, released = 2 };

constexpr unsigned char kPattern = 0xDB;
constexpr size_t kPatternBytes = 16;

size_t pattern_bytes(const Geometry& g) { return std::min(kPatternBytes, g.object_bytes); }

}  // namespace

bool Pool::mark_out(void* object) noexcept {
  const auto offset = static_cast<size_t>(static_cast<char*>(object) - region_.base());
  const uint8_t before = states_[geometry().index_of(offset)].exchange(out);
  auto* bytes = static_cast<unsigned char*>(object);
  if (options_.check == Check::guard) {
    return base::os::commit(bytes, geometry().stride - base::os::page_bytes());
  }
  if (before != released) return true;
  const size_t n = pattern_bytes(geometry());
  const auto intact = [&](const unsigned char* at) {
    return std::all_of(at, at + n, [](unsigned char byte) { return byte == kPattern; });
  };
  if (!intact(bytes) || !intact(bytes + geometry().object_bytes - n)) {
    if (overwrites_.fetch_add(1, std::memory_order_relaxed) == 0) {
      base::log(base::LogLevel::error, "pool: object %p was written to after its release", object);
    }
  }
  return true;
}

bool Pool::mark_free(void* object) noexcept {
  const auto offset = static_cast<size_t>(static_cast<char*>(object) - region_.base());
  uint8_t expected = out;
  // The pattern is written first: once the state says released, another thread may own the object.
  if (states_[geometry().index_of(offset)].load() != out) return false;
  auto* bytes = static_cast<unsigned char*>(object);
  if (options_.check == Check::guard) {
    base::os::protect_none(bytes, geometry().stride - base::os::page_bytes());
  } else {
    const size_t n = pattern_bytes(geometry());
    std::memset(bytes, kPattern, n);
    std::memset(bytes + geometry().object_bytes - n, kPattern, n);
  }
  return states_[geometry().index_of(offset)].compare_exchange_strong(expected, released);
}

// All or none: a duplicate inside the list is found by the state the first one left.
bool Pool::mark_all_free(void* const* objects, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) {
    if (mark_free(objects[i])) continue;
    while (i-- > 0) mark_out(objects[i]);
    return false;
  }
  return true;
}

void Pool::describe_refusal(pyrt_status status, const void* object, char* text, size_t size) const {
  if (forked_away()) {
    std::snprintf(text, size, "the pool is excluded from forked children; make one of your own");
  } else if (status == PYRT_ESTATE) {
    std::snprintf(text, size, "object %p was released twice", object);
  } else {
    const auto offset = static_cast<size_t>(static_cast<const char*>(object) - region_.base());
    if (offset < region_.reserved_bytes()) {
      std::snprintf(text, size, "%p lies %zu bytes into the pool but is not the start of an object",
                    object, offset);
    } else {
      std::snprintf(text, size, "%p is no object of this pool", object);
    }
  }
}

void Pool::check() {
  std::scoped_lock lock(mutex_);
  char problem[160] = "";
  lock_caches();
  {
    const uint64_t carved = carved_.load();
    std::vector<bool> seen(carved);
    uint64_t free_objects = 0;
    const auto visit = [&](void* const* items, uint32_t n) {
      for (uint32_t i = 0; i < n; ++i) {
        const auto offset = static_cast<size_t>(static_cast<char*>(items[i]) - region_.base());
        if (!owns(items[i]) || geometry().index_of(offset) >= carved) {
          std::snprintf(problem, sizeof problem, "free object %p is none of the pool's", items[i]);
        } else if (seen[geometry().index_of(offset)]) {
          std::snprintf(problem, sizeof problem, "object %p is free twice", items[i]);
        } else {
          seen[geometry().index_of(offset)] = true;
        }
      }
      free_objects += n;
    };
    const std::vector<Magazine*> magazines = empty_depot();
    for (const Magazine* m : magazines) visit(m->items, m->count);
    refile(magazines);
    for (const auto& c : caches_) {
      visit(c->cur->items, c->len);
      if (c->alt_full) visit(c->alt->items, c->capacity);
    }
    const int64_t out_now = objects_out_locked();
    const auto accounted = static_cast<int64_t>(free_objects + parked_objects_) + out_now;
    if (problem[0] == 0 && lost_in_fork_ == 0 && accounted != static_cast<int64_t>(carved)) {
      std::snprintf(problem, sizeof problem,
                    "%" PRIu64 " free + %" PRIu64 " parked + %" PRId64 " out is not %" PRIu64,
                    free_objects, parked_objects_, out_now, carved);
    }
  }
  unlock_caches();
  if (problem[0] != 0) fail(PYRT_ECORRUPT, "pool: %s", problem);
}

// mutex_ held: every magazine with objects, taken out of the depot.
std::vector<Magazine*> Pool::empty_depot() {
  std::vector<Magazine*> magazines;
  magazines.reserve(depot_.num_magazines());
  while (Magazine* m = depot_.pop_full()) magazines.push_back(m);
  while (Magazine* m = depot_.pop_partial()) magazines.push_back(m);
  return magazines;
}

void Pool::refile(const std::vector<Magazine*>& magazines) noexcept {
  for (Magazine* m : magazines) depot_.put(m, magazine_items_);
}

// Sum over caches of what came in, less what went back or is still there.
int64_t Pool::objects_out_locked() const {
  int64_t total = 0;
  for (const auto& c : caches_) {
    total += static_cast<int64_t>(c->received.load(std::memory_order_relaxed) -
                                  c->delivered.load(std::memory_order_relaxed) - c->held());
  }
  return total;
}

uint64_t Pool::objects_out() {
  std::scoped_lock lock(mutex_);
  lock_caches();
  const int64_t total = objects_out_locked();
  unlock_caches();
  return static_cast<uint64_t>(std::max<int64_t>(total, 0));
}

pyrt_pool_statistics Pool::statistics() {
  pyrt_pool_statistics s{};
  {
    std::scoped_lock lock(mutex_);
    lock_caches();
    for (const auto& c : caches_) {
      s.num_caches += c->in_use;
      s.cached += c->held();
      s.gets += c->gets.load(std::memory_order_relaxed);
      s.refills += c->refills.load(std::memory_order_relaxed);
      s.spills += c->spills.load(std::memory_order_relaxed);
      s.failures += c->failures.load(std::memory_order_relaxed);
    }
    const int64_t out_now = objects_out_locked();
    unlock_caches();
    s.capacity = available_.load();
    s.in_use = static_cast<uint64_t>(std::max<int64_t>(out_now, 0));
    s.depot = s.capacity - std::min(s.capacity, s.in_use + s.cached);
    s.puts = s.gets - s.in_use;
    s.steals = steals_;
    s.grows = grows_;
    s.trims = trims_;
    s.lost_in_fork = lost_in_fork_;
    s.overwrites = overwrites_.load(std::memory_order_relaxed);
  }
  s.fallbacks = region_.num_fallbacks();
  s.committed_bytes = region_.committed_bytes();
  s.huge_bytes = region_.huge_bytes();
  return s;
}

}  // namespace pyruntime::pool
