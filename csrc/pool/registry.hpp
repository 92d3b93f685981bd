// Which cache belongs to which thread: one thread-local pointer, checked by pool serial.
//
// A thread's table maps a pool's slot to {serial, cache}; serials are never reused, so an entry of
// a destroyed pool cannot be mistaken for its successor's. The thread-local itself is trivially
// destructible; a pthread key's destructor (the janitor) gives the caches back, under the registry
// mutex, so that no pool is destroyed meanwhile. It also installs the fork handlers.
#pragma once

#include <cstdint>

namespace pyruntime::pool {

class Pool;
struct Cache;

// The calling thread's cache of `pool`, made on first use; nullptr when there is no memory.
Cache* thread_cache(Pool& pool, uint32_t slot, uint64_t serial) noexcept;

// The calling thread's cache if it has one already.
Cache* existing_thread_cache(uint32_t slot, uint64_t serial) noexcept;

uint64_t next_serial() noexcept;

// Registers a pool and returns its slot; unregister before it is torn down.
uint32_t register_pool(Pool& pool);
void unregister_pool(uint32_t slot) noexcept;

}  // namespace pyruntime::pool
