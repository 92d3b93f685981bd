#include "capi/error.hpp"
#include "kv/export_key.hpp"
#include "pyruntime/kv_tiers.h"

using namespace pyruntime;

extern "C" pyrt_status pyrt_kv_export_keys(const void* secret, uint64_t secret_bytes,
                                           const void* space, uint64_t space_bytes,
                                           const int32_t* tokens, uint64_t num_tokens,
                                           uint32_t block_size, uint8_t* keys) noexcept {
  return capi::guard([&] {
    constexpr uint64_t kMost = uint64_t{1} << 32;
    const auto bytes = [](const void* data, uint64_t n, const char* name) {
      if (n > 0) capi::require(data, name);
      if (n > kMost) {
        fail(PYRT_EINVAL, "%s has %llu bytes; it may have 2^32", name,
             static_cast<unsigned long long>(n));
      }
    };
    bytes(secret, secret_bytes, "secret");
    bytes(space, space_bytes, "space");
    if (num_tokens > kMost) {
      fail(PYRT_EINVAL, "num_tokens is %llu; it must be at most 2^32",
           static_cast<unsigned long long>(num_tokens));
    }
    kv::KeyChain chain(secret, secret_bytes, space, space_bytes, block_size);
    const uint64_t blocks = num_tokens / block_size;
    if (blocks == 0) return;
    capi::require_array(tokens, "tokens");
    capi::require(keys, "keys");
    chain.extend(tokens, blocks, keys);
  });
}
