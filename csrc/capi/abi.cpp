#include "pyruntime/abi.h"

#include <atomic>
#include <cstring>

#include "base/log.hpp"
#include "base/stop.hpp"
#include "base/thread_pool.hpp"
#include "capi/error.hpp"
#include "simd/level.hpp"

namespace pyruntime::capi {
namespace {

// A fixed buffer: reporting "out of memory" must not allocate, and TLS stays trivially
// destructible.
thread_local char last_error[512];

}  // namespace

pyrt_status set_error(pyrt_status status, const char* message) noexcept {
  std::strncpy(last_error, message, sizeof last_error - 1);
  return status;
}

}  // namespace pyruntime::capi

using namespace pyruntime;

extern "C" {

int32_t pyrt_abi_version(void) noexcept { return PYRT_ABI_VERSION; }

const char* pyrt_version(void) noexcept { return PYRT_VERSION_STRING; }

const char* pyrt_status_name(pyrt_status status) noexcept {
  static constexpr const char* kNames[] = {
      "PYRT_OK",       "PYRT_EINVAL",    "PYRT_ENOMEM",       "PYRT_EFULL",
      "PYRT_ENOENT",   "PYRT_ECORRUPT",  "PYRT_EIO",          "PYRT_EVERSION",
      "PYRT_ENODEV",   "PYRT_ECUDA",     "PYRT_ESTATE",       "PYRT_ECLOSED",
      "PYRT_ETIMEOUT", "PYRT_ECANCELED", "PYRT_EUNSUPPORTED", "PYRT_EINTERNAL"};
  if (status > 0 || status < PYRT_EINTERNAL) return "unknown status";
  return kNames[-status];
}

const char* pyrt_last_error(void) noexcept { return capi::last_error; }

void pyrt_set_log_callback(pyrt_log_fn fn, void* user) noexcept {
  base::set_log_callback(fn, user);
}

const char* pyrt_simd_level(void) noexcept { return simd::name(simd::level()); }

const char* pyrt_simd_detected(void) noexcept { return simd::name(simd::detected()); }

pyrt_status pyrt_stop_create(pyrt_stop** out) noexcept {
  return capi::guard([&] {
    capi::require(out, "out");
    *out = new pyrt_stop;
  });
}

void pyrt_stop_destroy(pyrt_stop* stop) noexcept { delete stop; }

void pyrt_stop_set(pyrt_stop* stop, int32_t value) noexcept {
  if (stop != nullptr) stop->raised.store(value != 0, std::memory_order_release);
}

int32_t pyrt_stop_is_set(const pyrt_stop* stop) noexcept {
  return stop != nullptr && stop->raised.load(std::memory_order_acquire);
}

int32_t pyrt_threads_size(void) noexcept { return base::ThreadPool::process().size(); }

pyrt_status pyrt_threads_resize(int32_t size) noexcept {
  return capi::guard([&] { base::ThreadPool::process().resize(size); });
}

}  // extern "C"
