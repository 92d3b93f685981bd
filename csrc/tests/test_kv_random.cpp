// Random programs over the block pool: invariants hold, and failed plans leave no trace.
#include <cstring>

#include "support/kv.hpp"

namespace {

using namespace pyruntime;
using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

TEST(KvRandom, ProgramsKeepEveryInvariant) {
  struct Case {
    uint32_t blocks, window, second, run;
    Policy policy;
  };
  const Case cases[] = {{24, 0, 0, 1, Policy::lru},  {24, 0, 0, 16, Policy::lru},
                        {48, 0, 0, 4, Policy::slru}, {24, 8, 0, 4, Policy::lru},
                        {32, 0, 12, 8, Policy::lru}, {80, 0, 0, 16, Policy::score}};
  Scored scored;
  for (const Case& c : cases) {
    Options o = options(c.blocks, 4, c.window);
    if (c.second != 0) o.groups.push_back({c.blocks, c.second});
    o.run_blocks = c.run;
    o.max_seqs = 24;
    o.num_layers = 2;
    o.event_capacity = 64;
    Program program(o, 7 + c.blocks + c.run);
    program.pool.set_policy(c.policy, c.policy == Policy::score ? prefer_even_blocks : nullptr,
                            &scored);
    for (int i = 0; i < 1500; ++i) {
      SCOPED_TRACE(i);
      program.step();
      program.pool.check();
      if (testing::Test::HasFatalFailure()) return;
    }
    EXPECT_GT(program.done, 100u);
    EXPECT_GT(program.refused, 0u);
    EXPECT_GT(program.batched, 20u);
  }
}

TEST(KvRandom, FailuresInjectedIntoPlansLeaveNoTrace) {
  Options o = options(32);
  o.groups.push_back({24, 12});
  o.max_seqs = 24;
  Program program(o, 99);
  program.inject = true;
  for (int i = 0; i < 1500; ++i) {
    SCOPED_TRACE(i);
    program.step();
    if (testing::Test::HasFatalFailure()) return;
  }
  program.pool.check();
  EXPECT_GT(program.injected, 1000u);
}

// Equal keys cost no correctness, only time: a test that counts them.
TEST(KvIndex, DifferentBlocksHaveDifferentKeys) {
  const Index index(16, 1);
  for (const uint32_t size : {1u, 4u, 16u, 40u}) {
    std::vector<uint64_t> keys;
    for (const char* salt : {"", "a", "0123456789"}) {
      for (int32_t first = 0; first < 500; ++first) {
        Tokens tokens(2 * size, 7);
        tokens[0] = first;
        uint64_t both[2];
        index.keys(index.root_key(salt, std::strlen(salt)), tokens.data(), size, 2, both);
        keys.insert(keys.end(), both, both + 2);
      }
    }
    std::sort(keys.begin(), keys.end());
    EXPECT_EQ(std::adjacent_find(keys.begin(), keys.end()), keys.end()) << size;
    std::vector<uint32_t> low;
    for (const uint64_t key : keys) low.push_back(static_cast<uint32_t>(key) % 65536);
    std::sort(low.begin(), low.end());
    // 3000 of 65536: 2932 distinct ones are to be expected, with a deviation of 8.
    EXPECT_GT(std::unique(low.begin(), low.end()) - low.begin(), 2870) << size;
  }
}

}  // namespace
