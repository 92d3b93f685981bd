// Rare work on a whole pool: giving memory back, faulting it in, and surviving a fork.
#include <cerrno>
#include <cstring>
#include <new>

#include "base/log.hpp"
#include "base/status.hpp"
#include "pool/pool.hpp"

namespace pyruntime::pool {

void Pool::lock_caches() noexcept {
  for (const auto& cache : caches_) lock(*cache);
}

void Pool::unlock_caches() noexcept {
  for (const auto& cache : caches_) cache->locked.store(0, std::memory_order_release);
}

// Returns the bytes given back. Only units whose every object is free go, whole.
uint64_t Pool::trim() {
  std::scoped_lock maintenance(maintenance_mutex_);
  stop_background_prefault();  // it would fault parked units in again
  std::scoped_lock lock(mutex_);
  lock_caches();
  for (const auto& cache : caches_) drain(*cache);
  unlock_caches();
  const std::vector<Magazine*> magazines = empty_depot();
  std::vector<uint32_t> free_in_unit(region_.committed_units());
  const auto unit_of = [&](const void* object) {
    return static_cast<size_t>(static_cast<const char*>(object) - region_.base()) >>
           geometry().unit_shift;
  };
  for (const Magazine* m : magazines) {
    for (uint32_t i = 0; i < m->count; ++i) ++free_in_unit[unit_of(m->items[i])];
  }
  const uint64_t carved_units = carved_.load() / geometry().per_unit;  // wholly carved ones
  std::vector<bool> goes(region_.committed_units());
  uint64_t released = 0;
  for (uint64_t unit = 0; unit < carved_units; ++unit) {
    if (unit_parked_[unit] || free_in_unit[unit] != geometry().per_unit) continue;
    goes[unit] = true;
    unit_parked_[unit] = true;
    parked_units_.push_back(unit);
    parked_objects_ += geometry().per_unit;
    ++trims_;
    released += geometry().unit_bytes;
    region_.park(unit);
  }
  for (Magazine* m : magazines) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < m->count; ++i) {
      if (!goes[unit_of(m->items[i])]) m->items[kept++] = m->items[i];
    }
    m->count = kept;
  }
  refile(magazines);
  return released;
}

// mutex_ held. Puts a parked unit's objects into the depot.
void Pool::revive_unit() {
  const uint64_t unit = parked_units_.back();
  parked_units_.pop_back();
  unit_parked_[unit] = false;
  parked_objects_ -= geometry().per_unit;
  region_.revive(unit);
  const uint64_t first = unit * geometry().per_unit;
  for (uint32_t done = 0; done < geometry().per_unit;) {
    Magazine* m = depot_.pop_empty();
    if (m == nullptr) m = depot_.pop_partial();
    const uint32_t room = magazine_items_ - m->count;
    const uint32_t take = std::min(room, geometry().per_unit - done);
    for (uint32_t i = 0; i < take; ++i, ++done) {
      m->items[m->count++] = region_.base() + geometry().offset_of(first + done);
    }
    depot_.put(m, magazine_items_);
  }
}

int Pool::prefault_now() {
  std::scoped_lock maintenance(maintenance_mutex_);
  const std::atomic<bool> never{false};
  return region_.prefault(never, [this](uint64_t unit) {
    std::scoped_lock lock(mutex_);
    return bool{unit_parked_[unit]};
  });
}

void Pool::start_background_prefault() {
  try {
    prefaulter_ = std::thread([this] {
      const int error = region_.prefault(stop_prefault_, [](uint64_t) { return false; });
      if (error != 0 && error != ECANCELED) {
        base::log(base::LogLevel::warning, "pool: background prefault stopped: %s",
                  std::strerror(error));
      }
    });
  } catch (const std::system_error& error) {
    base::log(base::LogLevel::warning, "pool: no thread for background prefault: %s", error.what());
  }
}

void Pool::stop_background_prefault() {
  stop_prefault_ = true;
  if (prefaulter_.joinable()) prefaulter_.join();
}

void Pool::lock_for_fork() { mutex_.lock(); }

void Pool::unlock_after_fork() { mutex_.unlock(); }

// Only the forking thread exists here; mutex_ is held by it since before the fork.
void Pool::restart_in_child(Cache* survivor) {
  new (&maintenance_mutex_) std::mutex;  // its holder may not exist here
  new (&prefaulter_) std::thread;        // nor does this thread
  if (options_.fork == Fork::exclude) {
    forked_away_ = true;
    for (const auto& cache : caches_) cache->locked = 1;
    return;
  }
  for (auto& cache : caches_) {
    if (cache.get() == survivor || !cache->in_use) continue;
    if (cache->active.load() == Cache::exchanging) {
      ++lost_in_fork_;  // its magazines may be in two places: nobody may touch them again
      cache->lost = true;
      cache->locked = 1;
      (void)cache.release();
      continue;
    }
    cache->active = Cache::idle;
    drain(*cache);
    cache->in_use = cache->handle;
  }
  std::erase(caches_, nullptr);
}

}  // namespace pyruntime::pool
