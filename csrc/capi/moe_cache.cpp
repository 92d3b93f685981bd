#include "pyruntime/moe_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "capi/budget.hpp"
#include "capi/error.hpp"
#include "capi/moe_store.hpp"
#include "moe/cache.hpp"

using pyruntime::fail;
using pyruntime::capi::guard;
using pyruntime::capi::require;
using pyruntime::capi::require_array;
using pyruntime::capi::require_extents;
namespace moe = pyruntime::moe;

struct pyrt_moe_cache {
  pyrt_moe_cache(const moe::Store& store, const moe::Cache::Options& options, bool direct)
      : cache(store, std::make_unique<moe::FileReader>(store, direct), options) {}
  moe::Cache cache;
};

namespace {

using ll = long long;

void require_range(int64_t value, int64_t low, int64_t high, const char* name) {
  if (value < low || value > high) {
    fail(PYRT_EINVAL, "%s is %lld; it must be in %lld..%lld", name, static_cast<ll>(value),
         static_cast<ll>(low), static_cast<ll>(high));
  }
}

moe::Cache::Options options_of(const pyrt_moe_cache_options& given) {
  require_range(given.floor, 0, 4096, "floor");
  require_range(given.threads, 1, 64, "threads");
  require_range(given.order, PYRT_MOE_ORDER_HEBF, PYRT_MOE_ORDER_ID, "order");
  moe::Cache::Options options;
  options.limit_bytes = given.limit_bytes;
  options.budget = given.budget;
  options.priority = given.priority;
  options.floor = given.floor;
  options.threads = given.threads;
  options.strict = given.strict != 0;
  options.worth_errors = given.worth_errors != 0;
  options.order = static_cast<moe::Order>(given.order);
  if (given.scratch_bytes > 0) {
    options.scratch_bytes =
        static_cast<int64_t>(std::min<uint64_t>(given.scratch_bytes, uint64_t{1} << 40));
  }
  return options;
}

moe::Demand demand_of(int64_t experts, int32_t levels, const int64_t* counts,
                      const int32_t* resident, const double* load, const double* compute) {
  require_range(experts, 1, 4096, "experts");
  require_range(levels, 1, moe::kMaxLevels, "levels");
  require_array(counts, "counts");
  require_array(resident, "resident");
  require_array(load, "load_seconds");
  require_array(compute, "compute_seconds");
  for (int64_t i = 0; i < experts * levels; ++i) {
    require_range(counts[i], 0, int64_t{1} << 40, "counts");
  }
  for (int64_t i = 0; i < experts; ++i) require_range(resident[i], 0, levels, "resident");
  for (int32_t l = 0; l < levels; ++l) {
    const bool good =
        std::isfinite(load[l]) && load[l] >= 0 && std::isfinite(compute[l]) && compute[l] >= 0;
    if (!good) {
      fail(PYRT_EINVAL, "seconds of level %d are %g and %g; they must be finite and not negative",
           l, load[l], compute[l]);
    }
  }
  return {experts, levels, counts, resident, load, compute};
}

}  // namespace

extern "C" {

pyrt_status pyrt_moe_cache_create(const pyrt_moe_store* store,
                                  const pyrt_moe_cache_options* options,
                                  pyrt_moe_cache** out) noexcept {
  return guard([&] {
    require(store, "store");
    require(options, "options");
    require(out, "out");
    if (options->struct_size < sizeof *options) {
      fail(PYRT_EINVAL, "options.struct_size is %u; it must be at least %zu", options->struct_size,
           sizeof *options);
    }
    *out = new pyrt_moe_cache(store->store, options_of(*options), options->direct != 0);
  });
}

void pyrt_moe_cache_destroy(pyrt_moe_cache* cache) noexcept { delete cache; }

pyrt_status pyrt_moe_cache_ffn(pyrt_moe_cache* cache, int64_t layer, const float* x, int64_t n,
                               const int32_t* ids, const float* weights, int64_t top_k,
                               const uint8_t* levels, int32_t level, const uint8_t* floors,
                               float* out, uint8_t* status) noexcept {
  return guard([&] {
    require(cache, "cache");
    require_range(n, 0, int64_t{1} << 40, "n");
    require_range(top_k, 1, 4096, "top_k");
    if (n == 0) return;
    require_extents({n, top_k, moe::kMaxSide}, "x, ids or out");
    require_array(x, "x");
    require_array(ids, "ids");
    require_array(weights, "weights");
    require_array(out, "out");
    cache->cache.ffn(layer, {x, n, ids, weights, top_k, levels, level}, floors, out, status);
  });
}

pyrt_status pyrt_moe_cache_prefetch(pyrt_moe_cache* cache, int64_t layer, const int32_t* experts,
                                    int64_t count, int32_t level) noexcept {
  return guard([&] {
    require(cache, "cache");
    require_range(count, 0, int64_t{1} << 20, "count");
    if (count > 0) require_array(experts, "experts");
    cache->cache.prefetch(layer, experts, count, level);
  });
}

pyrt_status pyrt_moe_cache_missing(pyrt_moe_cache* cache, int64_t layer, const int32_t* experts,
                                   int64_t count, int32_t level, uint64_t* bytes) noexcept {
  return guard([&] {
    require(cache, "cache");
    require(bytes, "bytes");
    require_range(count, 0, int64_t{1} << 20, "count");
    if (count > 0) require_array(experts, "experts");
    *bytes = cache->cache.missing_bytes(layer, experts, count, level);
  });
}

pyrt_status pyrt_moe_cache_shrink(pyrt_moe_cache* cache, uint64_t bytes,
                                  uint64_t* used_bytes) noexcept {
  return guard([&] {
    require(cache, "cache");
    const uint64_t used = cache->cache.shrink(bytes);
    if (used_bytes != nullptr) *used_bytes = used;
  });
}

pyrt_status pyrt_moe_cache_drain(pyrt_moe_cache* cache) noexcept {
  return guard([&] {
    require(cache, "cache");
    cache->cache.drain();
  });
}

pyrt_status pyrt_moe_cache_get_statistics(pyrt_moe_cache* cache,
                                          pyrt_moe_cache_statistics* statistics) noexcept {
  return guard([&] {
    require(cache, "cache");
    require(statistics, "statistics");
    const moe::CacheStatistics s = cache->cache.statistics();
    pyrt_moe_cache_statistics full{};
    full.struct_size = statistics->struct_size;
    full.prefetching = s.prefetching;
    full.limit_bytes = s.limit_bytes;
    full.capacity_bytes = s.capacity_bytes;
    full.used_bytes = s.used_bytes;
    std::copy_n(s.resident, moe::kMaxLevels, full.resident);
    std::copy_n(s.hits, moe::kMaxLevels, full.hits);
    std::copy_n(s.misses, moe::kMaxLevels, full.misses);
    full.bytes_read = s.bytes_read;
    full.evictions = s.evictions;
    full.evicted_bytes = s.evicted_bytes;
    full.prefetched_bytes = s.prefetched_bytes;
    full.prefetch_useful_bytes = s.prefetch_useful_bytes;
    full.prefetch_wasted_bytes = s.prefetch_wasted_bytes;
    full.prefetch_cancelled = s.prefetch_cancelled;
    full.read_errors = s.read_errors;
    full.checksum_errors = s.checksum_errors;
    full.quarantined = s.quarantined;
    full.failed_tokens = s.failed_tokens;
    full.degraded_tokens = s.degraded_tokens;
    full.calls = s.calls;
    full.waits = s.waits;
    full.wait_nanoseconds = s.wait_nanoseconds;
    std::memcpy(full.backend, s.backend, sizeof full.backend);
    std::memcpy(statistics, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_moe_cache_check(pyrt_moe_cache* cache) noexcept {
  return guard([&] {
    require(cache, "cache");
    cache->cache.check();
  });
}

pyrt_status pyrt_moe_plan(int32_t order, int64_t experts, int32_t levels, const int64_t* counts,
                          const int32_t* resident, const double* load_seconds,
                          const double* compute_seconds, int32_t* planes, int64_t* num_planes,
                          double* makespan) noexcept {
  return guard([&] {
    require_range(order, PYRT_MOE_ORDER_HEBF, PYRT_MOE_ORDER_ID, "order");
    const moe::Demand demand =
        demand_of(experts, levels, counts, resident, load_seconds, compute_seconds);
    require_array(planes, "planes");
    require(num_planes, "num_planes");
    const std::vector<moe::PlaneId> found = moe::plan(demand, static_cast<moe::Order>(order));
    for (size_t i = 0; i < found.size(); ++i) {
      planes[2 * i] = found[i].expert;
      planes[2 * i + 1] = found[i].level;
    }
    *num_planes = static_cast<int64_t>(found.size());
    if (makespan != nullptr) *makespan = moe::makespan(demand, found);
  });
}

pyrt_status pyrt_moe_makespan(int64_t experts, int32_t levels, const int64_t* counts,
                              const int32_t* resident, const double* load_seconds,
                              const double* compute_seconds, const int32_t* planes,
                              int64_t num_planes, double* makespan) noexcept {
  return guard([&] {
    const moe::Demand demand =
        demand_of(experts, levels, counts, resident, load_seconds, compute_seconds);
    require_range(num_planes, 0, experts * levels, "num_planes");
    if (num_planes > 0) require_array(planes, "planes");
    require(makespan, "makespan");
    std::vector<int32_t> next(resident, resident + experts);
    std::vector<moe::PlaneId> order;
    for (int64_t i = 0; i < num_planes; ++i) {
      const int32_t expert = planes[2 * i], level = planes[2 * i + 1];
      require_range(expert, 0, experts - 1, "planes");
      if (level != next[static_cast<size_t>(expert)]++ || level >= levels) {
        fail(PYRT_EINVAL, "plane (%d, %d) is not the next of its expert", expert, level);
      }
      order.push_back({expert, level});
    }
    for (int64_t e = 0; e < experts; ++e) {
      for (int32_t l = next[static_cast<size_t>(e)]; l < levels; ++l) {
        if (counts[e * levels + l] > 0) {
          fail(PYRT_EINVAL, "plane (%lld, %d) is missing from the order", static_cast<ll>(e), l);
        }
      }
    }
    *makespan = moe::makespan(demand, order);
  });
}

}  // extern "C"
