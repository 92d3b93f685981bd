#include "pool/pool.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "base/log.hpp"
#include "base/status.hpp"
#include "pool/registry.hpp"

namespace pyruntime::pool {
namespace {

constexpr uint64_t kMaxObjects = uint64_t{1} << 40;

uint64_t checked_limit(const Options& options) {
  const uint64_t limit = options.max_capacity == 0 ? options.capacity : options.max_capacity;
  if (options.capacity < 1 || options.capacity > kMaxObjects) {
    fail(PYRT_EINVAL, "capacity is %" PRIu64 "; a pool takes 1..2^40 objects", options.capacity);
  }
  if (limit < options.capacity || limit > kMaxObjects) {
    fail(PYRT_EINVAL, "max_capacity is %" PRIu64 "; it must be 0 or in %" PRIu64 "..2^40", limit,
         options.capacity);
  }
  if (options.check == Check::guard && options.prefault != Prefault::none) {
    fail(PYRT_EINVAL, "prefault must be none with check=guard: released objects are inaccessible");
  }
  return limit;
}

uint32_t magazine_items(const Options& options, uint64_t limit) {
  if (options.cache_objects != 0) {
    if (options.cache_objects < 2 || options.cache_objects > 2 * kMagazineItems) {
      fail(PYRT_EINVAL, "cache_objects is %u; it must be 0 or in 2..%u", options.cache_objects,
           2 * kMagazineItems);
    }
    return options.cache_objects / 2;
  }
  const uint64_t threads = std::max(1u, std::thread::hardware_concurrency());
  return static_cast<uint32_t>(std::clamp<uint64_t>(limit / (8 * threads), 1, kMagazineItems));
}

Region::Options region_options(const Options& options) {
  const bool guard = options.check == Check::guard;
  return {guard ? Pages::small : options.pages, options.node, options.fork == Fork::exclude, guard};
}

}  // namespace

Pool::Pool(const Options& options)
    : options_(options),
      region_(Geometry::of(options.object_bytes, options.align, options.check == Check::guard),
              Geometry::of(options.object_bytes, options.align, options.check == Check::guard)
                  .units_for(checked_limit(options)),
              region_options(options)),
      limit_(checked_limit(options)),
      last_offset_(geometry().offset_of(limit_ - 1)),
      available_(0),
      magazine_items_(magazine_items(options, limit_)),
      serial_(next_serial()) {
  unit_parked_.resize(region_.max_units());
  const uint64_t first_units = geometry().units_for(options.capacity);
  while (region_.committed_units() < first_units) {
    if (!region_.commit_next()) {
      fail(PYRT_ENOMEM, "cannot commit %zu bytes for the pool",
           first_units * geometry().unit_bytes);
    }
  }
  const Geometry& g = geometry();
  bounds_.base = reinterpret_cast<uintptr_t>(region_.base());
  bounds_.unit_mask = g.unit_bytes - 1;
  bounds_.used_bytes = g.used_bytes;
  bounds_.reciprocal = g.reciprocal;
  widen_bounds();
  available_ = std::min(limit_, first_units * geometry().per_unit);
  if (options.check != Check::range) {
    states_bytes_ = (limit_ + base::os::page_bytes() - 1) & ~(base::os::page_bytes() - 1);
    void* memory = base::os::reserve(states_bytes_, base::os::page_bytes());
    if (memory == nullptr || !base::os::commit(memory, states_bytes_)) {
      if (memory != nullptr) base::os::unreserve(memory, states_bytes_);
      fail(PYRT_ENOMEM, "cannot map %zu bytes of object states", states_bytes_);
    }
    states_ = static_cast<std::atomic<uint8_t>*>(memory);  // zero pages: State::fresh
  }
  if (options.prefault == Prefault::sync) prefault_now();
  slot_ = register_pool(*this);
  if (options.prefault == Prefault::background) start_background_prefault();
}

Pool::~Pool() {
  unregister_pool(slot_);
  stop_background_prefault();
  if (states_ != nullptr) base::os::unreserve(states_, states_bytes_);
}

void Pool::widen_bounds() noexcept {
  bounds_.end.store(std::min(last_offset_ + 1, region_.committed_bytes()),
                    std::memory_order_release);
}

Cache* Pool::thread_cache() noexcept {
  Cache* const cache = existing_thread_cache(slot_, serial_);
  return cache != nullptr ? cache : make_thread_cache(*this, slot_, serial_);
}

// These two are the whole of most programs' use: the thread's cache is looked up and used without a
// further call.
void* Pool::get() noexcept {
  Cache* const c = existing_thread_cache(slot_, serial_);
  if (c != nullptr) [[likely]] {
    if (void* const object = c->try_get()) [[likely]]
      return object;
  }
  return get_first(c);
}

pyrt_status Pool::put(void* object) noexcept {
  Cache* const c = existing_thread_cache(slot_, serial_);
  if (c != nullptr && c->try_put(object)) [[likely]]
    return PYRT_OK;
  return put_first(c, object);
}

void* Pool::get_first(Cache* c) noexcept {
  if (c == nullptr) c = make_thread_cache(*this, slot_, serial_);
  return c == nullptr ? nullptr : get_slowly(*c);
}

pyrt_status Pool::put_first(Cache* c, void* object) noexcept {
  if (c == nullptr) c = make_thread_cache(*this, slot_, serial_);
  return c == nullptr ? PYRT_ENOMEM : put_bulk(*c, &object, 1);
}

void* Pool::get(Cache& c) noexcept {
  if (void* const object = c.try_get()) [[likely]]
    return object;
  return get_slowly(c);
}

void* Pool::get_slowly(Cache& c) noexcept {
  void* object;
  for (;;) {
    if (!c.enter()) [[unlikely]] {
      if (unusable(c)) return nullptr;
      wait_for_lock_holder();
      continue;
    }
    if (c.len != 0 || refill(c)) [[likely]] {
      object = c.items[--c.len];
      Cache::add(c.gets, 1);
      c.leave();
      break;
    }
    c.leave();
    object = get_when_exhausted(c);
    if (object == nullptr) return nullptr;
    break;
  }
  if (states_ != nullptr) [[unlikely]] {
    if (!mark_out(object)) {
      put(c, object);
      return nullptr;
    }
  }
  return object;
}

pyrt_status Pool::put(Cache& c, void* object) noexcept {
  if (c.try_put(object)) [[likely]]
    return PYRT_OK;
  return put_bulk(c, &object, 1);
}

bool Pool::get_bulk(Cache& c, void** out, size_t n) noexcept {
  size_t done = 0;
  while (done < n) {
    if (!c.enter()) [[unlikely]] {
      if (unusable(c)) return false;
      wait_for_lock_holder();
      continue;
    }
    if (c.len != 0 || refill(c)) [[likely]] {
      const size_t take = std::min<size_t>(n - done, c.len);
      c.len -= static_cast<uint32_t>(take);
      std::memcpy(out + done, c.items + c.len, take * sizeof(void*));
      Cache::add(c.gets, take);
      done += take;
      c.leave();
      continue;
    }
    c.leave();
    void* const object = get_when_exhausted(c);
    if (object == nullptr) break;
    out[done++] = object;
  }
  size_t marked = 0;
  if (states_ != nullptr) {
    while (marked < done && mark_out(out[marked])) ++marked;
  }
  if (done == n && (states_ == nullptr || marked == n)) return true;
  if (states_ != nullptr) {
    for (size_t i = 0; i < marked; ++i) mark_free(out[i]);
  }
  give_back(c, out, done);
  return false;
}

pyrt_status Pool::put_bulk(Cache& c, void* const* objects, size_t n) noexcept {
  if (unusable(c)) [[unlikely]]
    return PYRT_ESTATE;
  if (!owns_all_(bounds_, objects, n)) [[unlikely]]
    return PYRT_EINVAL;
  if (states_ != nullptr) [[unlikely]] {
    if (!mark_all_free(objects, n)) return PYRT_ESTATE;
  }
  give_back(c, objects, n);
  return PYRT_OK;
}

void Pool::give_back(Cache& c, void* const* objects, size_t n) noexcept {
  for (size_t done = 0; done < n;) {
    if (!c.enter()) [[unlikely]] {
      wait_for_lock_holder();
      continue;
    }
    if (c.len == c.capacity && !spill(c)) [[unlikely]] {
      c.leave();
      wait_for_lock_holder();  // trim has the depot's magazines in hand
      continue;
    }
    const size_t take = std::min<size_t>(n - done, c.capacity - c.len);
    std::memcpy(c.items + c.len, objects + done, take * sizeof(void*));
    c.len += static_cast<uint32_t>(take);
    done += take;
    c.leave();
  }
}

}  // namespace pyruntime::pool
