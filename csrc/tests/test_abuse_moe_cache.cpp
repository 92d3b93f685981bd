// Bad input at every entry of moe_cache.h; see support/abuse.hpp.
#include "tests/support/abuse.hpp"
#include "tests/support/moe_store.hpp"

using namespace pyruntime::abuse;
using pyruntime::moe::SmallStore;

namespace {

struct State {
  State() {
    EXPECT_EQ(pyrt_moe_store_open(small.path().c_str(), &store), PYRT_OK);
    options.struct_size = sizeof options;
    options.limit_bytes = uint64_t{64} << 20;
    options.threads = 1;
    EXPECT_EQ(pyrt_moe_cache_create(store, &options, &cache), PYRT_OK);
    statistics.struct_size = sizeof statistics;
  }
  ~State() {
    pyrt_moe_cache_destroy(cache);
    pyrt_moe_store_close(store);
  }
  SmallStore small;
  pyrt_moe_store* store = nullptr;
  pyrt_moe_cache_options options{};
  pyrt_moe_cache* cache = nullptr;
  pyrt_moe_cache_statistics statistics{};
  std::vector<float> x = std::vector<float>(2 * SmallStore::kHidden), out = x;
  float weights[4] = {1, 1, 1, 1};
  int32_t ids[4] = {0, 1, 2, 3};
  uint8_t levels[4] = {};
  int64_t counts[4] = {1, 1, 0, 2};
  int32_t resident[2] = {0, 0}, planes[8] = {0, 0, 0, 1, 1, 0, 1, 1};
  double seconds[2] = {1, 1}, makespan = 0;
  int64_t num_planes = 0;
  uint64_t bytes = 0;
};

std::vector<Row> rows(State& s) {
  const auto create = [&s](auto change) {
    return [&s, change] {
      pyrt_moe_cache_options options = s.options;
      change(options);
      pyrt_moe_cache* cache = nullptr;
      const pyrt_status status = pyrt_moe_cache_create(s.store, &options, &cache);
      EXPECT_EQ(cache, nullptr);
      return status;
    };
  };
  using O = pyrt_moe_cache_options;
  const auto ffn = [&s](int64_t layer, int64_t n, int64_t k, int32_t id, uint8_t level) {
    return [&s, layer, n, k, id, level] {
      s.ids[0] = id;
      s.levels[0] = level;
      return pyrt_moe_cache_ffn(s.cache, layer, s.x.data(), n, s.ids, s.weights, k, s.levels, 0,
                                nullptr, s.out.data(), nullptr);
    };
  };
  const auto plan = [&s](int32_t order, int64_t experts, int32_t levels) {
    return [&s, order, experts, levels] {
      return pyrt_moe_plan(order, experts, levels, s.counts, s.resident, s.seconds, s.seconds,
                           s.planes, &s.num_planes, nullptr);
    };
  };
  return {
      {"pyrt_moe_cache_create", "null store",
       [&] { return pyrt_moe_cache_create(nullptr, &s.options, &s.cache); }},
      {"pyrt_moe_cache_create", "null options",
       [&] { return pyrt_moe_cache_create(s.store, nullptr, &s.cache); }},
      {"pyrt_moe_cache_create", "null out",
       [&] { return pyrt_moe_cache_create(s.store, &s.options, nullptr); }},
      {"pyrt_moe_cache_create", "struct_size", create([](O& o) { o.struct_size = 8; })},
      {"pyrt_moe_cache_create", "no threads", create([](O& o) { o.threads = 0; })},
      {"pyrt_moe_cache_create", "threads", create([](O& o) { o.threads = 1 << 30; })},
      {"pyrt_moe_cache_create", "floor", create([](O& o) { o.floor = -1; })},
      {"pyrt_moe_cache_create", "order", create([](O& o) { o.order = 3; })},
      {"pyrt_moe_cache_create", "no memory", create([](O& o) { o.limit_bytes = 0; }), PYRT_EFULL},
      {"pyrt_moe_cache_destroy", "null",
       [] {
         pyrt_moe_cache_destroy(nullptr);
         return PYRT_OK;
       },
       PYRT_OK},
      {"pyrt_moe_cache_ffn", "null",
       [&] {
         return pyrt_moe_cache_ffn(nullptr, 0, s.x.data(), 1, s.ids, s.weights, 2, s.levels, 0,
                                   nullptr, s.out.data(), nullptr);
       }},
      {"pyrt_moe_cache_ffn", "null x",
       [&] {
         return pyrt_moe_cache_ffn(s.cache, 0, nullptr, 1, s.ids, s.weights, 2, s.levels, 0,
                                   nullptr, s.out.data(), nullptr);
       }},
      {"pyrt_moe_cache_ffn", "misaligned ids",
       [&] {
         return pyrt_moe_cache_ffn(s.cache, 0, s.x.data(), 1, misaligned(s.ids), s.weights, 2,
                                   s.levels, 0, nullptr, s.out.data(), nullptr);
       }},
      {"pyrt_moe_cache_ffn", "null out",
       [&] {
         return pyrt_moe_cache_ffn(s.cache, 0, s.x.data(), 1, s.ids, s.weights, 2, s.levels, 0,
                                   nullptr, nullptr, nullptr);
       }},
      {"pyrt_moe_cache_ffn", "layer", ffn(2, 1, 2, 0, 0)},
      {"pyrt_moe_cache_ffn", "layer below", ffn(-1, 1, 2, 0, 0)},
      {"pyrt_moe_cache_ffn", "n", ffn(0, -1, 2, 0, 0)},
      {"pyrt_moe_cache_ffn", "huge", ffn(0, kHuge, 2, 0, 0)},
      {"pyrt_moe_cache_ffn", "top_k", ffn(0, 1, 0, 0, 0)},
      {"pyrt_moe_cache_ffn", "id", ffn(0, 1, 2, 6, 0)},
      {"pyrt_moe_cache_ffn", "id below", ffn(0, 1, 2, -2, 0)},
      {"pyrt_moe_cache_ffn", "level", ffn(0, 1, 2, 0, 3)},
      {"pyrt_moe_cache_ffn", "no tokens", ffn(0, 0, 2, 0, 0), PYRT_OK},
      {"pyrt_moe_cache_ffn", "right", ffn(0, 2, 2, 0, 2), PYRT_OK},
      {"pyrt_moe_cache_prefetch", "null",
       [&] { return pyrt_moe_cache_prefetch(nullptr, 0, s.ids, 1, 0); }},
      {"pyrt_moe_cache_prefetch", "null experts",
       [&] { return pyrt_moe_cache_prefetch(s.cache, 0, nullptr, 1, 0); }},
      {"pyrt_moe_cache_prefetch", "count",
       [&] { return pyrt_moe_cache_prefetch(s.cache, 0, s.ids, kHuge, 0); }},
      {"pyrt_moe_cache_prefetch", "level",
       [&] { return pyrt_moe_cache_prefetch(s.cache, 0, s.ids, 1, -1); }},
      {"pyrt_moe_cache_missing", "null",
       [&] { return pyrt_moe_cache_missing(nullptr, 0, s.ids, 1, 0, &s.bytes); }},
      {"pyrt_moe_cache_missing", "null out",
       [&] { return pyrt_moe_cache_missing(s.cache, 0, s.ids, 1, 0, nullptr); }},
      {"pyrt_moe_cache_missing", "level",
       [&] { return pyrt_moe_cache_missing(s.cache, 0, s.ids, 1, 1 << 20, &s.bytes); }},
      {"pyrt_moe_cache_missing", "layer",
       [&] { return pyrt_moe_cache_missing(s.cache, 77, s.ids, 1, 0, &s.bytes); }},
      {"pyrt_moe_cache_shrink", "null",
       [&] { return pyrt_moe_cache_shrink(nullptr, 0, &s.bytes); }},
      {"pyrt_moe_cache_drain", "null", [] { return pyrt_moe_cache_drain(nullptr); }},
      {"pyrt_moe_cache_get_statistics", "null",
       [&] { return pyrt_moe_cache_get_statistics(nullptr, &s.statistics); }},
      {"pyrt_moe_cache_get_statistics", "null out",
       [&] { return pyrt_moe_cache_get_statistics(s.cache, nullptr); }},
      {"pyrt_moe_cache_check", "null", [] { return pyrt_moe_cache_check(nullptr); }},
      {"pyrt_moe_cache_check", "right", [&] { return pyrt_moe_cache_check(s.cache); }, PYRT_OK},
      {"pyrt_moe_plan", "order", plan(3, 2, 2)},
      {"pyrt_moe_plan", "experts", plan(0, 0, 2)},
      {"pyrt_moe_plan", "huge", plan(0, kHuge, 2)},
      {"pyrt_moe_plan", "levels", plan(0, 2, 5)},
      {"pyrt_moe_plan", "right", plan(0, 2, 2), PYRT_OK},
      {"pyrt_moe_plan", "null",
       [&] {
         return pyrt_moe_plan(0, 2, 2, nullptr, s.resident, s.seconds, s.seconds, s.planes,
                              &s.num_planes, nullptr);
       }},
      {"pyrt_moe_plan", "counts",
       [&] {
         const int64_t counts[] = {-1, 0, 0, 0};
         return pyrt_moe_plan(0, 2, 2, counts, s.resident, s.seconds, s.seconds, s.planes,
                              &s.num_planes, nullptr);
       }},
      {"pyrt_moe_makespan", "null",
       [&] {
         return pyrt_moe_makespan(2, 2, s.counts, s.resident, s.seconds, s.seconds, nullptr, 4,
                                  &s.makespan);
       }},
      {"pyrt_moe_makespan", "too many",
       [&] {
         return pyrt_moe_makespan(2, 2, s.counts, s.resident, s.seconds, s.seconds, s.planes, kHuge,
                                  &s.makespan);
       }},
      {"pyrt_moe_makespan", "incomplete",
       [&] {
         return pyrt_moe_makespan(2, 2, s.counts, s.resident, s.seconds, s.seconds, s.planes, 1,
                                  &s.makespan);
       }},
  };
}

TEST(AbuseMoeCache, EveryEntryRefusesWhatItCannotTake) {
  State s;
  const std::vector<Row> all = rows(s);
  run(all);
  expect_covered("moe_cache.h", all);
}

}  // namespace
