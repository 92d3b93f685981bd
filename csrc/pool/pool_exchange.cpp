// The pool's slower paths: exchanges with the depot, exhaustion, and taking from other caches.
#include <sched.h>

#include <algorithm>
#include <new>

#include "base/os_memory.hpp"
#include "pool/pool.hpp"

namespace pyruntime::pool {

// The caller is inside `c`, whose cur is empty.
bool Pool::refill(Cache& c) noexcept {
  c.begin_exchange();
  bool filled = true;
  if (c.alt_full) {
    Magazine* const full = c.alt;
    c.alt = c.cur;
    c.use(full, c.capacity);
    c.alt_full = false;
  } else {
    Magazine* got = depot_.pop_full();
    if (got == nullptr) got = depot_.pop_partial();
    if (got != nullptr) {
      c.cur->count = 0;
      depot_.put(c.cur, c.capacity);
      c.use(got, got->count);
    } else {
      c.len = carve(c.cur->items, c.capacity);
      filled = c.len != 0;
    }
    Cache::add(c.received, c.len);
    Cache::add(c.refills, filled);
  }
  c.end_exchange();
  return filled;
}

// The caller is inside `c`, whose cur is full. False only while another thread has the depot's
// magazines in hand (see the counting argument in pool.hpp).
bool Pool::spill(Cache& c) noexcept {
  c.begin_exchange();
  bool emptied = true;
  if (!c.alt_full) {
    Magazine* const empty = c.alt;
    c.alt = c.cur;
    c.use(empty, 0);
    c.alt_full = true;
  } else {
    Magazine* room = depot_.pop_empty();
    if (room == nullptr) room = depot_.pop_partial();
    emptied = room != nullptr;
    if (emptied) {
      c.alt->count = c.capacity;
      depot_.put(c.alt, c.capacity);
      c.alt = c.cur;
      c.use(room, room->count);
      Cache::add(c.delivered, c.capacity);
      Cache::add(c.received, c.len);
      Cache::add(c.spills, 1);
    }
  }
  c.end_exchange();
  return emptied;
}

// Writes up to n fresh objects, last first, so that pops hand them out in address order.
uint32_t Pool::carve(void** items, uint32_t n) noexcept {
  uint64_t start = carved_.load(std::memory_order_relaxed);
  uint64_t end;
  do {
    end = std::min(start + n, available_.load(std::memory_order_acquire));
    if (end <= start) return 0;
  } while (!carved_.compare_exchange_weak(start, end, std::memory_order_relaxed));
  for (uint64_t i = start; i < end; ++i) {
    items[end - 1 - i] = region_.base() + geometry().offset_of(i);
  }
  return static_cast<uint32_t>(end - start);
}

void Pool::wait_for_lock_holder() noexcept { std::scoped_lock lock(mutex_); }

// One object although depot and fresh rest were empty; nullptr when all are in callers' hands.
void* Pool::get_when_exhausted(Cache& c) noexcept {
  std::scoped_lock lock(mutex_);  // no other thread can hold c now
  if (c.len == 0) {
    Magazine* found = forked_away() ? nullptr : find_magazine(c);
    if (found == nullptr) {
      Cache::add(c.failures, 1);
      return nullptr;
    }
    c.cur->count = 0;
    depot_.put(c.cur, c.capacity);
    c.use(found, found->count);
    Cache::add(c.received, c.len);
    Cache::add(c.refills, 1);
  }
  Cache::add(c.gets, 1);
  return c.cur->items[--c.len];
}

// mutex_ held.
Magazine* Pool::find_magazine(const Cache& thief) {
  for (;;) {
    if (Magazine* m = depot_.pop_full()) return m;
    if (Magazine* m = depot_.pop_partial()) return m;
    if (Magazine* m = depot_.pop_empty()) {
      m->count = carve(m->items, magazine_items_);
      if (m->count != 0) return m;
      depot_.put(m, magazine_items_);
    }
    if (!parked_units_.empty()) {
      revive_unit();
    } else if (!add_unit()) {
      return steal(thief);
    }
  }
}

bool Pool::add_unit() {
  const uint64_t objects = std::min(limit_, (region_.committed_units() + 1) * geometry().per_unit);
  if (!reserve_magazines(objects, caches_.size())) return false;
  if (!region_.commit_next()) return false;
  ++grows_;
  widen_bounds();
  available_.store(objects, std::memory_order_release);
  return true;
}

bool Pool::reserve_magazines(uint64_t objects, size_t caches) noexcept {
  return depot_.reserve(objects / magazine_items_ + 1 + 4 * caches);
}

Cache* Pool::take_cache(bool handle) {
  std::scoped_lock lock(mutex_);
  for (const auto& cache : caches_) {
    if (!cache->in_use) {
      cache->in_use = true;
      cache->handle = handle;
      return cache.get();
    }
  }
  if (!reserve_magazines(available_, caches_.size() + 1)) return nullptr;
  try {
    auto cache = std::make_unique<Cache>();
    caches_.reserve(caches_.size() + 1);
    cache->capacity = magazine_items_;
    cache->fenced = !base::os::register_fence_all();
    cache->locked = forked_away();
    cache->pool = this;
    cache->bounds = &bounds_;
    cache->checked = states_ != nullptr;
    Magazine* const cur = depot_.pop_empty();
    cache->alt = depot_.pop_empty();
    if (cur == nullptr || cache->alt == nullptr) {
      if (cur != nullptr) depot_.put(cur, magazine_items_);
      return nullptr;
    }
    cache->use(cur, 0);
    cache->in_use = true;
    cache->handle = handle;
    caches_.push_back(std::move(cache));
    return caches_.back().get();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// mutex_ held: stops the owner of `c` at its next operation and waits for the present one, which
// takes nanoseconds unless its thread is suspended in it.
void Pool::lock(Cache& c) noexcept {
  c.locked.store(1, std::memory_order_seq_cst);
  if (!c.fenced) base::os::fence_all();
  while (c.active.load(std::memory_order_seq_cst) != Cache::idle) sched_yield();
}

Magazine* Pool::steal(const Cache& thief) noexcept {
  for (const auto& victim : caches_) {
    if (victim.get() == &thief) continue;
    Magazine* room = depot_.pop_empty();
    if (room == nullptr) return nullptr;
    lock(*victim);
    Magazine* taken = nullptr;
    if (victim->alt_full) {
      taken = victim->alt;
      taken->count = victim->capacity;
      victim->alt = room;
      victim->alt_full = false;
    } else if (victim->len != 0) {
      taken = victim->cur;
      taken->count = victim->len;
      victim->use(room, 0);
    }
    if (taken != nullptr) Cache::add(victim->delivered, taken->count);
    victim->locked.store(0, std::memory_order_release);
    if (taken != nullptr) {
      ++steals_;
      return taken;
    }
    depot_.put(room, magazine_items_);
  }
  return nullptr;
}

// The cache is locked, or its thread is gone. Best effort: without empty magazines it stays as is,
// and stays reachable through steal().
void Pool::drain(Cache& c) noexcept {
  if (c.alt_full) {
    Magazine* room = depot_.pop_empty();
    if (room == nullptr) return;
    c.alt->count = c.capacity;
    depot_.put(c.alt, c.capacity);
    Cache::add(c.delivered, c.capacity);
    c.alt = room;
    c.alt_full = false;
  }
  if (c.len != 0) {
    Magazine* room = depot_.pop_empty();
    if (room == nullptr) return;
    c.cur->count = c.len;
    depot_.put(c.cur, c.capacity);
    Cache::add(c.delivered, c.len);
    c.use(room, 0);
  }
}

void Pool::retire(Cache* cache) {
  std::scoped_lock lock(mutex_);
  if (cache->lost) return;  // nobody's for ever
  drain(*cache);
  cache->in_use = false;
  cache->handle = false;
}

uint64_t Pool::handles() {
  std::scoped_lock lock(mutex_);
  return static_cast<uint64_t>(std::count_if(caches_.begin(), caches_.end(),
                                             [](const auto& cache) { return cache->handle; }));
}

void Pool::flush_this_thread() {
  Cache* const c = thread_cache();
  if (c == nullptr) return;
  std::scoped_lock lock(mutex_);
  drain(*c);
}

}  // namespace pyruntime::pool
