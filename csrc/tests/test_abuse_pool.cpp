// Bad input at every entry of abi.h, pool.h and pool_nodes.h; see support/abuse.hpp.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

std::vector<Row> abi_rows() {
  return {
      {"pyrt_abi_version", "", [] { return ok_if(pyrt_abi_version() >= 1); }, PYRT_OK},
      {"pyrt_version", "", [] { return ok_if(*pyrt_version() != 0); }, PYRT_OK},
      {"pyrt_status_name", "no status",
       [] { return ok_if(std::strcmp(pyrt_status_name(INT32_MIN), "unknown status") == 0); },
       PYRT_OK},
      {"pyrt_last_error", "never NULL", [] { return ok_if(pyrt_last_error() != nullptr); },
       PYRT_OK},
      {"pyrt_set_log_callback", "NULL",
       [] {
         pyrt_set_log_callback(nullptr, nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_simd_level", "", [] { return ok_if(*pyrt_simd_level() != 0); }, PYRT_OK},
      {"pyrt_simd_detected", "", [] { return ok_if(*pyrt_simd_detected() != 0); }, PYRT_OK},
      {"pyrt_stop_create", "null", [] { return pyrt_stop_create(nullptr); }},
      {"pyrt_stop_destroy", "null",
       [] {
         pyrt_stop_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_stop_set", "null",
       [] {
         pyrt_stop_set(nullptr, 1);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_stop_is_set", "null", [] { return ok_if(pyrt_stop_is_set(nullptr) == 0); }, PYRT_OK},
      {"pyrt_threads_size", "", [] { return ok_if(pyrt_threads_size() >= 1); }, PYRT_OK},
      {"pyrt_threads_resize", "zero", [] { return pyrt_threads_resize(0); }},
      {"pyrt_threads_resize", "negative", [] { return pyrt_threads_resize(-1); }},
      {"pyrt_threads_resize", "huge", [] { return pyrt_threads_resize(INT32_MAX); }},
  };
}

TEST(AbiAbuse, Abi) {
  run(abi_rows());
  expect_covered("abi.h", abi_rows());
}

// One pool with an object out, which every row must find as it was.
class PoolState {
 public:
  PoolState() {
    pyrt_pool_options_init(&options);
    options.object_bytes = 64;
    options.capacity = 100;
    options.check = PYRT_CHECK_STATE;
    EXPECT_EQ(pyrt_pool_create(&options, &pool), PYRT_OK);
    mine = pyrt_pool_get(pool);
    EXPECT_EQ(pyrt_pool_cache_create(pool, &cache), PYRT_OK);
    other = pyrt_pool_get(pool);
    EXPECT_EQ(pyrt_pool_put(pool, other), PYRT_OK);
  }
  ~PoolState() {
    EXPECT_EQ(pyrt_pool_put(pool, mine), PYRT_OK);
    EXPECT_EQ(pyrt_pool_cache_destroy(cache), PYRT_OK);
    EXPECT_EQ(pyrt_pool_check(pool), PYRT_OK) << pyrt_last_error();
    EXPECT_EQ(pyrt_pool_destroy(pool, 0), PYRT_OK) << pyrt_last_error();
  }

  pyrt_pool_options options;
  pyrt_pool* pool = nullptr;
  void* mine = nullptr;   // out
  void* other = nullptr;  // free
  void* objects[300] = {};
  uint32_t indices[300] = {};
  pyrt_pool* made = nullptr;
  pyrt_pool_cache* cache = nullptr;
  pyrt_pool_cache* cache_made = nullptr;
};

pyrt_status create_with(PoolState& s, const std::function<void(pyrt_pool_options&)>& change) {
  pyrt_pool_options options = s.options;
  change(options);
  const pyrt_status status = pyrt_pool_create(&options, &s.made);
  EXPECT_EQ(s.made, nullptr) << "an out-pointer is written on success only";
  return status;
}

std::vector<Row> pool_rows(PoolState& s) {
  const auto created = [&s](auto change) {
    return [&s, change] { return create_with(s, change); };
  };
  using O = pyrt_pool_options;
  return {
      {"pyrt_pool_options_init", "null",
       [] {
         pyrt_pool_options_init(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_pool_create", "null options", [&] { return pyrt_pool_create(nullptr, &s.made); }},
      {"pyrt_pool_create", "null out", [&] { return pyrt_pool_create(&s.options, nullptr); }},
      {"pyrt_pool_create", "struct_size 0", created([](O& o) { o.struct_size = 0; })},
      {"pyrt_pool_create", "zero bytes", created([](O& o) { o.object_bytes = 0; })},
      {"pyrt_pool_create", "huge bytes", created([](O& o) { o.object_bytes = ~0ull; })},
      {"pyrt_pool_create", "zero capacity", created([](O& o) { o.capacity = 0; })},
      {"pyrt_pool_create", "huge capacity", created([](O& o) { o.capacity = ~0ull; })},
      {"pyrt_pool_create", "huge max_capacity", created([](O& o) { o.max_capacity = ~0ull; })},
      {"pyrt_pool_create", "max_capacity below", created([](O& o) { o.max_capacity = 5; })},
      {"pyrt_pool_create", "align 3", created([](O& o) { o.align = 3; })},
      {"pyrt_pool_create", "align huge", created([](O& o) { o.align = 1ull << 63; })},
      {"pyrt_pool_create", "pages", created([](O& o) { o.pages = 4; })},
      {"pyrt_pool_create", "prefault", created([](O& o) { o.prefault = 3; })},
      {"pyrt_pool_create", "check", created([](O& o) { o.check = 3; })},
      {"pyrt_pool_create", "fork", created([](O& o) { o.fork = 2; })},
      {"pyrt_pool_create", "node", created([](O& o) { o.node = 64; })},
      {"pyrt_pool_create", "node below", created([](O& o) { o.node = INT32_MIN; })},
      {"pyrt_pool_create", "cache_objects", created([](O& o) { o.cache_objects = 513; })},
      {"pyrt_pool_create", "more than an address space", created([](O& o) {
         o.object_bytes = 1 << 30;
         o.capacity = 1ull << 40;
       }),
       PYRT_ENOMEM},
      {"pyrt_pool_destroy", "null", [] { return pyrt_pool_destroy(nullptr, 0); }, PYRT_OK},
      {"pyrt_pool_destroy", "while an object is out", [&] { return pyrt_pool_destroy(s.pool, 0); },
       PYRT_ESTATE},
      {"pyrt_pool_get", "null", [] { return ok_if(pyrt_pool_get(nullptr) == nullptr); }, PYRT_OK},
      {"pyrt_pool_put", "null pool", [&] { return pyrt_pool_put(nullptr, s.mine); }},
      {"pyrt_pool_put", "null object", [&] { return pyrt_pool_put(s.pool, nullptr); }},
      {"pyrt_pool_put", "foreign", [&] { return pyrt_pool_put(s.pool, &s); }},
      {"pyrt_pool_put", "misaligned",
       [&] { return pyrt_pool_put(s.pool, static_cast<char*>(s.mine) + 8); }},
      {"pyrt_pool_put", "before the pool",
       [&] { return pyrt_pool_put(s.pool, reinterpret_cast<void*>(uintptr_t{64})); }},
      {"pyrt_pool_put", "end of memory",
       [&] { return pyrt_pool_put(s.pool, reinterpret_cast<void*>(~uintptr_t{0})); }},
      {"pyrt_pool_put", "twice", [&] { return pyrt_pool_put(s.pool, s.other); }, PYRT_ESTATE},
      {"pyrt_pool_get_bulk", "null pool",
       [&] { return pyrt_pool_get_bulk(nullptr, s.objects, 1); }},
      {"pyrt_pool_get_bulk", "null out", [&] { return pyrt_pool_get_bulk(s.pool, nullptr, 1); }},
      {"pyrt_pool_get_bulk", "misaligned",
       [&] { return pyrt_pool_get_bulk(s.pool, misaligned(s.objects), 1); }},
      {"pyrt_pool_get_bulk", "zero", [&] { return pyrt_pool_get_bulk(s.pool, nullptr, 0); },
       PYRT_OK},
      {"pyrt_pool_get_bulk", "too many", [&] { return pyrt_pool_get_bulk(s.pool, s.objects, 300); },
       PYRT_EFULL},
      {"pyrt_pool_get_bulk", "huge",
       [&] { return pyrt_pool_get_bulk(s.pool, s.objects, kHugeSize); }, PYRT_EFULL},
      {"pyrt_pool_cache_create", "null pool",
       [&] { return pyrt_pool_cache_create(nullptr, &s.cache_made); }},
      {"pyrt_pool_cache_create", "null out",
       [&] { return pyrt_pool_cache_create(s.pool, nullptr); }},
      {"pyrt_pool_cache_destroy", "null", [] { return pyrt_pool_cache_destroy(nullptr); }, PYRT_OK},
      {"pyrt_pool_cache_get", "null", [] { return ok_if(pyrt_pool_cache_get(nullptr) == nullptr); },
       PYRT_OK},
      {"pyrt_pool_cache_put", "null", [&] { return pyrt_pool_cache_put(nullptr, s.mine); }},
      {"pyrt_pool_cache_put", "null object", [&] { return pyrt_pool_cache_put(s.cache, nullptr); }},
      {"pyrt_pool_cache_put", "foreign", [&] { return pyrt_pool_cache_put(s.cache, &s); }},
      {"pyrt_pool_cache_put", "misaligned",
       [&] { return pyrt_pool_cache_put(s.cache, static_cast<char*>(s.mine) + 1); }},
      {"pyrt_pool_cache_put", "free", [&] { return pyrt_pool_cache_put(s.cache, s.other); },
       PYRT_ESTATE},
      {"pyrt_pool_cache_get_bulk", "null",
       [&] { return pyrt_pool_cache_get_bulk(nullptr, s.objects, 1); }},
      {"pyrt_pool_cache_get_bulk", "null out",
       [&] { return pyrt_pool_cache_get_bulk(s.cache, nullptr, 1); }},
      {"pyrt_pool_cache_get_bulk", "misaligned",
       [&] { return pyrt_pool_cache_get_bulk(s.cache, misaligned(s.objects), 1); }},
      {"pyrt_pool_cache_get_bulk", "too many",
       [&] { return pyrt_pool_cache_get_bulk(s.cache, s.objects, 300); }, PYRT_EFULL},
      {"pyrt_pool_cache_get_bulk", "huge",
       [&] { return pyrt_pool_cache_get_bulk(s.cache, s.objects, kHugeSize); }, PYRT_EFULL},
      {"pyrt_pool_cache_put_bulk", "null",
       [&] { return pyrt_pool_cache_put_bulk(nullptr, &s.mine, 1); }},
      {"pyrt_pool_cache_put_bulk", "null list",
       [&] { return pyrt_pool_cache_put_bulk(s.cache, nullptr, 1); }},
      {"pyrt_pool_cache_put_bulk", "huge",
       [&] { return pyrt_pool_cache_put_bulk(s.cache, &s.mine, kHugeSize); }},
      {"pyrt_pool_cache_layout", "", [] { return ok_if(pyrt_pool_cache_layout() >= 1); }, PYRT_OK},
      {"pyrt_pool_destroy", "with a cache", [&] { return pyrt_pool_destroy(s.pool, 0); },
       PYRT_ESTATE},
      {"pyrt_pool_put_bulk", "null pool", [&] { return pyrt_pool_put_bulk(nullptr, &s.mine, 1); }},
      {"pyrt_pool_put_bulk", "null list", [&] { return pyrt_pool_put_bulk(s.pool, nullptr, 1); }},
      {"pyrt_pool_put_bulk", "zero", [&] { return pyrt_pool_put_bulk(s.pool, nullptr, 0); },
       PYRT_OK},
      {"pyrt_pool_put_bulk", "huge",
       [&] { return pyrt_pool_put_bulk(s.pool, &s.mine, kHugeSize); }},
      {"pyrt_pool_put_bulk", "one of them twice",
       [&] {
         void* twice[] = {s.mine, s.mine};
         return pyrt_pool_put_bulk(s.pool, twice, 2);
       },
       PYRT_ESTATE},
      {"pyrt_pool_put_bulk", "one of them foreign",
       [&] {
         void* some[] = {s.mine, &s};
         return pyrt_pool_put_bulk(s.pool, some, 2);
       }},
      {"pyrt_pool_get_indices", "null pool",
       [&] { return pyrt_pool_get_indices(nullptr, s.indices, 1); }},
      {"pyrt_pool_get_indices", "null out",
       [&] { return pyrt_pool_get_indices(s.pool, nullptr, 1); }},
      {"pyrt_pool_get_indices", "misaligned",
       [&] { return pyrt_pool_get_indices(s.pool, misaligned(s.indices), 1); }},
      {"pyrt_pool_get_indices", "too many",
       [&] { return pyrt_pool_get_indices(s.pool, s.indices, 300); }, PYRT_EFULL},
      {"pyrt_pool_get_indices", "huge",
       [&] { return pyrt_pool_get_indices(s.pool, s.indices, kHugeSize); }, PYRT_EFULL},
      {"pyrt_pool_put_indices", "null pool",
       [&] { return pyrt_pool_put_indices(nullptr, s.indices, 1); }},
      {"pyrt_pool_put_indices", "null list",
       [&] { return pyrt_pool_put_indices(s.pool, nullptr, 1); }},
      {"pyrt_pool_put_indices", "misaligned",
       [&] { return pyrt_pool_put_indices(s.pool, misaligned(s.indices), 1); }},
      {"pyrt_pool_put_indices", "huge",
       [&] { return pyrt_pool_put_indices(s.pool, s.indices, kHugeSize); }},
      {"pyrt_pool_put_indices", "out of range",
       [&] {
         const uint32_t index = UINT32_MAX;
         return pyrt_pool_put_indices(s.pool, &index, 1);
       }},
      {"pyrt_pool_put_indices", "free already",
       [&] {
         const auto index = static_cast<uint32_t>(pyrt_pool_index_of(s.pool, s.other));
         return pyrt_pool_put_indices(s.pool, &index, 1);
       },
       PYRT_ESTATE},
      {"pyrt_pool_ptr_of", "null, and huge",
       [&] {
         return ok_if(pyrt_pool_ptr_of(nullptr, 0) == nullptr &&
                      pyrt_pool_ptr_of(s.pool, ~0ull) == nullptr &&
                      pyrt_pool_ptr_of(s.pool, 100) == nullptr);
       },
       PYRT_OK},
      {"pyrt_pool_index_of", "null, foreign, misaligned",
       [&] {
         return ok_if(pyrt_pool_index_of(nullptr, s.mine) == -1 &&
                      pyrt_pool_index_of(s.pool, nullptr) == -1 &&
                      pyrt_pool_index_of(s.pool, &s) == -1 &&
                      pyrt_pool_index_of(s.pool, static_cast<char*>(s.mine) + 1) == -1);
       },
       PYRT_OK},
      {"pyrt_pool_get_layout", "null pool",
       [] {
         pyrt_pool_layout layout{};
         return pyrt_pool_get_layout(nullptr, &layout);
       }},
      {"pyrt_pool_get_layout", "null out", [&] { return pyrt_pool_get_layout(s.pool, nullptr); }},
      {"pyrt_pool_get_layout", "struct_size 0 writes nothing",
       [&] {
         pyrt_pool_layout layout{};
         const pyrt_status status = pyrt_pool_get_layout(s.pool, &layout);
         EXPECT_EQ(layout.base, nullptr);
         return status;
       },
       PYRT_OK},
      {"pyrt_pool_get_statistics", "null pool",
       [] {
         pyrt_pool_statistics statistics{};
         return pyrt_pool_get_statistics(nullptr, &statistics);
       }},
      {"pyrt_pool_get_statistics", "null out",
       [&] { return pyrt_pool_get_statistics(s.pool, nullptr); }},
      {"pyrt_pool_prefault", "null", [] { return pyrt_pool_prefault(nullptr); }},
      {"pyrt_pool_trim", "null", [] { return pyrt_pool_trim(nullptr, nullptr); }},
      {"pyrt_pool_trim", "null out", [&] { return pyrt_pool_trim(s.pool, nullptr); }, PYRT_OK},
      {"pyrt_pool_flush_thread", "null", [] { return pyrt_pool_flush_thread(nullptr); }},
      {"pyrt_pool_check", "null", [] { return pyrt_pool_check(nullptr); }},
      // Their other rows are those of test_abuse_gpu.cpp.
      {"pyrt_pool_gather_async", "null", [] { return pyrt_pool_gather_async(nullptr, 0); }},
      {"pyrt_pool_scatter_async", "null", [] { return pyrt_pool_scatter_async(nullptr, 0); }},
  };
}

// One budget of 8 MiB with a client that holds 2.
class BudgetState {
 public:
  BudgetState() {
    EXPECT_EQ(pyrt_budget_create(4 * kUnit, &budget), PYRT_OK);
    EXPECT_EQ(pyrt_budget_register(budget, "one", 0, nullptr, nullptr, &client), PYRT_OK);
    EXPECT_EQ(pyrt_budget_reserve(client, kUnit), PYRT_OK);
  }
  ~BudgetState() {
    EXPECT_EQ(pyrt_budget_give_back(client, kUnit), PYRT_OK) << "it was changed";
    EXPECT_EQ(pyrt_budget_unregister(client, 0), PYRT_OK);
    EXPECT_EQ(pyrt_budget_destroy(budget), PYRT_OK);
  }

  static constexpr uint64_t kUnit = PYRT_BUDGET_UNIT_BYTES;
  pyrt_budget* budget = nullptr;
  pyrt_budget_client* client = nullptr;
  pyrt_budget* other = nullptr;
  pyrt_budget_client* another = nullptr;
};

std::vector<Row> budget_rows(BudgetState& s) {
  const uint64_t unit = BudgetState::kUnit;
  return {
      {"pyrt_budget_create", "null", [=] { return pyrt_budget_create(unit, nullptr); }},
      {"pyrt_budget_create", "zero", [&s] { return pyrt_budget_create(0, &s.other); }},
      {"pyrt_budget_create", "below a unit", [&s] { return pyrt_budget_create(4096, &s.other); }},
      {"pyrt_budget_create", "huge", [&s] { return pyrt_budget_create(UINT64_MAX, &s.other); }},
      {"pyrt_budget_destroy", "null", [] { return pyrt_budget_destroy(nullptr); }, PYRT_OK},
      {"pyrt_budget_destroy", "with a client", [&s] { return pyrt_budget_destroy(s.budget); },
       PYRT_ESTATE},
      {"pyrt_budget_register", "null",
       [&s] { return pyrt_budget_register(nullptr, "", 0, nullptr, nullptr, &s.another); }},
      {"pyrt_budget_register", "null name",
       [&s] { return pyrt_budget_register(s.budget, nullptr, 0, nullptr, nullptr, &s.another); }},
      {"pyrt_budget_register", "null out",
       [&s] { return pyrt_budget_register(s.budget, "x", 0, nullptr, nullptr, nullptr); }},
      {"pyrt_budget_unregister", "null", [] { return pyrt_budget_unregister(nullptr, 0); },
       PYRT_OK},
      {"pyrt_budget_unregister", "holding bytes",
       [&s] { return pyrt_budget_unregister(s.client, 0); }, PYRT_ESTATE},
      {"pyrt_budget_reserve", "null", [=] { return pyrt_budget_reserve(nullptr, unit); }},
      {"pyrt_budget_reserve", "zero", [&s] { return pyrt_budget_reserve(s.client, 0); }, PYRT_OK},
      {"pyrt_budget_reserve", "part of a unit",
       [&s, unit] { return pyrt_budget_reserve(s.client, unit + 1); }},
      {"pyrt_budget_reserve", "more than is left",
       [&s, unit] { return pyrt_budget_reserve(s.client, 4 * unit); }, PYRT_EFULL},
      {"pyrt_budget_reserve", "huge",
       [&s, unit] { return pyrt_budget_reserve(s.client, UINT64_MAX / unit * unit); }, PYRT_EFULL},
      {"pyrt_budget_give_back", "null", [=] { return pyrt_budget_give_back(nullptr, unit); }},
      {"pyrt_budget_give_back", "zero", [&s] { return pyrt_budget_give_back(s.client, 0); },
       PYRT_OK},
      {"pyrt_budget_give_back", "part of a unit",
       [&s] { return pyrt_budget_give_back(s.client, 1); }},
      {"pyrt_budget_give_back", "more than it holds",
       [&s, unit] { return pyrt_budget_give_back(s.client, 2 * unit); }},
      {"pyrt_budget_get_statistics", "null",
       [] { return pyrt_budget_get_statistics(nullptr, nullptr); }},
      {"pyrt_budget_get_statistics", "null out",
       [&s] { return pyrt_budget_get_statistics(s.budget, nullptr); }},
      {"pyrt_budget_client_get_statistics", "null",
       [] { return pyrt_budget_client_get_statistics(nullptr, nullptr); }},
      {"pyrt_budget_client_get_statistics", "null out",
       [&s] { return pyrt_budget_client_get_statistics(s.client, nullptr); }},
  };
}

// An arena with one object out.
class ArenaState {
 public:
  ArenaState() {
    pyrt_arena_options_init(&options);
    options.reserve_bytes = 16 << 20;
    EXPECT_EQ(pyrt_arena_create(&options, &arena), PYRT_OK);
    EXPECT_EQ(pyrt_arena_acquire(arena, 4096, &object), PYRT_OK);
    EXPECT_EQ(pyrt_arena_acquire(arena, 4096, &released), PYRT_OK);
    EXPECT_EQ(pyrt_arena_release(arena, released), PYRT_OK);
  }
  ~ArenaState() {
    EXPECT_EQ(pyrt_arena_check(arena), PYRT_OK) << pyrt_last_error();
    EXPECT_EQ(pyrt_arena_release(arena, object), PYRT_OK) << "it was changed";
    EXPECT_EQ(pyrt_arena_destroy(arena, 0), PYRT_OK);
  }

  pyrt_arena_options options;
  pyrt_arena* arena = nullptr;
  void* object = nullptr;
  void* released = nullptr;
  pyrt_arena* other = nullptr;
  void* out = nullptr;
  uint64_t bytes = 0;
};

pyrt_status create_arena(ArenaState& s, const std::function<void(pyrt_arena_options&)>& change) {
  pyrt_arena_options options = s.options;
  change(options);
  return pyrt_arena_create(&options, &s.other);
}

std::vector<Row> arena_rows(ArenaState& s) {
  using Options = pyrt_arena_options;
  const auto create = [&s](const std::function<void(Options&)>& change) {
    return [&s, change] { return create_arena(s, change); };
  };
  return {
      {"pyrt_arena_options_init", "null",
       [] {
         pyrt_arena_options_init(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_arena_create", "null", [&s] { return pyrt_arena_create(nullptr, &s.other); }},
      {"pyrt_arena_create", "null out", [&s] { return pyrt_arena_create(&s.options, nullptr); }},
      {"pyrt_arena_create", "struct_size", create([](Options& o) { o.struct_size = 4; })},
      {"pyrt_arena_create", "zero", create([](Options& o) { o.reserve_bytes = 0; })},
      {"pyrt_arena_create", "huge", create([](Options& o) { o.reserve_bytes = UINT64_MAX; })},
      {"pyrt_arena_create", "pages", create([](Options& o) { o.pages = 4; })},
      {"pyrt_arena_create", "hugetlb", create([](Options& o) { o.pages = PYRT_PAGES_HUGETLB; }),
       PYRT_EUNSUPPORTED},
      {"pyrt_arena_create", "node", create([](Options& o) { o.node = 64; })},
      {"pyrt_arena_create", "null classes", create([](Options& o) { o.num_classes = 1; })},
      {"pyrt_arena_create", "many classes", create([](Options& o) { o.num_classes = UINT64_MAX; })},
      {"pyrt_arena_create", "an empty class", create([&s](Options& o) {
         o.class_bytes = &s.bytes;
         o.num_classes = 1;
       })},
      {"pyrt_arena_create", "misaligned classes", create([&s](Options& o) {
         o.class_bytes = misaligned(&s.bytes);
         o.num_classes = 1;
       })},
      {"pyrt_arena_destroy", "null", [] { return pyrt_arena_destroy(nullptr, 1); }, PYRT_OK},
      {"pyrt_arena_destroy", "objects out", [&s] { return pyrt_arena_destroy(s.arena, 0); },
       PYRT_ESTATE},
      {"pyrt_arena_acquire", "null", [&s] { return pyrt_arena_acquire(nullptr, 1, &s.out); }},
      {"pyrt_arena_acquire", "null out", [&s] { return pyrt_arena_acquire(s.arena, 1, nullptr); }},
      {"pyrt_arena_acquire", "zero", [&s] { return pyrt_arena_acquire(s.arena, 0, &s.out); }},
      {"pyrt_arena_acquire", "huge",
       [&s] { return pyrt_arena_acquire(s.arena, UINT64_MAX, &s.out); }},
      {"pyrt_arena_acquire", "the whole range, of which a unit is taken",
       [&s] { return pyrt_arena_acquire(s.arena, 16 << 20, &s.out); }, PYRT_EFULL},
      {"pyrt_arena_release", "null", [&s] { return pyrt_arena_release(nullptr, s.object); }},
      {"pyrt_arena_release", "null object", [&s] { return pyrt_arena_release(s.arena, nullptr); }},
      {"pyrt_arena_release", "foreign", [&s] { return pyrt_arena_release(s.arena, &s); }},
      {"pyrt_arena_release", "misaligned",
       [&s] { return pyrt_arena_release(s.arena, misaligned(static_cast<char*>(s.object))); }},
      {"pyrt_arena_release", "twice", [&s] { return pyrt_arena_release(s.arena, s.released); },
       PYRT_ESTATE},
      {"pyrt_arena_release", "no slab there",
       [&s] { return pyrt_arena_release(s.arena, static_cast<char*>(s.object) + (8 << 20)); }},
      {"pyrt_arena_size_of", "null",
       [&s] { return pyrt_arena_size_of(nullptr, s.object, &s.bytes); }},
      {"pyrt_arena_size_of", "null out",
       [&s] { return pyrt_arena_size_of(s.arena, s.object, nullptr); }},
      {"pyrt_arena_size_of", "foreign", [&s] { return pyrt_arena_size_of(s.arena, &s, &s.bytes); }},
      {"pyrt_arena_trim", "null", [] { return pyrt_arena_trim(nullptr, nullptr); }},
      {"pyrt_arena_trim", "null out", [&s] { return pyrt_arena_trim(s.arena, nullptr); }, PYRT_OK},
      {"pyrt_arena_get_statistics", "null",
       [] { return pyrt_arena_get_statistics(nullptr, nullptr); }},
      {"pyrt_arena_get_statistics", "null out",
       [&s] { return pyrt_arena_get_statistics(s.arena, nullptr); }},
      {"pyrt_arena_check", "null", [] { return pyrt_arena_check(nullptr); }},
  };
}

TEST(AbiAbuse, Pool) {
  PoolState state;
  BudgetState budget;
  ArenaState arena;
  std::vector<Row> rows = pool_rows(state);
  run(rows);
  for (const std::vector<Row>& more : {budget_rows(budget), arena_rows(arena)}) {
    run(more);
    rows.insert(rows.end(), more.begin(), more.end());
  }
  expect_covered("pool.h", rows);
  pyrt_pool_statistics statistics;
  statistics.struct_size = sizeof statistics;
  ASSERT_EQ(pyrt_pool_get_statistics(state.pool, &statistics), PYRT_OK);
  EXPECT_EQ(statistics.in_use, 1u) << "nothing was lost or handed out by a refused call";
}

// A set of two nodes that this machine may not have, with an object out.
class NodeState {
 public:
  NodeState() {
    pyrt_pool_options_init(&options);
    options.object_bytes = 64;
    options.capacity = 100;
    EXPECT_EQ(pyrt_node_pools_create(&options, nodes, 2, nullptr, nullptr, &set), PYRT_OK);
    mine = pyrt_node_pools_get(set);
  }
  ~NodeState() {
    EXPECT_EQ(pyrt_node_pools_put(set, mine), PYRT_OK);
    EXPECT_EQ(pyrt_node_pools_destroy(set, 0), PYRT_OK) << pyrt_last_error();
    EXPECT_EQ(made, nullptr) << "an out-pointer is written on success only";
  }

  int32_t nodes[2] = {0, 1};
  pyrt_pool_options options;
  pyrt_node_pools* set = nullptr;
  void* mine = nullptr;
  void* objects[300] = {};
  pyrt_node_pools* made = nullptr;
};

std::vector<Row> node_rows(NodeState& s) {
  const auto create = [&s](const int32_t* nodes, uint32_t n) {
    return pyrt_node_pools_create(&s.options, nodes, n, nullptr, nullptr, &s.made);
  };
  static const int32_t twice[] = {3, 3}, below[] = {-1}, beyond[] = {64};
  return {
      {"pyrt_nodes", "no room", [] { return ok_if(pyrt_nodes(nullptr, 0) >= 1); }, PYRT_OK},
      {"pyrt_current_node", "", [] { return ok_if(pyrt_current_node() >= 0); }, PYRT_OK},
      {"pyrt_node_pools_create", "null options",
       [&] { return pyrt_node_pools_create(nullptr, s.nodes, 2, nullptr, nullptr, &s.made); }},
      {"pyrt_node_pools_create", "null out",
       [&] { return pyrt_node_pools_create(&s.options, s.nodes, 2, nullptr, nullptr, nullptr); }},
      {"pyrt_node_pools_create", "null nodes", [=] { return create(nullptr, 2); }},
      {"pyrt_node_pools_create", "misaligned nodes",
       [=, &s] { return create(misaligned(s.nodes), 1); }},
      {"pyrt_node_pools_create", "too many", [=, &s] { return create(s.nodes, 65); }},
      {"pyrt_node_pools_create", "twice", [=] { return create(twice, 2); }},
      {"pyrt_node_pools_create", "below", [=] { return create(below, 1); }},
      {"pyrt_node_pools_create", "beyond", [=] { return create(beyond, 1); }},
      {"pyrt_node_pools_create", "a pool's option",
       [&] {
         pyrt_pool_options options = s.options;
         options.capacity = 0;
         return pyrt_node_pools_create(&options, s.nodes, 2, nullptr, nullptr, &s.made);
       }},
      {"pyrt_node_pools_create", "state checks",
       [&] {
         pyrt_pool_options options = s.options;
         options.check = PYRT_CHECK_STATE;
         return pyrt_node_pools_create(&options, s.nodes, 2, nullptr, nullptr, &s.made);
       },
       PYRT_EUNSUPPORTED},
      {"pyrt_node_pools_destroy", "null", [] { return pyrt_node_pools_destroy(nullptr, 0); },
       PYRT_OK},
      {"pyrt_node_pools_destroy", "objects out", [&] { return pyrt_node_pools_destroy(s.set, 0); },
       PYRT_ESTATE},
      {"pyrt_node_pools_get", "null", [] { return ok_if(pyrt_node_pools_get(nullptr) == nullptr); },
       PYRT_OK},
      {"pyrt_node_pools_put", "null", [&] { return pyrt_node_pools_put(nullptr, s.mine); }},
      {"pyrt_node_pools_put", "null object", [&] { return pyrt_node_pools_put(s.set, nullptr); }},
      {"pyrt_node_pools_put", "misaligned",
       [&] { return pyrt_node_pools_put(s.set, static_cast<char*>(s.mine) + 1); }},
      {"pyrt_node_pools_put", "foreign", [&] { return pyrt_node_pools_put(s.set, &s); }},
      {"pyrt_node_pools_get_bulk", "null",
       [&] { return pyrt_node_pools_get_bulk(nullptr, s.objects, 1); }},
      {"pyrt_node_pools_get_bulk", "null out",
       [&] { return pyrt_node_pools_get_bulk(s.set, nullptr, 1); }},
      {"pyrt_node_pools_get_bulk", "too many",
       [&] { return pyrt_node_pools_get_bulk(s.set, s.objects, 200); }, PYRT_EFULL},
      {"pyrt_node_pools_get_bulk", "none",
       [&] { return pyrt_node_pools_get_bulk(s.set, nullptr, 0); }, PYRT_OK},
      {"pyrt_node_pools_put_bulk", "null",
       [&] { return pyrt_node_pools_put_bulk(nullptr, &s.mine, 1); }},
      {"pyrt_node_pools_put_bulk", "null objects",
       [&] { return pyrt_node_pools_put_bulk(s.set, nullptr, 1); }},
      {"pyrt_node_pools_put_bulk", "misaligned list",
       [&] { return pyrt_node_pools_put_bulk(s.set, misaligned(&s.mine), 1); }},
      {"pyrt_node_pools_put_bulk", "one foreign",
       [&] {
         void* list[] = {s.mine, &s};
         return pyrt_node_pools_put_bulk(s.set, list, 2);
       }},
      {"pyrt_node_pools_put_bulk", "more than there are",
       [&] {
         std::fill(std::begin(s.objects), std::end(s.objects), s.mine);
         return pyrt_node_pools_put_bulk(s.set, s.objects, 300);
       }},
      {"pyrt_node_pools_home", "null",
       [] { return ok_if(pyrt_node_pools_home(nullptr) == nullptr); }, PYRT_OK},
      {"pyrt_node_pools_at", "null",
       [] { return ok_if(pyrt_node_pools_at(nullptr, 0) == nullptr); }, PYRT_OK},
      {"pyrt_node_pools_at", "beyond",
       [&] { return ok_if(pyrt_node_pools_at(s.set, 2) == nullptr); }, PYRT_OK},
      {"pyrt_node_pools_borrowed", "null",
       [] { return ok_if(pyrt_node_pools_borrowed(nullptr) == 0); }, PYRT_OK},
  };
}

TEST(AbiAbuse, NodePools) {
  NodeState state;
  const std::vector<Row> rows = node_rows(state);
  run(rows);
  expect_covered("pool_nodes.h", rows);
}

TEST(AbiAbuse, AForkedChildOfAnExcludedPoolIsRefused) {
  PoolState state;
  pyrt_pool_options options = state.options;
  options.fork = PYRT_FORK_EXCLUDE;
  pyrt_pool* pool = nullptr;
  ASSERT_EQ(pyrt_pool_create(&options, &pool), PYRT_OK);
  void* object = pyrt_pool_get(pool);
  const pid_t child = fork();
  if (child == 0) {
    uint32_t index = 0;
    void* out = nullptr;
    const bool refused = pyrt_pool_get(pool) == nullptr &&
                         pyrt_pool_put(pool, object) == PYRT_ESTATE &&
                         pyrt_pool_get_bulk(pool, &out, 1) == PYRT_ESTATE &&
                         pyrt_pool_put_bulk(pool, &object, 1) == PYRT_ESTATE &&
                         pyrt_pool_get_indices(pool, &index, 1) == PYRT_ESTATE;
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(pyrt_pool_put(pool, object), PYRT_OK);
  EXPECT_EQ(pyrt_pool_destroy(pool, 0), PYRT_OK);
}

}  // namespace
