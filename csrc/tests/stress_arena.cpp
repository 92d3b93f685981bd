// Threads on two arenas of one budget that evict from each other, for both sanitizers. Every holder
// signs the first and last word of its objects and verifies them before release.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "pyruntime/pool.h"

namespace {

constexpr uint64_t kUnit = PYRT_BUDGET_UNIT_BYTES;

struct Object {
  uint64_t* data;
  uint64_t words;
  uint64_t name;
};

// A cache over an arena: objects in it may be evicted at any time.
class Cache {
 public:
  Cache(pyrt_budget* budget, int32_t priority) {
    pyrt_arena_options o;
    pyrt_arena_options_init(&o);
    o.reserve_bytes = 64 * kUnit;
    o.budget = budget;
    o.priority = priority;
    o.reclaim = &evict;
    o.user = this;
    EXPECT_EQ(pyrt_arena_create(&o, &arena_), PYRT_OK) << pyrt_last_error();
  }
  ~Cache() {
    while (drop_one() != 0) {
    }
    EXPECT_EQ(pyrt_arena_check(arena_), PYRT_OK) << pyrt_last_error();
    EXPECT_EQ(pyrt_arena_destroy(arena_, 0), PYRT_OK) << pyrt_last_error();
  }

  bool insert(uint64_t bytes, uint64_t name) {
    void* data = nullptr;
    if (pyrt_arena_acquire(arena_, bytes, &data) != PYRT_OK) return false;
    const Object object{static_cast<uint64_t*>(data), bytes / 8, name};
    object.data[0] = object.data[object.words - 1] = name;
    std::scoped_lock lock(mutex_);
    objects_.push_back(object);
    return true;
  }
  uint64_t drop_one() {
    Object object;
    {
      std::scoped_lock lock(mutex_);
      if (objects_.empty()) return 0;
      object = objects_.front();
      objects_.erase(objects_.begin());
    }
    EXPECT_EQ(object.data[0], object.name) << "object owned twice";
    EXPECT_EQ(object.data[object.words - 1], object.name) << "object owned twice";
    EXPECT_EQ(pyrt_arena_release(arena_, object.data), PYRT_OK) << pyrt_last_error();
    return object.words * 8;
  }
  void trim() { EXPECT_EQ(pyrt_arena_trim(arena_, nullptr), PYRT_OK); }
  void check() { EXPECT_EQ(pyrt_arena_check(arena_), PYRT_OK) << pyrt_last_error(); }

 private:
  static uint64_t evict(void* self, uint64_t bytes) {
    uint64_t freed = 0;
    while (freed < bytes) {
      const uint64_t dropped = static_cast<Cache*>(self)->drop_one();
      if (dropped == 0) break;
      freed += dropped;
    }
    return freed;
  }

  pyrt_arena* arena_ = nullptr;
  std::mutex mutex_;  // not held while acquiring
  std::vector<Object> objects_;
};

TEST(ArenaStress, TwoCachesEvictFromEachOther) {
  pyrt_budget* budget = nullptr;
  ASSERT_EQ(pyrt_budget_create(12 * kUnit, &budget), PYRT_OK);
  std::atomic<int> granted{0};
  {
    Cache low(budget, 0);
    Cache also_low(budget, 0);
    Cache* caches[] = {&low, &also_low};
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 8; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(static_cast<unsigned>(t));
        constexpr uint64_t kSizes[] = {4096, 20000, 300000, kUnit / 2, kUnit, 3 * kUnit / 2};
        for (uint64_t i = 0; i < 150; ++i) {
          Cache& cache = *caches[random() % 2];
          switch (random() % 8) {
            case 0:
              cache.trim();
              break;
            case 1:
            case 2:
              cache.drop_one();
              break;
            case 3:
              cache.check();
              break;
            default:
              granted += cache.insert(kSizes[random() % 6], t << 32 | i);
          }
        }
      });
    }
    for (auto& thread : threads) thread.join();
  }
  EXPECT_GT(granted, 0);
  pyrt_budget_statistics s;
  s.struct_size = sizeof s;
  ASSERT_EQ(pyrt_budget_get_statistics(budget, &s), PYRT_OK);
  EXPECT_EQ(s.available_bytes, s.limit_bytes) << "bytes were lost";
  EXPECT_EQ(pyrt_budget_destroy(budget), PYRT_OK) << pyrt_last_error();
}

}  // namespace
