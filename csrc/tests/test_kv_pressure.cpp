// What a pool does in need: pins give way to what comes back, and a pool that is inconsistent
// shares nothing any more.
#include "capi/kv.hpp"
#include "support/kv.hpp"

namespace {

using namespace pyruntime;
using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

uint64_t statistic(pyrt_kv& pool, uint64_t pyrt_kv_statistics::* which) {
  pyrt_kv_statistics all{};
  all.struct_size = sizeof all;
  EXPECT_EQ(pyrt_kv_get_statistics(&pool, &all), PYRT_OK);
  return all.*which;
}

// 4 programs left 2 blocks each, pinned; the latest is 4.
std::vector<uint64_t> pin_programs(pyrt_kv& pool) {
  std::vector<uint64_t> pins;
  for (int program = 1; program <= 4; ++program) {
    SeqHandle seq;
    serve(pool, seq, prompt({10 * program, 10 * program + 1}));
    uint64_t pin = 0;
    EXPECT_EQ(pyrt_kv_pin(&pool, seq, INT64_MAX, program, &pin), PYRT_OK);
    EXPECT_NE(pin, 0u);
    pool.free({&seq, 1});
    pins.push_back(pin);
  }
  return pins;
}

TEST(KvPressure, ASequenceThatComesBackEndsAsFewPinsAsItNeeds) {
  pyrt_kv pool(options(12));
  pool.pins.set_cap(1);
  SeqHandle seq;
  serve(pool, seq, prompt({1, 2, 3, 4, 5}));
  pool.park(seq);
  const std::vector<uint64_t> pins = pin_programs(pool);
  SeqHandle other;
  serve(pool, other, prompt({77}));  // 3 are left, 5 are needed
  ASSERT_EQ(pyrt_kv_seq_unpark(&pool, seq), PYRT_OK);
  EXPECT_EQ(pool.pins.size(), 3u);
  EXPECT_EQ(statistic(pool, &pyrt_kv_statistics::pins_pressed), 1u);
  ASSERT_EQ(pyrt_kv_check(&pool), PYRT_OK);
  // One that has room, and one that has none without any pin, leave them all.
  pool.park(seq);
  ASSERT_EQ(pyrt_kv_seq_unpark(&pool, seq), PYRT_OK);
  EXPECT_EQ(pool.pins.size(), 3u);
  pool.park(seq);
  pool.pins.unpin(pins[0]);
  SeqHandle large;
  serve(pool, large, prompt({81, 82, 83, 84, 85, 86, 87}));  // 4 are pinned, none is left
  const uint64_t before = pool.state_hash() ^ pool.pins.hash();
  EXPECT_EQ(pyrt_kv_seq_unpark(&pool, seq), PYRT_EFULL);
  EXPECT_EQ(pool.state_hash() ^ pool.pins.hash(), before);
  ASSERT_EQ(pyrt_kv_check(&pool), PYRT_OK);
}

TEST(KvPressure, ADryStepMayCountPinsAsEnded) {
  pyrt_kv pool(options(12));
  pool.pins.set_cap(1);
  pin_programs(pool);
  const uint64_t before = pool.state_hash() ^ pool.pins.hash();
  pyrt_kv_ops ops{};
  ops.struct_size = sizeof ops;
  pyrt_kv_result result{};
  result.struct_size = sizeof result;
  ops.flags = PYRT_KV_DRY;
  ASSERT_EQ(pyrt_kv_step(&pool, &ops, &result), PYRT_OK);
  EXPECT_EQ(result.left[0], 4);
  ops.flags = PYRT_KV_DRY | PYRT_KV_PINS_END;
  ASSERT_EQ(pyrt_kv_step(&pool, &ops, &result), PYRT_OK);
  EXPECT_EQ(result.left[0], 12);
  EXPECT_EQ(pool.state_hash() ^ pool.pins.hash(), before);
}

TEST(KvPressure, APoolThatIsInconsistentSharesNothing) {
  pyrt_kv pool(options(12));
  SeqHandle seq;
  const Tokens tokens = prompt({1, 2, 3});
  serve(pool, seq, tokens);
  ASSERT_EQ(pyrt_kv_check(&pool), PYRT_OK);
  EXPECT_EQ(pool.match(0, tokens.data(), 12, nullptr).blocks, 2u);
  EXPECT_EQ(statistic(pool, &pyrt_kv_statistics::index_closed), 0u);
  Node& node = pool.node(pool.owner(0, 0));
  node.key ^= 1;
  EXPECT_EQ(pyrt_kv_check(&pool), PYRT_ECORRUPT);
  node.key ^= 1;
  EXPECT_EQ(statistic(pool, &pyrt_kv_statistics::index_closed), 1u);
  EXPECT_EQ(pool.match(0, tokens.data(), 12, nullptr).blocks, 0u);
  // Allocation goes on, and what was published before is let go in order.
  SeqHandle second;
  serve(pool, second, tokens);
  EXPECT_EQ(pool.published(second), 0u);
  pool.free({&seq, 1});
  pool.free({&second, 1});
  EXPECT_EQ(pool.available(0), 12u);
  SeqHandle large;
  serve(pool, large, prompt({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
  EXPECT_EQ(pyrt_kv_check(&pool), PYRT_OK);
  EXPECT_EQ(statistic(pool, &pyrt_kv_statistics::index_closed), 1u);  // for good
}

}  // namespace
