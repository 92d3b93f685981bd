#include "pool/registry.hpp"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "pool/pool.hpp"

namespace pyruntime::pool {

constinit thread_local ThreadTable* thread_table = nullptr;

namespace {

struct Registry {
  std::mutex mutex;
  std::vector<Pool*> pools;  // by slot; nullptr is free
  pthread_key_t janitor;
};

void clean_up(void* pointer);
void before_fork();
void after_fork_in_parent();
void after_fork_in_child();

Registry& registry() {
  // Never destroyed: threads may end after static destructors ran.
  static Registry* const instance = [] {
    auto* created = new Registry;
    pthread_key_create(&created->janitor, clean_up);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    return created;
  }();
  return *instance;
}

void clean_up(void* pointer) {
  auto* ending = static_cast<ThreadTable*>(pointer);
  thread_table =
      nullptr;  // a later get of this thread starts a new table, and a new round of clean_up
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  for (uint32_t slot = 0; slot < ending->size && slot < r.pools.size(); ++slot) {
    Pool* pool = r.pools[slot];
    const ThreadTable::Entry& entry = ending->entries[slot];
    if (pool != nullptr && entry.cache != nullptr && pool->serial() == entry.serial) {
      pool->retire(entry.cache);
    }
  }
  std::free(ending);
}

bool grow_table(uint32_t slot) noexcept {
  const uint32_t old_size = thread_table == nullptr ? 0 : thread_table->size;
  const uint32_t size = std::max(slot + 1, std::max(8u, 2 * old_size));
  auto* grown = static_cast<ThreadTable*>(
      std::calloc(1, sizeof(ThreadTable) + size * sizeof(ThreadTable::Entry)));
  if (grown == nullptr) return false;
  grown->size = size;
  for (uint32_t i = 0; i < old_size; ++i) grown->entries[i] = thread_table->entries[i];
  if (pthread_setspecific(registry().janitor, grown) != 0) {
    std::free(grown);
    return false;
  }
  std::free(thread_table);
  thread_table = grown;
  return true;
}

void before_fork() {
  Registry& r = registry();
  r.mutex.lock();
  for (Pool* pool : r.pools) {
    if (pool != nullptr) pool->lock_for_fork();
  }
}

void after_fork_in_parent() {
  Registry& r = registry();
  for (Pool* pool : r.pools) {
    if (pool != nullptr) pool->unlock_after_fork();
  }
  r.mutex.unlock();
}

void after_fork_in_child() {
  Registry& r = registry();
  for (uint32_t slot = 0; slot < r.pools.size(); ++slot) {
    Pool* pool = r.pools[slot];
    if (pool == nullptr) continue;
    pool->restart_in_child(existing_thread_cache(slot, pool->serial()));
    pool->unlock_after_fork();
  }
  r.mutex.unlock();
}

}  // namespace

Cache* make_thread_cache(Pool& pool, uint32_t slot, uint64_t serial) noexcept {
  if (thread_table == nullptr || slot >= thread_table->size) {
    if (!grow_table(slot)) return nullptr;
  }
  Cache* cache = pool.take_cache();
  if (cache != nullptr) thread_table->entries[slot] = {serial, cache};
  return cache;
}

uint64_t next_serial() noexcept {
  static std::atomic<uint64_t> serial{1};
  return serial.fetch_add(1, std::memory_order_relaxed);
}

uint32_t register_pool(Pool& pool) {
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  for (uint32_t slot = 0; slot < r.pools.size(); ++slot) {
    if (r.pools[slot] == nullptr) {
      r.pools[slot] = &pool;
      return slot;
    }
  }
  r.pools.push_back(&pool);
  return static_cast<uint32_t>(r.pools.size() - 1);
}

void unregister_pool(uint32_t slot) noexcept {
  Registry& r = registry();
  std::scoped_lock lock(r.mutex);
  r.pools[slot] = nullptr;
}

}  // namespace pyruntime::pool
