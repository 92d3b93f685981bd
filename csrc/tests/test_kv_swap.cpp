// The swap engine's rules one by one; stress_kv_swap.cpp is about its threads.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "base/status.hpp"
#include "kv/swap.hpp"
#include "tests/support/kv_blocks.hpp"

namespace kv = pyruntime::kv;
using kv::test::Layout;
using kv::test::Memory;

namespace {

pyrt_status status_of(const std::function<void()>& call) {
  try {
    call();
    return PYRT_OK;
  } catch (const pyruntime::Error& error) {
    return error.status();
  }
}

std::vector<kv::Completion> collected(kv::SwapEngine& engine) {
  EXPECT_TRUE(engine.wait_all());
  std::vector<kv::Completion> out(64);
  out.resize(engine.collect(out));
  engine.check();
  return out;
}

pyrt_status ended(kv::SwapEngine& engine, kv::Ticket ticket) {
  for (const kv::Completion& c : collected(engine)) {
    if (c.ticket == ticket) return c.status;
  }
  return PYRT_ENOENT;
}

TEST(KvCopy, StreamsAnyAlignmentAndSize) {
  std::mt19937 random(3);
  std::vector<char> from(5000);
  for (char& c : from) c = static_cast<char>(random());
  for (const size_t size : {0u, 1u, 31u, 127u, 511u, 512u, 640u, 4096u, 4200u}) {
    for (size_t shift = 0; shift < 65; shift += 13) {
      std::vector<char> to(5000, 7);
      kv::copy_kernels().stream(to.data() + shift, from.data() + 3, size);
      kv::stream_fence();
      EXPECT_EQ(std::memcmp(to.data() + shift, from.data() + 3, size), 0) << size << " " << shift;
      EXPECT_EQ(std::count(to.begin(), to.begin() + static_cast<long>(shift), 7),
                static_cast<long>(shift));
      EXPECT_EQ(to[shift + size], 7);
    }
  }
}

TEST(KvCopy, RunsGrowOnBothSidesOnly) {
  std::vector<kv::SwapRun> runs;
  for (const auto& [from, to] : {std::pair{4, 9}, {5, 10}, {6, 12}, {7, 13}, {9, 14}, {10, 15}}) {
    kv::add_run(runs, static_cast<kv::BlockId>(from), static_cast<kv::BlockId>(to));
  }
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_EQ(runs[0].count, 2u);
  EXPECT_EQ(runs[1].count, 2u);
  EXPECT_EQ(runs[2].from, 9u);
}

TEST(KvSwap, CopiesBetweenAllLayouts) {
  for (const uint64_t piece : {uint64_t{64}, uint64_t{96 << 10}}) {  // memcpy and streaming
    for (const Layout a : {Layout::layers, Layout::packed, Layout::padded}) {
      for (const Layout b : {Layout::layers, Layout::packed, Layout::padded}) {
        Memory from(a, 12, 4, piece);
        Memory to(b, 10, 4, piece);
        for (uint32_t i = 0; i < 12; ++i) from.fill(i, 100 + i);
        for (uint32_t i = 0; i < 10; ++i) to.fill(i, 1);
        kv::SwapEngine engine;
        const auto source = engine.add_space(from.space);
        const auto target = engine.add_space(to.space);
        const std::vector<kv::SwapRun> runs = {{2, 5, 3}, {9, 0, 1}, {10, 8, 2}};
        EXPECT_EQ(ended(engine, engine.copy(source, target, runs)), PYRT_OK);
        const std::vector<uint32_t> expected = {109, 1, 1, 1, 1, 102, 103, 104, 110, 111};
        for (uint32_t i = 0; i < 10; ++i) EXPECT_EQ(to.tag(i), expected[i]) << i;
        const kv::SwapStats stats = engine.stats();
        EXPECT_EQ(stats.blocks, 6u);
        EXPECT_EQ(stats.bytes, 6 * 4 * piece);
        const bool packed = a == Layout::packed && b == Layout::packed;
        const bool layers = a == Layout::layers && b == Layout::layers;
        EXPECT_EQ(stats.descriptors, packed ? 3u : layers ? 12u : 24u);
      }
    }
  }
}

class KvSwapRules : public testing::Test {
 protected:
  void SetUp() override {
    for (uint32_t i = 0; i < 8; ++i) {
      a.fill(i, 10 + i);
      b.fill(i, 20 + i);
      c.fill(i, 30 + i);
    }
    in_a = engine.add_space(a.space);
    in_b = engine.add_space(b.space);
    in_c = engine.add_space(c.space);
    fence = engine.add_fence();
  }
  Memory a{Layout::layers, 8, 2, 64};
  Memory b{Layout::layers, 8, 2, 64};
  Memory c{Layout::layers, 8, 2, 64};
  kv::SwapEngine engine;
  kv::SpaceId in_a = 0, in_b = 0, in_c = 0;
  uint32_t fence = 0;

  kv::Ticket copy(kv::SpaceId from, kv::SpaceId to, kv::SwapRun run, uint64_t after = 0) {
    return engine.copy(from, to, {&run, 1}, {after == 0 ? 0 : fence, after});
  }
};

TEST_F(KvSwapRules, ConflictsRunInOrderBehindAFence) {
  copy(in_a, in_b, {0, 0, 2}, 5);                         // b0 = a0, when the fence says so
  const kv::Ticket second = copy(in_b, in_c, {0, 0, 2});  // reads what the first writes
  const kv::Ticket third = copy(in_c, in_b, {7, 1, 1});   // overwrites what the second reads
  const kv::Ticket apart = copy(in_a, in_c, {6, 6, 1});   // touches nothing of theirs
  EXPECT_TRUE(engine.wait(apart));
  EXPECT_FALSE(engine.finished(second));
  EXPECT_FALSE(engine.wait(third, 1000));
  EXPECT_TRUE(engine.busy(in_a, 0, true));
  EXPECT_FALSE(engine.busy(in_a, 0, false));
  EXPECT_TRUE(engine.busy(in_b, 0, false));
  EXPECT_FALSE(engine.busy(in_a, 6, true));
  engine.check();
  engine.signal(fence, 4);
  EXPECT_FALSE(engine.wait(second, 1000));
  engine.signal(fence, 6);
  engine.signal(fence, 2);  // never falls
  for (const kv::Completion& each : collected(engine)) EXPECT_EQ(each.status, PYRT_OK);
  EXPECT_EQ(c.tag(0), 10u);
  EXPECT_EQ(c.tag(1), 11u);
  EXPECT_EQ(b.tag(1), 37u);
  EXPECT_EQ(c.tag(6), 16u);
  EXPECT_EQ(engine.stats().conflicts, 2u);
}

TEST_F(KvSwapRules, CancelledEndsWithoutACopyAndTakesItsReadersAlong) {
  const kv::Ticket first = copy(in_a, in_b, {0, 0, 1}, 1);
  const kv::Ticket reader = copy(in_b, in_c, {0, 0, 1});
  const kv::Ticket writer = copy(in_a, in_b, {3, 0, 1});
  engine.cancel(first);
  engine.cancel(12345);  // unknown: nothing
  const auto all = collected(engine);
  ASSERT_EQ(all.size(), 3u);
  for (const kv::Completion& each : all) {
    EXPECT_EQ(each.status, each.ticket == first    ? PYRT_ECANCELED
                           : each.ticket == reader ? PYRT_EIO
                                                   : PYRT_OK);
  }
  EXPECT_TRUE(engine.finished(writer));
  EXPECT_EQ(b.tag(0), 13u);
  EXPECT_EQ(c.tag(0), 30u);
  engine.cancel(first);  // collected: nothing
}

TEST_F(KvSwapRules, AFailedPartFailsItsJobAndReaders) {
  for (int n = 1; n <= 5; ++n) {  // four parts: two runs of two pieces
    engine.fail_part(n);
    const std::vector<kv::SwapRun> runs = {{0, 0, 1}, {2, 2, 2}};
    const auto held = static_cast<uint64_t>(n);  // a fence never falls: each round its own value
    const kv::Ticket first = engine.copy(in_a, in_b, runs, {fence, held});
    const kv::Ticket reader = copy(in_b, in_c, {2, 2, 1});
    engine.signal(fence, held);
    for (const kv::Completion& each : collected(engine)) {
      EXPECT_EQ(each.status, n <= 4 || each.ticket == reader ? PYRT_EIO : PYRT_OK) << n;
    }
    EXPECT_TRUE(engine.finished(first));
  }
  engine.fail_part(0);
  EXPECT_EQ(ended(engine, copy(in_a, in_c, {0, 0, 8})), PYRT_OK);
}

TEST_F(KvSwapRules, RefusedLeavesNoTrace) {
  const auto refused = [&](std::vector<kv::SwapRun> runs, kv::SpaceId from, kv::SpaceId to) {
    return status_of([&] { engine.copy(from, to, runs); });
  };
  EXPECT_EQ(refused({{0, 7, 2}}, in_a, in_b), PYRT_EINVAL);
  EXPECT_EQ(refused({{0xffffffff, 0, 2}}, in_a, in_b), PYRT_EINVAL);
  EXPECT_EQ(refused({{0, 0, 0}}, in_a, in_b), PYRT_EINVAL);
  EXPECT_EQ(refused({{0, 0, 2}, {4, 1, 1}}, in_a, in_b), PYRT_EINVAL);  // b1 twice
  EXPECT_EQ(refused({{0, 1, 2}}, in_a, in_a), PYRT_EINVAL);             // a1 read and written
  EXPECT_EQ(refused({{0, 4, 1}, {4, 5, 1}}, in_a, in_a), PYRT_EINVAL);
  EXPECT_EQ(refused({{0, 0, 1}}, in_a, 99), PYRT_EINVAL);
  EXPECT_EQ(refused({{0, 0, 1}}, 0, in_b), PYRT_EINVAL);
  Memory other(Layout::layers, 8, 3, 64);
  EXPECT_EQ(refused({{0, 0, 1}}, in_a, engine.add_space(other.space)), PYRT_EINVAL);
  EXPECT_EQ(refused({{0, 0, 1}}, in_a, engine.add_space(8)), PYRT_EINVAL);
  EXPECT_EQ(status_of([&] { copy(in_a, in_b, {0, 0, 1}, 0); }), PYRT_OK);
  EXPECT_EQ(status_of([&] {
              const kv::SwapRun run{0, 0, 1};
              engine.copy(in_a, in_b, {&run, 1}, {fence + 1, 1});
            }),
            PYRT_EINVAL);
  EXPECT_EQ(collected(engine).size(), 1u);
  // Within one space, apart from each other.
  EXPECT_EQ(ended(engine, copy(in_a, in_a, {0, 4, 4})), PYRT_OK);
  EXPECT_EQ(a.tag(7), 13u);
}

TEST_F(KvSwapRules, SpacesInUseStay) {
  copy(in_a, in_b, {0, 0, 1}, 1);
  EXPECT_EQ(status_of([&] { engine.remove_space(in_a); }), PYRT_ESTATE);
  engine.signal(fence, 1);
  collected(engine);
  engine.remove_space(in_a);
  EXPECT_EQ(status_of([&] { engine.remove_space(in_a); }), PYRT_EINVAL);
  EXPECT_EQ(engine.add_space(c.space), in_a) << "ids are used again";
}

TEST(KvSwap, TheQueueIsBoundedUntilCollected) {
  Memory memory(Layout::layers, 8, 1, 64);
  kv::SwapOptions options;
  options.queue_limit = 3;
  kv::SwapEngine engine(options);
  const auto space = engine.add_space(memory.space);
  const auto submit = [&](uint32_t i) {
    const kv::SwapRun run{i, i + 4, 1};
    return status_of([&] { engine.copy(space, space, {&run, 1}); });
  };
  for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(submit(i), PYRT_OK);
  EXPECT_TRUE(engine.wait_all());
  EXPECT_EQ(submit(3), PYRT_EFULL);
  kv::Completion one[1];
  EXPECT_EQ(engine.collect(one), 1u);
  EXPECT_EQ(submit(3), PYRT_OK);
}

TEST(KvSwap, BodiesRunInTheirLaneAndReportTheirStatus) {
  kv::SwapEngine engine;
  const auto space = engine.add_space(4);
  const kv::Touch touch{space, 1, 2, true};
  int ran = 0;
  const auto run = [&](pyrt_status status, bool throws) {
    return ended(engine, engine.submit(kv::Lane::disk, {&touch, 1}, [&](const auto& go_on) {
      ran += go_on() ? 1 : 0;
      if (throws) pyruntime::fail(status, "thrown");
      return status;
    }));
  };
  EXPECT_EQ(run(PYRT_OK, false), PYRT_OK);
  EXPECT_EQ(run(PYRT_ECORRUPT, false), PYRT_ECORRUPT);
  EXPECT_EQ(run(PYRT_ECORRUPT, true), PYRT_ECORRUPT);
  EXPECT_EQ(ran, 3);
}

TEST(KvSwap, AForkedChildLeavesTheWorkersAlone) {
  Memory memory(Layout::layers, 8, 1, 64);
  auto engine = std::make_unique<kv::SwapEngine>();
  const auto space = engine->add_space(memory.space);
  const kv::SwapRun run{0, 4, 1};
  engine->copy(space, space, {&run, 1});
  EXPECT_TRUE(engine->wait_all());
  const pid_t child = fork();
  if (child == 0) {
    const bool refused = status_of([&] { engine->copy(space, space, {&run, 1}); }) == PYRT_ESTATE &&
                         status_of([&] { engine->wait_all(); }) == PYRT_ESTATE;
    engine.reset();
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(KvSwap, DestructionCancelsWhatWaits) {
  Memory memory(Layout::layers, 8, 1, 64);
  memory.fill(4, 3);
  {
    kv::SwapEngine engine;
    const auto space = engine.add_space(memory.space);
    const uint32_t fence = engine.add_fence();
    const kv::SwapRun run{0, 4, 1};
    engine.copy(space, space, {&run, 1}, {fence, 1});
    engine.copy(space, space, {&run, 1});
  }
  EXPECT_EQ(memory.tag(4), 3u);
}

}  // namespace
