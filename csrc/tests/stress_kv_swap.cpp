// Swaps beside an owner that reuses blocks at once, with delays before each part of a copy. A block
// is overwritten with a poison as soon as the engine says that it may be: whoever still read it
// would carry the poison into a target, and the thread sanitizer would see the race.
#include <gtest/gtest.h>

#include <deque>
#include <random>
#include <thread>
#include <vector>

#include "base/status.hpp"
#include "kv/swap.hpp"
#include "tests/support/kv_blocks.hpp"

namespace kv = pyruntime::kv;
using kv::test::Layout;
using kv::test::Memory;

namespace {

constexpr uint32_t kPoison = 0xdead;
constexpr uint32_t kBlocks = 24;

kv::SwapOptions with_delays(uint64_t seed) {
  kv::SwapOptions options;
  options.workers[0] = 3;
  options.delay_ns = 20000;
  options.seed = seed;
  return options;
}

// One owner's blocks in two tiers of a shared engine: what it believes their content to be.
class Owner {
 public:
  Owner(kv::SwapEngine& engine, uint32_t seed) : engine_(engine), random_(seed) {
    upper_ = engine.add_space(device_.space);
    lower_ = engine.add_space(host_.space);
    for (uint32_t i = 0; i < kBlocks; ++i) {
      device_.fill(i, in_device_[i] = ++tags_);
      host_.fill(i, in_host_[i] = ++tags_);
    }
  }

  void step() {
    switch (random_() % 6) {
      case 0:
      case 1:
        swap(true);
        break;
      case 2:
        swap(false);
        break;
      case 3:  // reuse: waits for the copies in the way only
        rewrite();
        break;
      case 4:
        if (!mine_.empty() && random_() % 4 == 0) engine_.cancel(mine_.back());
        break;
      default:
        if (!mine_.empty()) engine_.wait(mine_.front());
        break;
    }
  }

  // After everything ended and was collected, by status.
  void settle(const std::vector<kv::Completion>& ended) {
    for (const Swap& swap : swaps_) {
      pyrt_status status = PYRT_ENOENT;
      for (const kv::Completion& each : ended) {
        if (each.ticket == swap.ticket) status = each.status;
      }
      ASSERT_NE(status, PYRT_ENOENT);
      auto& target = swap.out ? in_host_ : in_device_;
      // What a cancelled copy left, and what was copied from there, is anybody's guess; the
      // content before the swap was noted when it was submitted.
      for (uint32_t i = 0; i < swap.count; ++i) {
        const bool whole = status == PYRT_OK && swap.content[i] != 0;
        if (target[swap.to + i] == swap.mark) target[swap.to + i] = whole ? swap.content[i] : 0;
      }
    }
    for (uint32_t i = 0; i < kBlocks; ++i) {
      if (known(in_device_[i])) {
        EXPECT_EQ(device_.tag(i), in_device_[i]) << i;
      }
      if (known(in_host_[i])) {
        EXPECT_EQ(host_.tag(i), in_host_[i]) << i;
      }
    }
  }

 private:
  static constexpr uint32_t kMarks = 0x80000000;  // content: what the swap with this mark brings
  struct Swap {
    kv::Ticket ticket;
    bool out;
    uint32_t to, count, mark;
    std::vector<uint32_t> content;
  };
  static bool known(uint32_t content) { return content != 0 && content < kMarks; }

  void swap(bool out) {
    const uint32_t count = 1 + random_() % 4;
    const uint32_t from = random_() % (kBlocks - count);
    const uint32_t to = random_() % (kBlocks - count);
    auto& source = out ? in_device_ : in_host_;
    auto& target = out ? in_host_ : in_device_;
    const kv::SwapRun run{from, to, count};
    Swap made{0, out, to, count, kMarks + ++marks_, {}};
    try {
      made.ticket = engine_.copy(out ? upper_ : lower_, out ? lower_ : upper_, {&run, 1});
    } catch (const pyruntime::Error& error) {
      ASSERT_EQ(error.status(), PYRT_EFULL);
      return;
    }
    for (uint32_t i = 0; i < count; ++i) {
      // Content that itself depends on an unfinished swap is resolved only if known by now.
      made.content.push_back(known(source[from + i]) ? source[from + i] : 0);
      target[to + i] = made.mark;
    }
    mine_.push_back(made.ticket);
    swaps_.push_back(std::move(made));
  }

  void rewrite() {
    const uint32_t block = random_() % kBlocks;
    engine_.wait_block(upper_, block, true);
    device_.fill(block, kPoison);
    device_.fill(block, in_device_[block] = ++tags_);
  }

  kv::SwapEngine& engine_;
  std::mt19937 random_;
  Memory device_{Layout::layers, kBlocks, 3, 256};
  Memory host_{Layout::packed, kBlocks, 3, 256};
  kv::SpaceId upper_ = 0, lower_ = 0;
  uint32_t in_device_[kBlocks], in_host_[kBlocks];  // tag, 0: unknown, or the mark of a swap
  uint32_t tags_ = 0, marks_ = 0;
  std::deque<kv::Ticket> mine_;
  std::vector<Swap> swaps_;
};

TEST(StressKvSwap, NoBlockIsReusedBeforeItsCopyEnds) {
  for (uint64_t round = 0; round < 6; ++round) {
    kv::SwapEngine engine(with_delays(round + 1));
    std::vector<std::unique_ptr<Owner>> owners;
    for (uint32_t i = 0; i < 3; ++i) {
      owners.push_back(std::make_unique<Owner>(engine, static_cast<uint32_t>(round) * 3 + i));
    }
    std::vector<std::thread> threads;
    for (auto& owner : owners) {
      threads.emplace_back([&] {
        for (int i = 0; i < 150; ++i) owner->step();
      });
    }
    for (int i = 0; i < 5; ++i) {
      engine.check();
      std::this_thread::yield();
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_TRUE(engine.wait_all());
    std::vector<kv::Completion> ended(4096);
    ended.resize(engine.collect(ended));
    engine.check();
    for (auto& owner : owners) owner->settle(ended);
    const kv::SwapStats stats = engine.stats();
    EXPECT_EQ(stats.in_flight, 0u);
    EXPECT_EQ(stats.jobs, stats.finished);
  }
}

TEST(StressKvSwap, ChainsKeepTheirOrder) {
  // Content moves down three tiers and up again while the source is overwritten right behind it.
  Memory device(Layout::layers, 8, 2, 512);
  Memory host(Layout::layers, 8, 2, 512);
  Memory deep(Layout::packed, 8, 2, 512);
  kv::SwapEngine engine(with_delays(9));
  const auto d = engine.add_space(device.space);
  const auto h = engine.add_space(host.space);
  const auto l = engine.add_space(deep.space);
  for (uint32_t round = 1; round <= 40; ++round) {
    for (uint32_t b = 0; b < 8; ++b) {
      engine.wait_block(d, b, true);
      device.fill(b, round * 8 + b);
    }
    const kv::SwapRun all{0, 0, 8};
    engine.copy(d, h, {&all, 1});
    engine.copy(h, l, {&all, 1});
    for (uint32_t b = 0; b < 8; ++b) {
      engine.wait_block(d, b, true);
      device.fill(b, kPoison);
    }
    const kv::Ticket back = engine.copy(l, d, {&all, 1});
    EXPECT_TRUE(engine.wait(back));
    for (uint32_t b = 0; b < 8; ++b) ASSERT_EQ(device.tag(b), round * 8 + b);
    std::vector<kv::Completion> ended(8);
    while (engine.collect(ended) > 0) {
    }
  }
}

}  // namespace
