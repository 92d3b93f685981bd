#include "pyruntime/filter.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <memory>

#include "capi/error.hpp"
#include "filter/filter.hpp"

using pyruntime::fail;
using pyruntime::capi::guard;
using pyruntime::capi::require;
using pyruntime::capi::require_array;
namespace filter = pyruntime::filter;

static_assert(PYRT_FILTER_OK == int{filter::kOk} && PYRT_FILTER_EXISTS == int{filter::kExists} &&
              PYRT_FILTER_FULL == int{filter::kFull} &&
              PYRT_FILTER_DUP_LIMIT == int{filter::kDupLimit});

namespace {

filter::Filter* of(pyrt_filter* handle) { return reinterpret_cast<filter::Filter*>(handle); }
const filter::Filter* of(const pyrt_filter* handle) {
  return reinterpret_cast<const filter::Filter*>(handle);
}
pyrt_filter* handle_of(filter::Filter* f) { return reinterpret_cast<pyrt_filter*>(f); }

// True if there is nothing to do.
bool empty(const void* handle, const uint64_t* keys, uint64_t n) {
  require(handle, "filter");
  if (n > uint64_t{1} << 47) {
    fail(PYRT_EINVAL, "n is %" PRIu64 "; no address space holds that many keys", n);
  }
  if (n > 0) require_array(keys, "keys");
  return n == 0;
}

}  // namespace

extern "C" {

pyrt_status pyrt_filter_create(const pyrt_filter_options* options, pyrt_filter** out) noexcept {
  return guard([&] {
    require(options, "options");
    require(out, "out");
    if (options->struct_size < sizeof *options) {
      fail(PYRT_EINVAL, "options.struct_size is %u; it must be at least %zu", options->struct_size,
           sizeof *options);
    }
    *out = handle_of(
        new filter::Filter({options->capacity, options->bits, options->slots, options->seed}));
  });
}

void pyrt_filter_destroy(pyrt_filter* handle) noexcept { delete of(handle); }

pyrt_status pyrt_filter_insert(pyrt_filter* handle, const uint64_t* keys, uint64_t n,
                               int32_t unique, uint8_t* status, uint64_t* stored) noexcept {
  return guard([&] {
    const uint64_t done =
        empty(handle, keys, n) ? 0 : of(handle)->insert(keys, n, status, unique != 0);
    if (stored != nullptr) *stored = done;
  });
}

pyrt_status pyrt_filter_contains(const pyrt_filter* handle, const uint64_t* keys, uint64_t n,
                                 uint8_t* out, uint64_t* present) noexcept {
  return guard([&] {
    uint64_t found = 0;
    if (!empty(handle, keys, n)) {
      require(out, "out");
      found = of(handle)->contains(keys, n, out);
    }
    if (present != nullptr) *present = found;
  });
}

pyrt_status pyrt_filter_contains_bits(const pyrt_filter* handle, const uint64_t* keys, uint64_t n,
                                      uint8_t* out, uint64_t* present) noexcept {
  return guard([&] {
    uint64_t found = 0;
    if (!empty(handle, keys, n)) {
      require(out, "out");
      found = of(handle)->contains_bits(keys, n, out);
    }
    if (present != nullptr) *present = found;
  });
}

pyrt_status pyrt_filter_count(const pyrt_filter* handle, const uint64_t* keys, uint64_t n,
                              uint32_t* out) noexcept {
  return guard([&] {
    if (empty(handle, keys, n)) return;
    require_array(out, "out");
    of(handle)->count(keys, n, out);
  });
}

pyrt_status pyrt_filter_remove(pyrt_filter* handle, const uint64_t* keys, uint64_t n,
                               uint8_t* status, uint64_t* removed) noexcept {
  return guard([&] {
    const uint64_t done = empty(handle, keys, n) ? 0 : of(handle)->remove(keys, n, status);
    if (removed != nullptr) *removed = done;
  });
}

int32_t pyrt_filter_contains1(const pyrt_filter* handle, uint64_t key) noexcept {
  uint8_t found = 0;
  const pyrt_status status = guard([&] {
    require(handle, "filter");
    of(handle)->contains(&key, 1, &found);
  });
  return status == PYRT_OK ? found : status;
}

int32_t pyrt_filter_insert1(pyrt_filter* handle, uint64_t key) noexcept {
  uint8_t result = 0;
  const pyrt_status status = guard([&] {
    require(handle, "filter");
    of(handle)->insert(&key, 1, &result, false);
  });
  return status == PYRT_OK ? result : status;
}

int32_t pyrt_filter_remove1(pyrt_filter* handle, uint64_t key) noexcept {
  uint8_t result = 0;
  const pyrt_status status = guard([&] {
    require(handle, "filter");
    of(handle)->remove(&key, 1, &result);
  });
  return status == PYRT_OK ? result : status;
}

pyrt_status pyrt_filter_hash_strings(const pyrt_filter* handle, const char* data,
                                     uint64_t data_bytes, const int64_t* offsets, uint64_t n,
                                     uint64_t* keys) noexcept {
  return guard([&] {
    if (empty(handle, keys, n)) return;
    require_array(offsets, "offsets");
    if (data_bytes > 0) require(data, "data");
    int64_t at = 0;
    for (uint64_t i = 0; i <= n; ++i) {
      if (offsets[i] < at || static_cast<uint64_t>(offsets[i]) > data_bytes) {
        fail(PYRT_EINVAL,
             "offsets[%" PRIu64 "] is %lld; offsets do not fall and end within %" PRIu64, i,
             static_cast<long long>(offsets[i]), data_bytes);
      }
      at = offsets[i];
    }
    filter::hash_strings(of(handle)->seed(), data, offsets, n, keys);
  });
}

pyrt_status pyrt_filter_grow(pyrt_filter* handle, uint32_t seen) noexcept {
  return guard([&] {
    require(handle, "filter");
    of(handle)->grow(seen);
  });
}

pyrt_status pyrt_filter_compact(pyrt_filter* handle, uint32_t* dropped) noexcept {
  return guard([&] {
    require(handle, "filter");
    const uint32_t num = of(handle)->compact();
    if (dropped != nullptr) *dropped = num;
  });
}

pyrt_status pyrt_filter_merge(pyrt_filter* handle, const pyrt_filter* other) noexcept {
  return guard([&] {
    require(handle, "filter");
    require(other, "other");
    of(handle)->merge(*of(other));
  });
}

pyrt_status pyrt_filter_clear(pyrt_filter* handle) noexcept {
  return guard([&] {
    require(handle, "filter");
    of(handle)->clear();
  });
}

pyrt_status pyrt_filter_get_info(const pyrt_filter* handle, pyrt_filter_info* out) noexcept {
  return guard([&] {
    require(handle, "filter");
    require(out, "out");
    const filter::Info i = of(handle)->info();
    pyrt_filter_info full{out->struct_size, i.bits,         i.slots,       i.buckets,
                          i.capacity,       i.occupied,     i.num_slots,   i.bytes,
                          i.seed,           i.num_segments, i.moves,       i.retries,
                          i.max_path,       i.expected_fpr, i.generations, 0};
    std::memcpy(out, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_filter_check(const pyrt_filter* handle) noexcept {
  return guard([&] {
    require(handle, "filter");
    of(handle)->check();
  });
}

uint64_t pyrt_filter_file_bytes(const pyrt_filter* handle) noexcept {
  return handle == nullptr ? 0 : of(handle)->file_bytes();
}

pyrt_status pyrt_filter_save(const pyrt_filter* handle, void* out, uint64_t bytes,
                             uint32_t key_kind) noexcept {
  return guard([&] {
    require(handle, "filter");
    require(out, "out");
    if (key_kind > 2) fail(PYRT_EINVAL, "key_kind is %u; it must be in 0..2", key_kind);
    of(handle)->save(out, bytes, static_cast<uint8_t>(key_kind));
  });
}

pyrt_status pyrt_filter_load(const void* data, uint64_t bytes, pyrt_filter** out,
                             uint32_t* key_kind) noexcept {
  return guard([&] {
    require(data, "data");
    require(out, "out");
    uint8_t kind = 0;
    *out = handle_of(filter::Filter::load(data, bytes, &kind));
    if (key_kind != nullptr) *key_kind = kind;
  });
}

pyrt_status pyrt_filter_open_map(const char* path, int32_t verify, pyrt_filter** out,
                                 uint32_t* key_kind) noexcept {
  return guard([&] {
    require(path, "path");
    require(out, "out");
    uint8_t kind = 0;
    *out = handle_of(filter::Filter::open_map(path, verify != 0, &kind));
    if (key_kind != nullptr) *key_kind = kind;
  });
}

}  // extern "C"
