// Many threads reserving, reclaiming and leaving one budget, for both sanitizers. A shared counter
// of what clients believe they hold must never pass the limit.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "pyruntime/pool.h"

namespace {

constexpr uint64_t kUnit = PYRT_BUDGET_UNIT_BYTES;
constexpr uint64_t kLimit = 16;

struct Ledger {
  pyrt_budget* budget = nullptr;
  std::atomic<uint64_t> held{0};  // units, over all clients
};

// A cache that gives up what it holds when asked, as an arena would.
class Holder {
 public:
  Holder(Ledger& ledger, const std::string& name, int32_t priority) : ledger_(ledger) {
    EXPECT_EQ(pyrt_budget_register(ledger.budget, name.c_str(), priority, &reclaim, this, &client_),
              PYRT_OK);
  }
  ~Holder() { EXPECT_EQ(pyrt_budget_unregister(client_, 1), PYRT_OK); }

  bool reserve(uint64_t units) {
    if (pyrt_budget_reserve(client_, units * kUnit) != PYRT_OK) return false;
    EXPECT_LE(ledger_.held.fetch_add(units) + units, kLimit);
    std::scoped_lock lock(mutex_);
    units_ += units;
    return true;
  }
  uint64_t release(uint64_t units) {
    std::scoped_lock lock(mutex_);
    const uint64_t given = std::min(units, units_);
    units_ -= given;
    ledger_.held -= given;
    EXPECT_EQ(pyrt_budget_give_back(client_, given * kUnit), PYRT_OK) << pyrt_last_error();
    return given;
  }

 private:
  static uint64_t reclaim(void* user, uint64_t bytes) {
    return static_cast<Holder*>(user)->release((bytes + kUnit - 1) / kUnit) * kUnit;
  }

  Ledger& ledger_;
  pyrt_budget_client* client_ = nullptr;
  std::mutex mutex_;  // not held while reserving
  uint64_t units_ = 0;
};

TEST(BudgetStress, ReserveReclaimAndLeave) {
  Ledger ledger;
  ASSERT_EQ(pyrt_budget_create(kLimit * kUnit, &ledger.budget), PYRT_OK);
  std::atomic<uint64_t> granted{0};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int life = 0; life < 10; ++life) {
        Holder mine(ledger, "holder " + std::to_string(t), static_cast<int32_t>(t % 3));
        for (int i = 0; i < 60; ++i) {
          if (random() % 3 != 0) {
            granted += mine.reserve(1 + random() % 4);
          } else {
            mine.release(1 + random() % 4);
          }
        }
        mine.release(UINT64_MAX / kUnit);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_GT(granted, 0u);
  EXPECT_EQ(ledger.held, 0u);
  pyrt_budget_statistics s;
  s.struct_size = sizeof s;
  ASSERT_EQ(pyrt_budget_get_statistics(ledger.budget, &s), PYRT_OK);
  EXPECT_EQ(s.available_bytes, s.limit_bytes);
  EXPECT_EQ(s.reserves, granted);
  EXPECT_EQ(pyrt_budget_destroy(ledger.budget), PYRT_OK) << pyrt_last_error();
}

}  // namespace
