// Threads that call, prefetch, squeeze and watch one expert cache.
#include <algorithm>

#include "tests/support/moe_store.hpp"

namespace pyruntime::moe {
namespace {

TEST(MoeCacheStress, ManyThreadsUnderATightBudget) {
  constexpr uint64_t kUnit = pool::kBudgetUnit;
  SmallStore small;
  pool::Budget budget(3 * kUnit);
  pool::BudgetClient* other = budget.add("kv", 5, nullptr, nullptr);
  Cache::Options options;
  options.limit_bytes = 3 * kUnit;
  options.budget = &budget;
  std::atomic<uint32_t> tick{0};
  Cache cache(small.store(),
              std::make_unique<FaultyReader>(small.store(),
                                             [&](const Record&) {
                                               const uint32_t t = ++tick;
                                               if (t % 11 == 0) fail(PYRT_EIO, "injected");
                                               if (t % 3 == 0) {
                                                 std::this_thread::sleep_for(
                                                     std::chrono::microseconds(t % 200));
                                               }
                                             }),
              options);
  std::vector<std::thread> threads;
  std::atomic<uint32_t> wrong{0};
  for (uint32_t id = 0; id < 3; ++id) {
    threads.emplace_back([&, id] {
      for (uint32_t i = 0; i < 15; ++i) {
        Tokens t(1 + i % 5, 2, id * 1000 + i);
        cache.ffn(i % 2, t.routing(), nullptr, t.out.data(), t.status.data());
        const std::vector<float> want = small.expected(i % 2, t.routing());
        for (size_t token = 0; token < t.status.size(); ++token) {
          const auto at = static_cast<int64_t>(token) * SmallStore::kHidden;
          if (t.status[token] == 0 &&
              !std::equal(want.begin() + at, want.begin() + at + SmallStore::kHidden,
                          t.out.begin() + at)) {
            ++wrong;
          }
        }
      }
    });
  }
  threads.emplace_back([&] {
    for (int32_t i = 0; i < 200; ++i) {
      const int32_t soon[] = {i % 6, (i + 3) % 6};
      cache.prefetch(i % 2, soon, 2, i % 3);
      if (i % 20 == 0) cache.shrink(0);
      std::this_thread::yield();
    }
  });
  threads.emplace_back([&] {
    for (int i = 0; i < 30; ++i) {
      budget.reserve(*other, 2 * kUnit);
      cache.check();
      budget.give_back(*other, 2 * kUnit);
      (void)cache.statistics();
    }
  });
  for (std::thread& thread : threads) thread.join();
  cache.drain();
  cache.check();
  EXPECT_EQ(wrong, 0u);
  budget.remove(other, true);
}

}  // namespace
}  // namespace pyruntime::moe
