#include "pyruntime/pool.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "capi/error.hpp"
#include "capi/pool.hpp"

using namespace pyruntime;
using pool::Pool;

// A cache by the name that the ABI knows it by.
struct pyrt_pool_cache : pool::Cache {};

namespace pyruntime::capi {

pool::Options pool_options(const pyrt_pool_options& given) {
  // Fields beyond the caller's struct_size keep their defaults.
  pyrt_pool_options o;
  pyrt_pool_options_init(&o);
  if (given.struct_size < offsetof(pyrt_pool_options, max_capacity)) {
    fail(PYRT_EINVAL, "struct_size is %u; call pyrt_pool_options_init first", given.struct_size);
  }
  std::memcpy(&o, &given, std::min<size_t>(given.struct_size, sizeof o));
  const auto in_range = [](uint32_t value, uint32_t last, const char* name) {
    if (value > last) fail(PYRT_EINVAL, "%s is %u; it must be in 0..%u", name, value, last);
  };
  in_range(o.pages, PYRT_PAGES_4K, "pages");
  in_range(o.prefault, PYRT_PREFAULT_BACKGROUND, "prefault");
  in_range(o.check, PYRT_CHECK_GUARD, "check");
  in_range(o.fork, PYRT_FORK_EXCLUDE, "fork");
  if (o.node < -1 || o.node > 63) fail(PYRT_EINVAL, "node is %d; it must be in -1..63", o.node);
  pool::Options out;
  out.object_bytes = o.object_bytes;
  out.align = o.align;
  out.capacity = o.capacity;
  out.max_capacity = o.max_capacity;
  out.cache_objects = o.cache_objects;
  out.pages = static_cast<pool::Pages>(o.pages);
  out.prefault = static_cast<pool::Prefault>(o.prefault);
  out.check = static_cast<pool::Check>(o.check);
  out.fork = static_cast<pool::Fork>(o.fork);
  out.node = o.node;
  return out;
}

}  // namespace pyruntime::capi

namespace {

pyrt_status check_list(const Pool& pool, void* const* objects, size_t n) {
  if (objects == nullptr) return capi::set_error(PYRT_EINVAL, "objects must not be NULL");
  if (n > pool.max_capacity()) {
    return capi::set_error(PYRT_EINVAL, "n exceeds the objects the pool ever had out");
  }
  return PYRT_OK;
}

pyrt_status refuse(const Pool& pool, pyrt_status status, const void* object, bool lost = false) {
  if (lost) {
    return capi::set_error(status, "the fork caught this cache at work; make one of this process");
  }
  if (status == PYRT_ENOMEM) {
    return capi::set_error(status, "no memory for this thread's cache; the object is still yours");
  }
  char text[256];
  pool.describe_refusal(status, object, text, sizeof text);
  return capi::set_error(status, text);
}

// The object a refused list is about: the first foreign one, else the list as a whole.
const void* culprit(const Pool& pool, void* const* objects, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (!pool.owns(objects[i])) return objects[i];
  }
  return objects[0];
}

void exhausted(const Pool& pool, size_t n, bool lost = false) {
  if (lost) fail(PYRT_ESTATE, "the fork caught this cache at work; make one of this process");
  if (pool.forked_away()) fail(PYRT_ESTATE, "the pool is excluded from forked children");
  fail(PYRT_EFULL,
       "the pool of %llu objects cannot hand out %zu more; release some or raise max_capacity",
       static_cast<unsigned long long>(pool.max_capacity()), n);
}

constexpr size_t kChunk = 256;

}  // namespace

extern "C" {

void pyrt_pool_options_init(pyrt_pool_options* options) noexcept {
  if (options == nullptr) return;
  *options = {};
  options->struct_size = sizeof *options;
  options->node = -1;
}

pyrt_status pyrt_pool_create(const pyrt_pool_options* options, pyrt_pool** out) noexcept {
  return capi::guard([&] {
    capi::require(options, "options");
    capi::require(out, "out");
    *out = new pyrt_pool(capi::pool_options(*options));
  });
}

pyrt_status pyrt_pool_destroy(pyrt_pool* pool, int32_t force) noexcept {
  if (pool == nullptr) return PYRT_OK;
  return capi::guard([&] {
    if (const uint64_t handles = force ? 0 : pool->handles()) {
      fail(PYRT_ESTATE, "%llu caches of the pool are still there; destroy them first, or force it",
           static_cast<unsigned long long>(handles));
    }
    const uint64_t out = force ? 0 : pool->objects_out();
    if (out != 0) {
      fail(PYRT_ESTATE, "%llu objects are still out; release them or destroy with force",
           static_cast<unsigned long long>(out));
    }
    delete pool;
  });
}

void* pyrt_pool_get(pyrt_pool* pool) noexcept { return pool == nullptr ? nullptr : pool->get(); }

pyrt_status pyrt_pool_put(pyrt_pool* pool, void* object) noexcept {
  if (pool == nullptr) return capi::set_error(PYRT_EINVAL, "pool must not be NULL");
  const pyrt_status status = pool->put(object);
  return status == PYRT_OK ? status : refuse(*pool, status, object);
}

pyrt_status pyrt_pool_get_bulk(pyrt_pool* pool, void** out, size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (n == 0) return;
    capi::require_array(out, "out");
    if (!pool->get_bulk(out, n)) exhausted(*pool, n);
  });
}

pyrt_status pyrt_pool_put_bulk(pyrt_pool* pool, void* const* objects, size_t n) noexcept {
  if (pool == nullptr) return capi::set_error(PYRT_EINVAL, "pool must not be NULL");
  if (n == 0) return PYRT_OK;
  if (const pyrt_status status = check_list(*pool, objects, n); status != PYRT_OK) return status;
  const pyrt_status status = pool->put_bulk(objects, n);
  return status == PYRT_OK ? status : refuse(*pool, status, culprit(*pool, objects, n));
}

pyrt_status pyrt_pool_cache_create(pyrt_pool* pool, pyrt_pool_cache** out) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(out, "out");
    if (pool->forked_away()) fail(PYRT_ESTATE, "the pool is excluded from forked children");
    pool::Cache* const cache = pool->take_cache(true);
    if (cache == nullptr) fail(PYRT_ENOMEM, "no memory for a cache of the pool");
    *out = static_cast<pyrt_pool_cache*>(cache);
  });
}

pyrt_status pyrt_pool_cache_destroy(pyrt_pool_cache* cache) noexcept {
  if (cache == nullptr) return PYRT_OK;
  return capi::guard([&] { cache->pool->retire(cache); });
}

void* pyrt_pool_cache_get(pyrt_pool_cache* cache) noexcept {
  return cache == nullptr ? nullptr : cache->pool->get(*cache);
}

pyrt_status pyrt_pool_cache_put(pyrt_pool_cache* cache, void* object) noexcept {
  if (cache == nullptr) return capi::set_error(PYRT_EINVAL, "cache must not be NULL");
  const pyrt_status status = cache->pool->put(*cache, object);
  return status == PYRT_OK ? status : refuse(*cache->pool, status, object, cache->lost);
}

pyrt_status pyrt_pool_cache_get_bulk(pyrt_pool_cache* cache, void** out, size_t n) noexcept {
  return capi::guard([&] {
    capi::require(cache, "cache");
    if (n == 0) return;
    capi::require_array(out, "out");
    if (!cache->pool->get_bulk(*cache, out, n)) exhausted(*cache->pool, n, cache->lost);
  });
}

pyrt_status pyrt_pool_cache_put_bulk(pyrt_pool_cache* cache, void* const* objects,
                                     size_t n) noexcept {
  if (cache == nullptr) return capi::set_error(PYRT_EINVAL, "cache must not be NULL");
  if (n == 0) return PYRT_OK;
  const Pool& pool = *cache->pool;
  if (const pyrt_status status = check_list(pool, objects, n); status != PYRT_OK) return status;
  const pyrt_status status = cache->pool->put_bulk(*cache, objects, n);
  return status == PYRT_OK ? status : refuse(pool, status, culprit(pool, objects, n), cache->lost);
}

uint32_t pyrt_pool_cache_layout(void) noexcept { return kPoolCacheLayout; }

pyrt_status pyrt_pool_get_indices(pyrt_pool* pool, uint32_t* out, size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (n == 0) return;
    capi::require_array(out, "out");
    if (n > pool->max_capacity()) exhausted(*pool, n);
    if (pool->max_capacity() > UINT32_MAX) {
      fail(PYRT_EUNSUPPORTED, "indices are 32-bit and the pool may hold more than 2^32 objects");
    }
    void* chunk[kChunk];
    for (size_t done = 0; done < n;) {
      const size_t take = std::min(n - done, kChunk);
      if (!pool->get_bulk(chunk, take)) {
        pyrt_pool_put_indices(pool, out, done);
        exhausted(*pool, n);
      }
      for (size_t i = 0; i < take; ++i) {
        out[done + i] = static_cast<uint32_t>(pyrt_pool_index_of(pool, chunk[i]));
      }
      done += take;
    }
  });
}

pyrt_status pyrt_pool_put_indices(pyrt_pool* pool, const uint32_t* indices, size_t n) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (n == 0) return;
    capi::require_array(indices, "indices");
    if (n > pool->max_capacity()) {
      fail(PYRT_EINVAL, "n is %zu; the pool never had more than %llu objects out", n,
           static_cast<unsigned long long>(pool->max_capacity()));
    }
    std::vector<void*> objects(n);
    for (size_t i = 0; i < n; ++i) {
      objects[i] = pyrt_pool_ptr_of(pool, indices[i]);
      if (objects[i] == nullptr) {
        fail(PYRT_EINVAL, "indices[%zu] is %u; the pool has made no such object", i, indices[i]);
      }
    }
    const pyrt_status status = pool->put_bulk(objects.data(), n);
    if (status != PYRT_OK) {
      refuse(*pool, status, culprit(*pool, objects.data(), n));
      throw Error(status, pyrt_last_error());
    }
  });
}

void* pyrt_pool_ptr_of(const pyrt_pool* pool, uint64_t index) noexcept {
  if (pool == nullptr || index >= pool->max_capacity()) return nullptr;
  const size_t offset = pool->geometry().offset_of(index);
  return offset < pool->region().committed_bytes() ? pool->region().base() + offset : nullptr;
}

int64_t pyrt_pool_index_of(const pyrt_pool* pool, const void* object) noexcept {
  if (pool == nullptr || !pool->owns(object)) return -1;
  const auto offset = static_cast<size_t>(static_cast<const char*>(object) - pool->region().base());
  return static_cast<int64_t>(pool->geometry().index_of(offset));
}

pyrt_status pyrt_pool_get_layout(const pyrt_pool* pool, pyrt_pool_layout* layout) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(layout, "layout");
    const pool::Geometry& g = pool->geometry();
    const pyrt_pool_layout full{layout->struct_size,
                                g.per_unit,
                                pool->region().base(),
                                g.object_bytes,
                                g.stride,
                                g.unit_bytes,
                                pool->region().committed_bytes(),
                                pool->max_capacity()};
    std::memcpy(layout, &full, std::min<size_t>(layout->struct_size, sizeof full));
  });
}

pyrt_status pyrt_pool_prefault(pyrt_pool* pool) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (const int error = pool->prefault_now()) {
      fail(PYRT_ENOMEM, "prefault stopped: %s; what was faulted in stays", std::strerror(error));
    }
  });
}

pyrt_status pyrt_pool_trim(pyrt_pool* pool, uint64_t* released_bytes) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    const uint64_t released = pool->trim();
    if (released_bytes != nullptr) *released_bytes = released;
  });
}

pyrt_status pyrt_pool_flush_thread(pyrt_pool* pool) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->flush_this_thread();
  });
}

pyrt_status pyrt_pool_get_statistics(pyrt_pool* pool, pyrt_pool_statistics* statistics) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(statistics, "statistics");
    pyrt_pool_statistics full = pool->statistics();
    full.struct_size = statistics->struct_size;
    std::memcpy(statistics, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_pool_check(pyrt_pool* pool) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->check();
  });
}

}  // extern "C"
