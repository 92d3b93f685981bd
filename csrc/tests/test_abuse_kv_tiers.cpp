// Bad input at every entry of kv_tiers.h; see support/abuse.hpp.
#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

std::vector<Row> rows() {
  static int32_t tokens[32] = {};
  static uint8_t keys[64];
  const auto keys_of = [](const void* secret, uint64_t secret_bytes, const void* space,
                          uint64_t space_bytes, const int32_t* at, uint64_t n, uint32_t size,
                          uint8_t* out) {
    return [=] {
      return pyrt_kv_export_keys(secret, secret_bytes, space, space_bytes, at, n, size, out);
    };
  };
  const char* name = "pyrt_kv_export_keys";
  return {
      {name, "right", keys_of("s", 1, "n", 1, tokens, 32, 16, keys), PYRT_OK},
      {name, "nothing", keys_of(nullptr, 0, nullptr, 0, nullptr, 0, 16, nullptr), PYRT_OK},
      {name, "null secret", keys_of(nullptr, 1, "n", 1, tokens, 32, 16, keys)},
      {name, "null space", keys_of("s", 1, nullptr, 1, tokens, 32, 16, keys)},
      {name, "huge secret", keys_of("s", kHuge, "n", 1, tokens, 32, 16, keys)},
      {name, "huge space", keys_of("s", 1, "n", ~0ull, tokens, 32, 16, keys)},
      {name, "null tokens", keys_of("s", 1, "n", 1, nullptr, 32, 16, keys)},
      {name, "misaligned", keys_of("s", 1, "n", 1, misaligned(tokens), 16, 16, keys)},
      {name, "huge tokens", keys_of("s", 1, "n", 1, tokens, kHuge, 16, keys)},
      {name, "block size 0", keys_of("s", 1, "n", 1, tokens, 32, 0, keys)},
      {name, "block size huge", keys_of("s", 1, "n", 1, tokens, 32, ~0u, keys)},
      {name, "null keys", keys_of("s", 1, "n", 1, tokens, 32, 16, nullptr)},
  };
}

TEST(AbuseKvTiers, EveryEntry) { run(rows()); }
TEST(AbuseKvTiers, TableCoversTheHeader) { expect_covered("kv_tiers.h", rows()); }

}  // namespace
