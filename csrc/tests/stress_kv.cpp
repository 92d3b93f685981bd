// A block pool handed from thread to thread, read while it works, and several at once.
#include <atomic>
#include <mutex>
#include <thread>

#include "support/kv.hpp"

namespace {

using namespace pyruntime::kv;
using namespace pyruntime::kv::test;

TEST(StressKv, APoolMayBeHandedFromThreadToThread) {
  Options o = options(48);
  o.max_seqs = 24;
  Program program(o, 3);
  std::mutex owner;
  std::atomic<int> left{1200};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      while (left.fetch_sub(1) > 0) {
        const std::lock_guard lock(owner);
        program.step();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  program.pool.check();
  EXPECT_GT(program.done, 50u);
}

TEST(StressKv, CountersMayBeReadWhileThePoolWorks) {
  Program program(options(48), 4);
  std::atomic<bool> stop{false};
  uint64_t seen = 0;
  std::thread reader([&] {
    while (!stop.load()) {
      const uint64_t now = program.pool.stats().steps.read();
      EXPECT_GE(now, seen);  // counters never fall
      seen = now;
      std::this_thread::yield();
    }
  });
  for (int i = 0; i < 800; ++i) program.step();
  stop.store(true);
  reader.join();
  EXPECT_GE(program.pool.stats().steps.read(), seen);
}

TEST(StressKv, PoolsShareNothing) {
  std::vector<std::thread> threads;
  std::vector<uint64_t> hashes(4);
  for (size_t i = 0; i < hashes.size(); ++i) {
    threads.emplace_back([&, i] {
      Program program(options(32), 5);
      for (int step = 0; step < 300; ++step) program.step();
      program.pool.check();
      hashes[i] = program.pool.state_hash();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const uint64_t hash : hashes) EXPECT_EQ(hash, hashes[0]);
}

}  // namespace
