// Random programs over the block pool: invariants hold, and failed plans leave no trace.
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

}  // namespace
