// Bad input at every entry of ops.h; see support/abuse.hpp.
#include <cmath>

#include "tests/support/abuse.hpp"

using namespace pyruntime::abuse;

namespace {

struct OpsState {
  OpsState() {
    cache.struct_size = sizeof cache;
    cache.k = f;
    cache.v = f;
    cache.num_blocks = cache.block_size = cache.kv_heads = cache.head_dim = 2;
    cache.block_stride = 8;
    cache.slot_stride = 4;
    cache.head_stride = 2;
    attention.struct_size = sizeof attention;
    attention.heads = 2;
    attention.q = f;
    attention.n = 1;
    attention.tables = ids;
    attention.num_tables = 1;
    attention.table_stride = 2;
    attention.rows = ids;
    attention.visible = ids;
    attention.scale = 1;
    attention.out = out;
    sampling.num_logprobs = -1;
  }
  float f[64] = {};
  float out[64] = {};
  int32_t ids[64] = {};
  int64_t slots[8] = {};
  uint8_t status[8] = {};
  pyrt_ops_kv_cache cache{};
  pyrt_ops_attention attention{};
  pyrt_ops_sampling sampling{};
};

pyrt_status attend(OpsState& s,
                   const std::function<void(pyrt_ops_kv_cache&, pyrt_ops_attention&)>& change) {
  pyrt_ops_kv_cache cache = s.cache;
  pyrt_ops_attention attention = s.attention;
  change(cache, attention);
  return pyrt_ops_paged_attention(&cache, &attention);
}

pyrt_status sample(OpsState& s, const std::function<void(pyrt_ops_sampling&)>& change,
                   int64_t n = 1, int64_t vocab = 4) {
  pyrt_ops_sampling sampling = s.sampling;
  change(sampling);
  return pyrt_ops_sample(s.out, n, vocab, &sampling, nullptr, nullptr, nullptr, nullptr, nullptr,
                         nullptr, s.ids, s.f, nullptr, nullptr, s.status);
}

std::vector<Row> ops_rows(OpsState& s) {
  float* f = s.f;
  float* o = s.out;
  const int32_t* ids = s.ids;
  const auto linear = [=](const float* x, int64_t n, int64_t k, const float* w, int64_t m,
                          int64_t stride, float* out) {
    return pyrt_ops_linear(x, n, k, stride, w, m, stride, nullptr, out, m);
  };
  const auto attention = [&s](auto change) { return [&s, change] { return attend(s, change); }; };
  const auto sampled = [&s](auto change) { return [&s, change] { return sample(s, change); }; };
  using C = pyrt_ops_kv_cache;
  using A = pyrt_ops_attention;
  using S = pyrt_ops_sampling;
  static const int32_t kMinus[] = {-1, -2, -3, -4};
  static const int64_t kFar[] = {1 << 20};
  return {
      {"pyrt_ops_linear", "null x", [=] { return linear(nullptr, 1, 4, f, 4, 4, o); }},
      {"pyrt_ops_linear", "null weight", [=] { return linear(f, 1, 4, nullptr, 4, 4, o); }},
      {"pyrt_ops_linear", "null out", [=] { return linear(f, 1, 4, f, 4, 4, nullptr); }},
      {"pyrt_ops_linear", "misaligned", [=] { return linear(misaligned(f), 1, 4, f, 4, 4, o); }},
      {"pyrt_ops_linear", "negative n", [=] { return linear(f, -1, 4, f, 4, 4, o); }},
      {"pyrt_ops_linear", "zero k", [=] { return linear(f, 1, 0, f, 4, 4, o); }},
      {"pyrt_ops_linear", "short stride", [=] { return linear(f, 2, 4, f, 4, 3, o); }},
      {"pyrt_ops_linear", "huge n", [=] { return linear(f, kHuge, 4, f, 4, 4, o); }},
      {"pyrt_ops_linear", "huge k", [=] { return linear(f, 1, kHuge, f, 4, kHuge, o); }},
      {"pyrt_ops_linear", "huge m", [=] { return linear(f, 1, 4, f, kHuge, 4, o); }},
      {"pyrt_ops_linear", "nothing", [=] { return linear(nullptr, 0, 4, f, 4, 4, o); }, PYRT_OK},
      {"pyrt_ops_embedding", "null", [=] { return pyrt_ops_embedding(nullptr, 1, f, 4, 4, o); }},
      {"pyrt_ops_embedding", "zero d", [=] { return pyrt_ops_embedding(ids, 1, f, 4, 0, o); }},
      {"pyrt_ops_embedding", "no such row",
       [=] { return pyrt_ops_embedding(kMinus, 1, f, 4, 4, o); }},
      {"pyrt_ops_embedding", "huge", [=] { return pyrt_ops_embedding(ids, 1, f, kHuge, 4, o); }},
      {"pyrt_ops_rms_norm", "null", [=] { return pyrt_ops_rms_norm(f, 1, 4, nullptr, 0, o); }},
      {"pyrt_ops_rms_norm", "zero d", [=] { return pyrt_ops_rms_norm(f, 1, 0, f, 0, o); }},
      {"pyrt_ops_rms_norm", "huge", [=] { return pyrt_ops_rms_norm(f, kHuge, 4, f, 0, o); }},
      {"pyrt_ops_add", "null", [=] { return pyrt_ops_add(o, nullptr, 1); }},
      {"pyrt_ops_add", "negative", [=] { return pyrt_ops_add(o, f, -1); }},
      {"pyrt_ops_add", "huge", [=] { return pyrt_ops_add(o, f, kHuge); }},
      {"pyrt_ops_clamp", "null", [] { return pyrt_ops_clamp(nullptr, 1, 1); }},
      {"pyrt_ops_clamp", "limit 0", [=] { return pyrt_ops_clamp(o, 1, 0); }},
      {"pyrt_ops_clamp", "limit NaN", [=] { return pyrt_ops_clamp(o, 1, NAN); }},
      {"pyrt_ops_clamp", "huge", [=] { return pyrt_ops_clamp(o, kHuge, 1); }},
      {"pyrt_ops_silu_mul", "null", [=] { return pyrt_ops_silu_mul(f, nullptr, 1, o); }},
      {"pyrt_ops_silu_mul", "negative", [=] { return pyrt_ops_silu_mul(f, f, -1, o); }},
      {"pyrt_ops_silu_mul", "huge", [=] { return pyrt_ops_silu_mul(f, f, kHuge, o); }},
      {"pyrt_ops_rope", "null", [=] { return pyrt_ops_rope(o, 1, 1, 4, ids, nullptr, f, 4, 2); }},
      {"pyrt_ops_rope", "half over d", [=] { return pyrt_ops_rope(o, 1, 1, 4, ids, f, f, 4, 3); }},
      {"pyrt_ops_rope", "huge half",
       [=] { return pyrt_ops_rope(o, 1, 1, 4, ids, f, f, 4, kHuge); }},
      {"pyrt_ops_rope", "position", [=] { return pyrt_ops_rope(o, 1, 1, 4, kMinus, f, f, 4, 2); }},
      {"pyrt_ops_rope", "huge", [=] { return pyrt_ops_rope(o, 1, kHuge, 4, ids, f, f, 4, 2); }},
      {"pyrt_ops_kv_write", "null cache",
       [=, &s] { return pyrt_ops_kv_write(nullptr, s.slots, 1, f, f); }},
      {"pyrt_ops_kv_write", "null k",
       [=, &s] { return pyrt_ops_kv_write(&s.cache, s.slots, 1, nullptr, f); }},
      {"pyrt_ops_kv_write", "slot", [=, &s] { return pyrt_ops_kv_write(&s.cache, kFar, 1, f, f); }},
      {"pyrt_ops_kv_write", "huge",
       [=, &s] { return pyrt_ops_kv_write(&s.cache, s.slots, kHuge, f, f); }},
      {"pyrt_ops_paged_attention", "null",
       [&s] { return pyrt_ops_paged_attention(&s.cache, nullptr); }},
      {"pyrt_ops_paged_attention", "cache size", attention([](C& c, A&) { c.struct_size = 0; })},
      {"pyrt_ops_paged_attention", "dtype", attention([](C& c, A&) { c.dtype = 9; }),
       PYRT_EUNSUPPORTED},
      {"pyrt_ops_paged_attention", "misaligned halves", attention([](C& c, A&) {
         c.dtype = PYRT_KV_FLOAT16;
         c.v = static_cast<char*>(c.v) + 1;
       })},
      {"pyrt_ops_paged_attention", "null k", attention([](C& c, A&) { c.k = nullptr; })},
      {"pyrt_ops_paged_attention", "misaligned k",
       attention([](C& c, A&) { c.k = static_cast<char*>(c.k) + 1; })},
      {"pyrt_ops_paged_attention", "no blocks", attention([](C& c, A&) { c.num_blocks = 0; })},
      {"pyrt_ops_paged_attention", "huge blocks",
       attention([](C& c, A&) { c.num_blocks = kHuge; })},
      {"pyrt_ops_paged_attention", "stride", attention([](C& c, A&) { c.block_stride = -1; })},
      {"pyrt_ops_paged_attention", "struct_size", attention([](C&, A& a) { a.struct_size = 1; })},
      {"pyrt_ops_paged_attention", "heads", attention([](C&, A& a) { a.heads = 3; })},
      {"pyrt_ops_paged_attention", "window", attention([](C&, A& a) { a.window = -1; })},
      {"pyrt_ops_paged_attention", "no tables", attention([](C&, A& a) { a.num_tables = 0; })},
      {"pyrt_ops_paged_attention", "huge tables",
       attention([](C&, A& a) { a.table_stride = kHuge; })},
      {"pyrt_ops_paged_attention", "huge n", attention([](C&, A& a) { a.n = kHuge; })},
      {"pyrt_ops_paged_attention", "visible", attention([](C&, A& a) { a.visible = kMinus; })},
      {"pyrt_ops_paged_attention", "nothing", attention([](C&, A& a) { a.n = 0; }), PYRT_OK},
      {"pyrt_ops_router", "null",
       [=, &s] { return pyrt_ops_router(f, 1, 4, 2, 0, 0, s.ids, nullptr); }},
      {"pyrt_ops_router", "top_k", [=, &s] { return pyrt_ops_router(f, 1, 4, 5, 0, 0, s.ids, o); }},
      {"pyrt_ops_router", "experts",
       [=, &s] { return pyrt_ops_router(f, 1, 4097, 2, 0, 0, s.ids, o); }},
      {"pyrt_ops_router", "scoring",
       [=, &s] { return pyrt_ops_router(f, 1, 4, 2, 7, 0, s.ids, o); }},
      {"pyrt_ops_router", "huge",
       [=, &s] { return pyrt_ops_router(f, kHuge, 4, 2, 0, 0, s.ids, o); }},
      {"pyrt_ops_moe_ffn", "null",
       [=] { return pyrt_ops_moe_ffn(f, 1, 2, ids, f, 1, f, f, nullptr, 1, 2, o); }},
      {"pyrt_ops_moe_ffn", "expert",
       [=] { return pyrt_ops_moe_ffn(f, 1, 2, kMinus + 1, f, 1, f, f, f, 1, 2, o); }},
      {"pyrt_ops_moe_ffn", "huge f",
       [=] { return pyrt_ops_moe_ffn(f, 1, 2, ids, f, 1, f, f, f, 1, kHuge, o); }},
      {"pyrt_ops_moe_ffn", "huge n",
       [=] { return pyrt_ops_moe_ffn(f, kHuge, 2, ids, f, 1, f, f, f, 1, 2, o); }},
      {"pyrt_ops_sample", "vocab 0", [&s] { return sample(s, [](S&) {}, 1, 0); }},
      {"pyrt_ops_sample", "negative n", [&s] { return sample(s, [](S&) {}, -1); }},
      {"pyrt_ops_sample", "huge n", [&s] { return sample(s, [](S&) {}, kHuge); }},
      {"pyrt_ops_sample", "temperature", sampled([](S& p) { p.temperature = -1; })},
      {"pyrt_ops_sample", "temperature inf", sampled([](S& p) { p.temperature = INFINITY; })},
      {"pyrt_ops_sample", "temperature NaN", sampled([](S& p) { p.temperature = NAN; })},
      {"pyrt_ops_sample", "top_p", sampled([](S& p) { p.top_p = -1; })},
      {"pyrt_ops_sample", "min_p", sampled([](S& p) { p.min_p = 2; })},
      {"pyrt_ops_sample", "penalty", sampled([](S& p) { p.presence_penalty = NAN; })},
      {"pyrt_ops_sample", "top_k", sampled([](S& p) { p.top_k = -1; })},
      {"pyrt_ops_sample", "num_logprobs", sampled([](S& p) { p.num_logprobs = 21; })},
      {"pyrt_ops_sample", "nowhere for logprobs", sampled([](S& p) { p.num_logprobs = 5; })},
  };
}

TEST(AbiAbuse, Ops) {
  OpsState state;
  run(ops_rows(state));
  expect_covered("ops.h", ops_rows(state));
  for (const float value : state.out) EXPECT_EQ(value, 0.0f) << "outputs are unchanged";
}

}  // namespace
