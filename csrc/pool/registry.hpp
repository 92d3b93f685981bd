// Which cache belongs to which thread: one thread-local pointer, checked by pool serial.
//
// A thread's table maps a pool's slot to {serial, cache}; serials are never reused, so an entry of
// a destroyed pool cannot be mistaken for its successor's. The thread-local itself is trivially
// destructible; a pthread key's destructor (the janitor) gives the caches back, under the registry
// mutex, so that no pool is destroyed meanwhile. It also installs the fork handlers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyruntime::pool {

class Pool;
struct Cache;

struct ThreadTable {
  struct Entry {
    uint64_t serial;
    Cache* cache;
  };
  uint32_t size;
  Entry entries[];
};

// Declared constinit so that no access goes through an initialiser. CMakeLists.txt gives the files
// that read it TLS descriptors where the machine has them: nearly as fast as static TLS, and still
// loadable when that is exhausted.
extern constinit thread_local ThreadTable* thread_table;

// The calling thread's cache if it has one already.
inline Cache* existing_thread_cache(uint32_t slot, uint64_t serial) noexcept {
  const ThreadTable* const table = thread_table;
  if (table == nullptr || slot >= table->size) return nullptr;
  const ThreadTable::Entry& entry = table->entries[slot];
  return entry.serial == serial ? entry.cache : nullptr;
}

// Makes the calling thread's cache of `pool`; nullptr when there is no memory.
Cache* make_thread_cache(Pool& pool, uint32_t slot, uint64_t serial) noexcept;

uint64_t next_serial() noexcept;

// Registers a pool and returns its slot; unregister before it is torn down.
uint32_t register_pool(Pool& pool);
void unregister_pool(uint32_t slot) noexcept;

}  // namespace pyruntime::pool
