// Bad input at every entry of gpu.h and of the pool's copies on devices; see support/abuse.hpp. Bad
// arguments are found before a device is looked for; what is right gives PYRT_ENODEV where there is
// none.
#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

struct State {
  State() {
    pool.struct_size = sizeof pool;
    pool.per_unit = 10;
    pool.base = reinterpret_cast<uintptr_t>(bytes);
    pool.object_bytes = pool.stride = pool.packed_stride = 16;
    pool.unit_bytes = 160;
    pool.num_objects = 10;
    pool.indices = reinterpret_cast<uintptr_t>(indices);
    pool.n = 1;
    pool.packed = pool.base;
    kv.struct_size = sizeof kv;
    kv.num_layers = 2;
    kv.num_parts = 2;
    kv.block_bytes = 16;
    kv.from = kv.to = {pool.base, 16, 64, 32, 2};
    kv.runs = pool.indices;
    kv.num_runs = kv.num_blocks = 1;
  }
  unsigned char bytes[256] = {};
  uint32_t indices[8] = {};
  pyrt_pool_device_copy pool{};
  pyrt_kv_device_copy kv{};
};

std::vector<Row> rows(State& s) {
  using P = pyrt_pool_device_copy;
  using K = pyrt_kv_device_copy;
  const auto pool = [&s](auto change) {
    return [&s, change] {
      P copy = s.pool;
      change(copy);
      const pyrt_status status = pyrt_pool_gather_async(&copy, 0);
      EXPECT_EQ(pyrt_pool_scatter_async(&copy, 0), status);
      return status;
    };
  };
  const auto kv = [&s](auto change) {
    return [&s, change] {
      K copy = s.kv;
      change(copy);
      return pyrt_kv_copy_async(&copy, 0);
    };
  };
  return {
      {"pyrt_gpu_get_info", "null", [] { return pyrt_gpu_get_info(nullptr); }},
      {"pyrt_gpu_register", "null", [] { return pyrt_gpu_register(nullptr, 10); }},
      {"pyrt_gpu_register", "zero", [&] { return pyrt_gpu_register(s.bytes, 0); }},
      {"pyrt_gpu_unregister", "null", [] { return pyrt_gpu_unregister(nullptr); }},
      {"pyrt_gpu_reachable", "null out", [&] { return pyrt_gpu_reachable(s.bytes, nullptr); }},
      {"pyrt_gpu_reachable", "null address",
       [] {
         int32_t answer = 0;
         return pyrt_gpu_reachable(nullptr, &answer);
       }},
      {"pyrt_pool_gather_async", "null", [] { return pyrt_pool_gather_async(nullptr, 0); }},
      {"pyrt_pool_scatter_async", "null", [] { return pyrt_pool_scatter_async(nullptr, 0); }},
      {"pyrt_pool_gather_async", "struct_size", pool([](P& c) { c.struct_size = 8; })},
      {"pyrt_pool_gather_async", "no bytes", pool([](P& c) { c.object_bytes = 0; })},
      {"pyrt_pool_gather_async", "huge bytes", pool([](P& c) { c.object_bytes = ~0ull; })},
      {"pyrt_pool_gather_async", "per_unit", pool([](P& c) { c.per_unit = 0; })},
      {"pyrt_pool_gather_async", "stride below", pool([](P& c) { c.stride = 15; })},
      {"pyrt_pool_gather_async", "stride huge", pool([](P& c) { c.stride = ~0ull; })},
      {"pyrt_pool_gather_async", "unit_bytes", pool([](P& c) { c.unit_bytes = 159; })},
      {"pyrt_pool_gather_async", "packed_stride", pool([](P& c) { c.packed_stride = 0; })},
      {"pyrt_pool_gather_async", "n huge", pool([](P& c) { c.n = ~0ull; })},
      {"pyrt_pool_gather_async", "objects huge", pool([](P& c) { c.num_objects = ~0ull; })},
      {"pyrt_pool_gather_async", "null base", pool([](P& c) { c.base = 0; })},
      {"pyrt_pool_gather_async", "null packed", pool([](P& c) { c.packed = 0; })},
      {"pyrt_pool_gather_async", "null indices", pool([](P& c) { c.indices = 0; })},
      {"pyrt_pool_gather_async", "misaligned", pool([](P& c) { c.indices += 2; })},
      {"pyrt_pool_gather_async", "end of memory", pool([](P& c) { c.packed = ~uintptr_t{0}; })},
      {"pyrt_kv_copy_async", "null", [] { return pyrt_kv_copy_async(nullptr, 0); }},
      {"pyrt_kv_copy_async", "struct_size", kv([](K& c) { c.struct_size = 0; })},
      {"pyrt_kv_copy_async", "no layers", kv([](K& c) { c.num_layers = 0; })},
      {"pyrt_kv_copy_async", "huge layers", kv([](K& c) { c.num_layers = UINT32_MAX; })},
      {"pyrt_kv_copy_async", "no parts", kv([](K& c) { c.num_parts = 0; })},
      {"pyrt_kv_copy_async", "no bytes", kv([](K& c) { c.block_bytes = 0; })},
      {"pyrt_kv_copy_async", "huge bytes", kv([](K& c) { c.block_bytes = ~0ull; })},
      {"pyrt_kv_copy_async", "blocks huge", kv([](K& c) { c.num_blocks = ~0ull; })},
      {"pyrt_kv_copy_async", "more runs than blocks", kv([](K& c) { c.num_runs = 2; })},
      {"pyrt_kv_copy_async", "no runs", kv([](K& c) { c.num_runs = 0; })},
      {"pyrt_kv_copy_async", "null from", kv([](K& c) { c.from.base = 0; })},
      {"pyrt_kv_copy_async", "null to", kv([](K& c) { c.to.base = 0; })},
      {"pyrt_kv_copy_async", "null runs", kv([](K& c) { c.runs = 0; })},
      {"pyrt_kv_copy_async", "misaligned runs", kv([](K& c) { c.runs += 1; })},
      {"pyrt_kv_copy_async", "block_stride", kv([](K& c) { c.from.block_stride = 8; })},
      {"pyrt_kv_copy_async", "layer_stride", kv([](K& c) { c.to.layer_stride = 0; })},
      {"pyrt_kv_copy_async", "part_stride", kv([](K& c) { c.to.part_stride = 15; })},
      {"pyrt_kv_copy_async", "stride huge", kv([](K& c) { c.to.part_stride = ~0ull; })},
      {"pyrt_kv_copy_async", "layout huge", kv([](K& c) { c.from.num_blocks = ~0ull; })},
  };
}

TEST(AbiAbuse, Gpu) {
  State state;
  std::vector<Row> all = rows(state);
  run(all);
  all.push_back({"pyrt_gpu_synchronize", "any stream handle is the caller's word", nullptr});
  expect_covered("gpu.h", all);
}

TEST(AbiAbuse, WhatIsRightSaysThatThereIsNoDevice) {
  pyrt_gpu_info info;
  info.struct_size = sizeof info;
  if (pyrt_gpu_get_info(&info) == PYRT_OK) GTEST_SKIP() << "there is a device";
  State state;
  EXPECT_EQ(pyrt_gpu_synchronize(0), PYRT_ENODEV);
  EXPECT_EQ(pyrt_gpu_register(state.bytes, sizeof state.bytes), PYRT_ENODEV);
  EXPECT_EQ(pyrt_pool_gather_async(&state.pool, 0), PYRT_ENODEV);
  EXPECT_EQ(pyrt_kv_copy_async(&state.kv, 0), PYRT_ENODEV);
  EXPECT_STRNE(pyrt_last_error(), "");
}

}  // namespace
