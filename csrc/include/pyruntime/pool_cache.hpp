// The memory pool for C++: single gets and puts inlined into the caller, and a
// std::pmr::memory_resource.
//
// A PoolCache is a cache of its own beside those of threads: for a fiber, a pinned worker, or a
// loop that cannot spare a call. One thread at a time may use it. The common case is a dozen
// instructions here, over a layout that the library publishes; everything else (an empty or full
// magazine, a cache that another thread is taking from, a pool with PYRT_CHECK_STATE or _GUARD)
// calls the library. The core uses the same declarations, so there is one fast path, not two.
//
// Threads. The owner announces itself by a plain store to `active` and then reads `locked`; whoever
// wants the cache stores `locked` and makes the kernel fence every running thread
// (csrc/pool/cache.hpp has the argument). `fenced` is the slow variant for systems without that
// system call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <new>
#include <stdexcept>
#include <utility>

#include "pyruntime/pool.h"

namespace pyruntime {

// Which addresses are objects: offset o from base with o < end, o mod unit < used_bytes and o mod
// unit a multiple of the stride. `end` grows with the pool.
struct PoolBounds {
  uintptr_t base = 0;
  std::atomic<uint64_t> end{0};
  uint64_t unit_mask = 0;
  uint64_t used_bytes = 0;  // of a unit, which is at most 2^31
  uint64_t reciprocal = 0;  // of the stride

  bool has(const void* object) const noexcept {
    const uint64_t offset = reinterpret_cast<uintptr_t>(object) - base;
    const uint64_t within = offset & unit_mask;
    return (offset < end.load(std::memory_order_acquire)) & (within < used_bytes) &
           (within * reciprocal < reciprocal);
  }
};

inline constexpr uint32_t kPoolCacheLayout = 1;

// The published part of a cache.
struct alignas(64) PoolCacheHead {
  enum Activity : uint32_t { idle = 0, simple = 1, exchanging = 2 };

  std::atomic<uint32_t> active{idle};
  std::atomic<uint32_t> locked{0};
  uint32_t len = 0;
  uint32_t capacity = 0;
  void** items = nullptr;  // of the magazine at work: len of them are objects
  const PoolBounds* bounds = nullptr;
  std::atomic<uint64_t> gets{0};  // written by the owner, read by anyone
  bool fenced = false;            // no membarrier here: the owner's stores are fences themselves
  bool checked = false;           // every call has more to do than is done here

  // False when another thread holds the cache: leave() was not needed, take the slow path.
  bool enter() noexcept {
    if (fenced) {
      active.store(simple, std::memory_order_seq_cst);
      if (locked.load(std::memory_order_seq_cst) == 0) return true;
    } else {
      active.store(simple, std::memory_order_relaxed);
      std::atomic_signal_fence(std::memory_order_seq_cst);
      if (locked.load(std::memory_order_acquire) == 0) return true;
    }
    leave();
    return false;
  }
  void leave() noexcept { active.store(idle, std::memory_order_release); }

  // nullptr: nothing was done, call the library.
  void* try_get() noexcept {
    void* object = nullptr;
    if (checked || !enter()) [[unlikely]]
      return nullptr;
    if (len != 0) [[likely]] {
      object = items[--len];
      gets.store(gets.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
    leave();
    return object;
  }

  // false: nothing was done, call the library.
  bool try_put(void* object) noexcept {
    if (checked || !bounds->has(object) || !enter()) [[unlikely]]
      return false;
    const bool room = len != capacity;
    if (room) [[likely]]
      items[len++] = object;
    leave();
    return room;
  }
};

class PoolCache {
 public:
  explicit PoolCache(pyrt_pool* pool) {
    if (pyrt_pool_cache_layout() != kPoolCacheLayout) {
      throw std::runtime_error("pool_cache.hpp and libpyruntime differ; compile with its headers");
    }
    if (pyrt_pool_cache_create(pool, &cache_) != PYRT_OK) {
      throw std::runtime_error(pyrt_last_error());
    }
    head_ = reinterpret_cast<PoolCacheHead*>(cache_);
  }
  PoolCache(PoolCache&& other) noexcept
      : cache_(std::exchange(other.cache_, nullptr)), head_(other.head_) {}
  PoolCache& operator=(PoolCache&&) = delete;
  ~PoolCache() { pyrt_pool_cache_destroy(cache_); }

  // nullptr when the pool is exhausted.
  void* get() noexcept {
    if (void* const object = head_->try_get()) [[likely]]
      return object;
    return pyrt_pool_cache_get(cache_);
  }
  pyrt_status put(void* object) noexcept {
    if (head_->try_put(object)) [[likely]]
      return PYRT_OK;
    return pyrt_pool_cache_put(cache_, object);
  }
  pyrt_status get_bulk(void** out, size_t n) noexcept {
    return pyrt_pool_cache_get_bulk(cache_, out, n);
  }
  pyrt_status put_bulk(void* const* objects, size_t n) noexcept {
    return pyrt_pool_cache_put_bulk(cache_, objects, n);
  }

 private:
  pyrt_pool_cache* cache_ = nullptr;
  PoolCacheHead* head_ = nullptr;
};

// Containers of nodes over a pool. What is larger than an object, or asks for more alignment than
// the pool has, comes from `upstream`. Any thread may use it; the pool must outlive it.
class PoolResource : public std::pmr::memory_resource {
 public:
  explicit PoolResource(pyrt_pool* pool,
                        std::pmr::memory_resource* upstream = std::pmr::get_default_resource())
      : pool_(pool), upstream_(upstream) {
    pyrt_pool_layout layout{};
    layout.struct_size = sizeof layout;
    if (pyrt_pool_get_layout(pool, &layout) != PYRT_OK) {
      throw std::invalid_argument(pyrt_last_error());
    }
    bytes_ = layout.object_bytes;
    align_ = layout.stride & (~layout.stride + 1);  // objects start on multiples of the stride
  }

 private:
  bool fits(size_t bytes, size_t align) const noexcept {
    return bytes <= bytes_ && align <= align_;
  }

  void* do_allocate(size_t bytes, size_t align) override {
    if (!fits(bytes, align)) return upstream_->allocate(bytes, align);
    if (void* const object = pyrt_pool_get(pool_)) return object;
    throw std::bad_alloc();
  }
  void do_deallocate(void* object, size_t bytes, size_t align) override {
    if (fits(bytes, align)) {
      pyrt_pool_put(pool_, object);
    } else {
      upstream_->deallocate(object, bytes, align);
    }
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    const auto* same = dynamic_cast<const PoolResource*>(&other);
    return same != nullptr && same->pool_ == pool_ && *same->upstream_ == *upstream_;
  }

  pyrt_pool* pool_;
  std::pmr::memory_resource* upstream_;
  size_t bytes_ = 0;
  size_t align_ = 0;
};

}  // namespace pyruntime
