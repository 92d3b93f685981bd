#include <algorithm>
#include <cmath>
#include <cstring>

#include "capi/error.hpp"
#include "capi/kv.hpp"

using namespace pyruntime;

namespace {

std::string name_of(const void* tool, size_t bytes) {
  if (bytes == 0) return {};
  capi::require(tool, "tool");
  if (bytes > 4096) fail(PYRT_EINVAL, "bytes is %zu; a tool's name has at most 4096", bytes);
  return {static_cast<const char*>(tool), bytes};
}

void require_seconds(double value, const char* name) {
  if (!(value >= 0) || std::isinf(value)) {
    fail(PYRT_EINVAL, "%s is %g; it must be finite and not negative", name, value);
  }
}

}  // namespace

extern "C" {

pyrt_status pyrt_kv_pin(pyrt_kv* pool, uint64_t seq, int64_t deadline_ns, uint64_t arrival,
                        uint64_t* pin) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(pin, "pin");
    *pin = pool->pins.pin(seq, deadline_ns, arrival);
  });
}

pyrt_status pyrt_kv_unpin(pyrt_kv* pool, uint64_t pin) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->pins.unpin(pin);
  });
}

pyrt_status pyrt_kv_tick(pyrt_kv* pool, int64_t now_ns, uint32_t* expired) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    const uint32_t ended = pool->pins.tick(now_ns);
    if (expired != nullptr) *expired = ended;
  });
}

pyrt_status pyrt_kv_pin_cap(pyrt_kv* pool, double share) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->pins.set_cap(share);
  });
}

pyrt_status pyrt_kv_ttl_observe(pyrt_kv* pool, const void* tool, size_t bytes,
                                double seconds) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    pool->tools.observe(name_of(tool, bytes), seconds);
  });
}

pyrt_status pyrt_kv_ttl_ended(pyrt_kv* pool, uint32_t turns) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    if (turns < 1 || turns > 1000000) {
      fail(PYRT_EINVAL, "turns is %u; it must be in 1..10^6", turns);
    }
    pool->tools.ended(turns);
  });
}

pyrt_status pyrt_kv_ttl_suggest(const pyrt_kv* pool, const void* tool, size_t bytes,
                                const pyrt_kv_ttl* given, double* seconds) noexcept {
  return capi::guard([&] {
    capi::require(pool, "pool");
    capi::require(given, "given");
    capi::require(seconds, "seconds");
    if (given->struct_size < sizeof *given) {
      fail(PYRT_EINVAL, "struct_size is %u; set it to sizeof(pyrt_kv_ttl)", given->struct_size);
    }
    const std::string name = name_of(tool, bytes);
    if (given->rule == PYRT_KV_TTL_FIXED) {
      *seconds = pool->tools.fixed_rule(name);
      return;
    }
    if (given->rule != PYRT_KV_TTL_FORMULA) fail(PYRT_EINVAL, "there is no rule %u", given->rule);
    require_seconds(given->wait_s, "wait_s");
    require_seconds(given->reload_s, "reload_s");
    require_seconds(given->unknown_mean_s, "unknown_mean_s");
    if (given->unknown_mean_s == 0) fail(PYRT_EINVAL, "unknown_mean_s is 0; it must be above");
    if (!(given->eta <= 1)) fail(PYRT_EINVAL, "eta is %g; it must be at most 1", given->eta);
    const double eta = given->eta < 0 ? pool->tools.memoryfulness() : given->eta;
    *seconds =
        pool->tools.suggest(name, given->wait_s, eta, given->reload_s, given->unknown_mean_s);
  });
}

}  // extern "C"
