// Operators: SIMD levels agree bit for bit, threads change nothing, and the ABI refuses what is out
// of range. Numerical correctness is tested against float64 in tests/test_ops.py.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/half.hpp"
#include "base/thread_pool.hpp"
#include "ops/kernels.hpp"
#include "ops/ops.hpp"

namespace pyruntime::ops {
namespace {

using Floats = std::vector<float>;

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  Floats floats(int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    Floats out(static_cast<size_t>(count));
    for (float& x : out) x = normal(engine_);
    return out;
  }
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }

 private:
  std::mt19937 engine_;
};

bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<simd::Level> levels() {
  std::vector<simd::Level> out;
  for (const simd::Level level : {simd::Level::avx2, simd::Level::avx512}) {
    if (level <= simd::detected()) out.push_back(level);
  }
  return out;
}

class Levels : public ::testing::TestWithParam<int> {};

TEST_P(Levels, AgreeWithScalarBitForBit) {
  Random random(static_cast<uint32_t>(GetParam()));
  const Kernels& scalar = kernels(simd::Level::scalar);
  const int64_t n = random.between(1, 9), k = random.between(1, 90), m = random.between(1, 21);
  const Floats x = random.floats(n * k), w = random.floats(m * k), bias = random.floats(m);
  const Floats wide = random.floats(n * k, 40.0f);
  for (const simd::Level level : levels()) {
    const Kernels& kernel = kernels(level);
    Floats want(static_cast<size_t>(n * m)), got(want.size());
    scalar.linear(x.data(), k, n, w.data(), k, m, k, bias.data(), want.data(), m);
    kernel.linear(x.data(), k, n, w.data(), k, m, k, bias.data(), got.data(), m);
    EXPECT_TRUE(same(want, got)) << "linear " << n << " " << k << " " << m;

    want.resize(x.size());
    got.resize(x.size());
    scalar.rms_norm(x.data(), n * k, wide.data(), 1e-6f, want.data());
    kernel.rms_norm(x.data(), n * k, wide.data(), 1e-6f, got.data());
    EXPECT_TRUE(same(want, got)) << "rms_norm";
    scalar.silu_mul(wide.data(), x.data(), n * k, want.data());
    kernel.silu_mul(wide.data(), x.data(), n * k, got.data());
    EXPECT_TRUE(same(want, got)) << "silu_mul";
    want = got = wide;
    EXPECT_EQ(scalar.max_of(want.data(), n * k), kernel.max_of(got.data(), n * k));
    EXPECT_EQ(scalar.sum_exp(want.data(), n * k, 3.0f), kernel.sum_exp(got.data(), n * k, 3.0f));
    EXPECT_EQ(scalar.exp_sum(want.data(), n * k, 3.0f), kernel.exp_sum(got.data(), n * k, 3.0f));
    EXPECT_TRUE(same(want, got)) << "exp_sum";

    Floats want_scores(static_cast<size_t>(n)), got_scores(want_scores.size());
    scalar.dot_run(w.data(), x.data(), k, n, k, 0.3f, want_scores.data());
    kernel.dot_run(w.data(), x.data(), k, n, k, 0.3f, got_scores.data());
    EXPECT_TRUE(same(want_scores, got_scores)) << "dot_run";
    Floats want_out = Floats(w.begin(), w.begin() + k), got_out = want_out;
    scalar.weighted_run(want_scores.data(), x.data(), k, n, k, want_out.data());
    kernel.weighted_run(want_scores.data(), x.data(), k, n, k, got_out.data());
    EXPECT_TRUE(same(want_out, got_out)) << "weighted_run";
    std::vector<uint16_t> halves(x.size());
    std::transform(x.begin(), x.end(), halves.begin(), base::to_half);
    scalar.dot_run_half(w.data(), halves.data(), k, n, k, 0.3f, want_scores.data());
    kernel.dot_run_half(w.data(), halves.data(), k, n, k, 0.3f, got_scores.data());
    EXPECT_TRUE(same(want_scores, got_scores)) << "dot_run_half";
    scalar.weighted_run_half(want_scores.data(), halves.data(), k, n, k, want_out.data());
    kernel.weighted_run_half(want_scores.data(), halves.data(), k, n, k, got_out.data());
    EXPECT_TRUE(same(want_out, got_out)) << "weighted_run_half";
    const float* rows[] = {x.data(), nullptr, w.data()};
    const float factors[] = {0.7f, 9.0f, -1.3f};
    scalar.combine(rows, factors, 3, k, want_out.data());
    kernel.combine(rows, factors, 3, k, got_out.data());
    EXPECT_TRUE(same(want_out, got_out)) << "combine";
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Levels, ::testing::Range(0, 60));

// One call of everything, for comparing thread counts.
Floats everything() {
  Random random(7);
  Floats all;
  const auto keep = [&all](const Floats& part) { all.insert(all.end(), part.begin(), part.end()); };
  constexpr int64_t n = 70, d = 256, f = 192, experts = 6, top_k = 3, vocab = 3000;
  const Floats x = random.floats(n * d);
  Floats out(static_cast<size_t>(n * vocab));
  EXPECT_EQ(PYRT_OK, pyrt_ops_linear(x.data(), n, d, d, random.floats(vocab * d).data(), vocab, d,
                                     nullptr, out.data(), vocab));
  keep(out);
  Floats shares(static_cast<size_t>(n * top_k));
  std::vector<int32_t> ids(shares.size());
  EXPECT_EQ(PYRT_OK, pyrt_ops_router(random.floats(n * experts).data(), n, experts, top_k,
                                     PYRT_ROUTER_SOFTMAX, 1, ids.data(), shares.data()));
  Floats moe(static_cast<size_t>(n * d));
  EXPECT_EQ(
      PYRT_OK,
      pyrt_ops_moe_ffn(x.data(), n, d, ids.data(), shares.data(), top_k,
                       random.floats(experts * f * d).data(), random.floats(experts * f * d).data(),
                       random.floats(experts * f * d).data(), experts, f, moe.data()));
  keep(moe);

  constexpr int64_t blocks = 64, block = 16, kv_heads = 2, heads = 4, head_dim = 48;
  Floats k = random.floats(blocks * block * kv_heads * head_dim),
         v = random.floats(blocks * block * kv_heads * head_dim);
  const pyrt_ops_kv_cache cache{sizeof(pyrt_ops_kv_cache),
                                PYRT_KV_FLOAT32,
                                k.data(),
                                v.data(),
                                blocks,
                                block,
                                kv_heads,
                                head_dim,
                                block * kv_heads * head_dim,
                                kv_heads * head_dim,
                                head_dim};
  const Floats q = random.floats(n * heads * head_dim);
  std::vector<int32_t> tables(static_cast<size_t>(blocks)), rows(n, 0), visible(n);
  for (size_t i = 0; i < tables.size(); ++i)
    tables[i] = static_cast<int32_t>(tables.size() - 1 - i);
  for (int64_t i = 0; i < n; ++i) visible[static_cast<size_t>(i)] = static_cast<int32_t>(14 * i);
  Floats attended(q.size());
  std::vector<uint8_t> above(static_cast<size_t>(n * blocks * block));
  pyrt_ops_attention call{};
  call.struct_size = sizeof call;
  call.heads = heads;
  call.q = q.data();
  call.n = n;
  call.tables = tables.data();
  call.num_tables = 1;
  call.table_stride = blocks;
  call.rows = rows.data();
  call.visible = visible.data();
  call.scale = 0.2f;
  call.alpha = 0.01f;
  call.above = above.data();
  call.above_stride = blocks * block;
  call.out = attended.data();
  EXPECT_EQ(PYRT_OK, pyrt_ops_paged_attention(&cache, &call));
  keep(attended);
  for (const uint8_t mark : above) all.push_back(mark);

  std::vector<pyrt_ops_sampling> sampling(n);
  for (int64_t i = 0; i < n; ++i) {
    pyrt_ops_sampling& s = sampling[static_cast<size_t>(i)];
    s = {};
    s.temperature = i % 3 == 0 ? 0.0f : 0.8f;
    s.top_p = i % 2 == 0 ? 0.9f : 0.0f;
    s.top_k = i % 5 == 0 ? 20 : 0;
    s.num_logprobs = static_cast<int32_t>(i % 4) - 1;
    s.position = i;
  }
  std::vector<int32_t> tokens(n), top_ids(n * PYRT_MAX_LOGPROBS, -7);
  Floats logprobs(n), top(n * PYRT_MAX_LOGPROBS, 0.0f);
  std::vector<uint8_t> status(n);
  EXPECT_EQ(PYRT_OK, pyrt_ops_sample(out.data(), n, vocab, sampling.data(), nullptr, nullptr,
                                     nullptr, nullptr, nullptr, nullptr, tokens.data(),
                                     logprobs.data(), top_ids.data(), top.data(), status.data()));
  for (const int32_t token : tokens) all.push_back(static_cast<float>(token));
  keep(top);
  return all;
}

TEST(Ops, ThreadsChangeNothing) {
  base::ThreadPool& pool = base::ThreadPool::process();
  const int size = pool.size();
  pool.resize(1);
  const Floats alone = everything();
  pool.resize(4);
  EXPECT_TRUE(same(alone, everything()));
  pool.resize(size);
}

TEST(Ops, NullPointersAndNegativeSizesAreRefused) {
  float x[4] = {}, out[4] = {9, 9, 9, 9};
  int32_t id = 0;
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_linear(nullptr, 1, 4, 4, x, 1, 4, nullptr, out, 1));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_linear(x, 1, 4, 4, nullptr, 1, 4, nullptr, out, 1));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_linear(x, 1, 4, 4, x, 1, 4, nullptr, nullptr, 1));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_linear(x, -1, 4, 4, x, 1, 4, nullptr, out, 1));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_linear(x, 2, 4, 3, x, 1, 4, nullptr, out, 1));
  EXPECT_EQ(PYRT_OK, pyrt_ops_linear(nullptr, 0, 4, 4, nullptr, 1, 4, nullptr, nullptr, 1));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_embedding(&id, 1, nullptr, 1, 4, out));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_embedding(&id, 1, x, 0, 4, out));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_rms_norm(x, 1, 0, x, 1e-5f, out));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_add(nullptr, x, 4));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_clamp(out, 4, 0.0f));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_clamp(out, 4, std::nanf("")));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_silu_mul(x, nullptr, 4, out));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_rope(out, 1, 1, 4, &id, x, x, 1, 3));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_router(x, 1, 4, 5, PYRT_ROUTER_SOFTMAX, 1, &id, out));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_router(x, 1, 4, 1, 7, 1, &id, out));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_kv_write(nullptr, nullptr, 0, x, x));
  EXPECT_EQ(PYRT_EINVAL, pyrt_ops_paged_attention(nullptr, nullptr));
  EXPECT_EQ(9.0f, out[0]);
}

// Random calls, mostly wrong ones: a sanitizer would see what the checks let through.
TEST(Ops, RandomCallsNeverReadOutside) {
  Random random(11);
  for (int i = 0; i < 4000; ++i) {
    const int64_t blocks = random.between(1, 4), block = random.between(1, 4);
    const int64_t kv_heads = random.between(1, 2), d = random.between(1, 20);
    Floats k = random.floats(blocks * block * kv_heads * d), v = k;
    pyrt_ops_kv_cache cache{
        sizeof(pyrt_ops_kv_cache), PYRT_KV_FLOAT32, k.data(), v.data(), blocks, block, kv_heads, d,
        block * kv_heads * d,      kv_heads * d,    d};
    const int64_t n = random.between(0, 3);
    std::vector<int64_t> slots;
    for (int64_t j = 0; j < n; ++j) slots.push_back(random.between(-2, blocks * block));
    const Floats fresh = random.floats(n * kv_heads * d + 1);
    const bool good = std::all_of(slots.begin(), slots.end(), [&](int64_t slot) {
      return slot >= -1 && slot < blocks * block;
    });
    EXPECT_EQ(good,
              pyrt_ops_kv_write(&cache, slots.data(), n, fresh.data(), fresh.data()) == PYRT_OK ||
                  n == 0);

    const int64_t stride = random.between(1, 4);
    std::vector<int32_t> tables, rows, visible;
    for (int64_t j = 0; j < 2 * stride; ++j) {
      tables.push_back(static_cast<int32_t>(random.between(-1, blocks)));
    }
    for (int64_t j = 0; j < n; ++j) {
      rows.push_back(static_cast<int32_t>(random.between(-1, 2)));
      visible.push_back(static_cast<int32_t>(random.between(-1, stride * block + 1)));
    }
    const int32_t heads = static_cast<int32_t>(random.between(0, 4));
    const Floats q = random.floats(n * heads * d + 1);
    Floats out(q.size());
    pyrt_ops_attention call{};
    call.struct_size = sizeof call;
    call.heads = heads;
    call.q = q.data();
    call.n = n;
    call.tables = tables.data();
    call.num_tables = 2;
    call.table_stride = stride;
    call.rows = rows.data();
    call.visible = visible.data();
    call.scale = 1.0f;
    call.window = static_cast<int32_t>(random.between(-1, 9));
    call.out = out.data();
    const pyrt_status status = pyrt_ops_paged_attention(&cache, &call);
    EXPECT_TRUE(status == PYRT_OK || status == PYRT_EINVAL);

    const int64_t experts = random.between(1, 5), top_k = random.between(1, 5);
    const int64_t f = random.between(1, 20);
    std::vector<int32_t> ids;
    for (int64_t j = 0; j < n * top_k; ++j) {
      ids.push_back(static_cast<int32_t>(random.between(-2, experts)));
    }
    const Floats weights = random.floats(n * top_k + 1), x = random.floats(n * d + 1);
    const Floats matrix = random.floats(experts * f * d);
    Floats y(x.size());
    pyrt_ops_moe_ffn(x.data(), n, d, ids.data(), weights.data(), top_k, matrix.data(),
                     matrix.data(), matrix.data(), experts, f, y.data());

    const int64_t vocab = random.between(1, 40);
    Floats logits = random.floats(n * vocab + 1);
    std::vector<pyrt_ops_sampling> sampling(static_cast<size_t>(n) + 1);
    std::vector<int64_t> offsets{0}, prompts;
    std::vector<int32_t> history;
    for (int64_t j = 0; j < n; ++j) {
      pyrt_ops_sampling& s = sampling[static_cast<size_t>(j)];
      s.temperature = static_cast<float>(random.between(-1, 3));
      s.top_p = static_cast<float>(random.between(0, 4)) * 0.3f;
      s.top_k = static_cast<int32_t>(random.between(0, 50));
      s.min_p = static_cast<float>(random.between(0, 2)) * 0.3f;
      s.num_logprobs = static_cast<int32_t>(random.between(-1, 21));
      s.repetition_penalty = static_cast<float>(random.between(0, 2));
      s.frequency_penalty = static_cast<float>(random.between(-1, 1));
      s.seed = static_cast<uint64_t>(random.between(0, 99));
      const int64_t length = random.between(0, 6);
      for (int64_t t = 0; t < length; ++t) {
        history.push_back(static_cast<int32_t>(random.between(i % 4 == 0 ? -1 : 0, vocab - 1)));
      }
      offsets.push_back(static_cast<int64_t>(history.size()));
      prompts.push_back(random.between(0, length));
    }
    history.push_back(0);
    const Floats biases = random.floats(static_cast<int64_t>(history.size()));
    std::vector<int32_t> tokens(static_cast<size_t>(n) + 1),
        top_ids(static_cast<size_t>(n + 1) * PYRT_MAX_LOGPROBS);
    Floats logprobs(tokens.size()), top(top_ids.size());
    std::vector<uint8_t> state(tokens.size());
    const pyrt_status sampled =
        pyrt_ops_sample(logits.data(), n, vocab, sampling.data(), offsets.data(), history.data(),
                        biases.data(), offsets.data(), history.data(), prompts.data(),
                        tokens.data(), logprobs.data(), top_ids.data(), top.data(), state.data());
    if (sampled == PYRT_OK) {
      for (int64_t j = 0; j < n; ++j) {
        EXPECT_LT(tokens[static_cast<size_t>(j)], vocab);
        EXPECT_EQ(tokens[static_cast<size_t>(j)] < 0, state[static_cast<size_t>(j)] != 0);
      }
    }
  }
}

}  // namespace
}  // namespace pyruntime::ops
