// The expert cache: same bits as everything in memory, whatever is loaded, evicted or broken.
#include <sys/wait.h>

#include <algorithm>
#include <map>

#include "tests/support/moe_store.hpp"

namespace pyruntime::moe {
namespace {

constexpr uint64_t kUnit = pool::kBudgetUnit;

class MoeCache : public ::testing::Test {
 protected:
  std::unique_ptr<Cache> make(Cache::Options options, FaultyReader::Fault fault = nullptr) {
    std::unique_ptr<Reader> reader;
    if (fault) {
      reader = std::make_unique<FaultyReader>(small_.store(), std::move(fault));
    } else {
      reader = std::make_unique<FileReader>(small_.store(), true);
    }
    return std::make_unique<Cache>(small_.store(), std::move(reader), options);
  }
  void expect_right(Cache& cache, int64_t layer, Tokens& t) {
    cache.ffn(layer, t.routing(), nullptr, t.out.data(), t.status.data());
    cache.check();
    EXPECT_EQ(t.out, small_.expected(layer, t.routing()));
    EXPECT_EQ(t.status, std::vector<uint8_t>(t.status.size(), 0));
  }
  Cache::Options tight() const {
    Cache::Options options;
    options.limit_bytes = small_.expert_bytes() * 5 / 2;
    return options;
  }

  static const SmallStore& shared() {
    static const SmallStore store;  // quantizing takes a while under sanitizers
    return store;
  }
  const SmallStore& small_ = shared();
};

TEST_F(MoeCache, GivesTheBitsOfExpertsInMemoryWhateverIsEvicted) {
  for (const auto order : {Order::kHebf, Order::kJohnson, Order::kById}) {
    Cache::Options options = tight();
    options.order = order;
    options.scratch_bytes = 40'000;  // groups of a few tokens
    const auto cache = make(options);
    for (uint32_t i = 0; i < 20; ++i) {
      Tokens t(1 + i % 9, 1 + i % 4, i);
      expect_right(*cache, i % 2, t);
    }
    const CacheStatistics s = cache->statistics();
    EXPECT_LE(s.used_bytes, options.limit_bytes);
    EXPECT_GT(s.evictions, 0u);
    EXPECT_EQ(s.bytes_read - s.evicted_bytes, s.used_bytes);
  }
}

TEST_F(MoeCache, ReadsNothingTwiceWhenAllFits) {
  Cache::Options options;
  options.limit_bytes = 64 * kUnit;
  const auto cache = make(options);
  Tokens t(32, 4, 1);
  std::fill(t.levels.begin(), t.levels.end(), uint8_t{2});
  expect_right(*cache, 0, t);
  const uint64_t read = cache->statistics().bytes_read;
  EXPECT_EQ(read, small_.expert_bytes() * SmallStore::kExperts);
  expect_right(*cache, 0, t);
  EXPECT_EQ(cache->statistics().bytes_read, read);
}

TEST_F(MoeCache, KeepsTheExpertsThatAreUsedMost) {
  Cache::Options options;
  options.limit_bytes = small_.expert_bytes() * 4;
  const auto cache = make(options);
  Tokens hot(1, 1, 1), cold(1, 1, 2);
  hot.levels[0] = cold.levels[0] = 2;
  hot.ids[0] = 0;
  expect_right(*cache, 0, hot);
  for (int32_t i = 0; i < 60; ++i) {
    expect_right(*cache, 0, hot);
    cold.ids[0] = 1 + i % 5;
    expect_right(*cache, i % 2, cold);
  }
  const CacheStatistics s = cache->statistics();
  EXPECT_GT(s.evictions, 0u);
  const int32_t expert = 0;
  EXPECT_EQ(cache->missing_bytes(0, &expert, 1, 2), 0u);
}

TEST_F(MoeCache, RefusesALimitBelowOneExpertAndSaysHowMuch) {
  Cache::Options options;
  options.limit_bytes = 4096;
  try {
    make(options);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), PYRT_EFULL);
    EXPECT_NE(std::string(error.what()).find(std::to_string(small_.expert_bytes())),
              std::string::npos);
  }
}

TEST_F(MoeCache, GivesRefinementsBackFirstWhenTheBudgetAsks) {
  pool::Budget budget(4 * kUnit);
  pool::BudgetClient* other = budget.add("kv", 5, nullptr, nullptr);
  Cache::Options options;
  options.limit_bytes = 64 * kUnit;
  options.budget = &budget;
  const auto cache = make(options);
  Tokens t(64, 4, 3);
  std::fill(t.levels.begin(), t.levels.end(), uint8_t{2});
  expect_right(*cache, 0, t);
  expect_right(*cache, 1, t);
  const CacheStatistics before = cache->statistics();
  EXPECT_EQ(before.capacity_bytes, (small_.expert_bytes() * 12 + kUnit - 1) / kUnit * kUnit);
  EXPECT_EQ(before.resident[2], 12u);
  budget.reserve(*other, 3 * kUnit);  // all but the cache's least
  const CacheStatistics after = cache->statistics();
  cache->check();
  EXPECT_EQ(after.capacity_bytes, kUnit);
  EXPECT_LT(after.resident[2], after.resident[0]);
  EXPECT_GT(after.resident[0], after.resident[1]);
  EXPECT_THROW(budget.reserve(*other, kUnit), Error);
  expect_right(*cache, 0, t);
  budget.give_back(*other, 3 * kUnit);
  budget.remove(other, true);
}

TEST_F(MoeCache, TriesReadErrorsAgainAndThenFailsOnlyWhoNeedsThePlane) {
  std::atomic<int> broken{0};
  const auto cache = make(tight(), [&](const Record& r) {
    if (r.layer == 0 && r.expert == 3 && r.level == 1 && broken > 0) {
      --broken;
      fail(PYRT_EIO, "injected");
    }
  });
  Tokens t(4, 1, 4);
  t.ids = {3, 3, 1, 0};
  t.levels = {0, 1, 2, 1};
  broken = 2;
  expect_right(*cache, 0, t);
  EXPECT_EQ(cache->statistics().read_errors, 2u);
  cache->shrink(0);
  broken = 3;
  cache->ffn(0, t.routing(), nullptr, t.out.data(), t.status.data());
  cache->check();
  EXPECT_EQ(t.status, (std::vector<uint8_t>{0, 1, 0, 0}));
  const std::vector<float> want = small_.expected(0, t.routing());
  for (const int64_t token : {0, 2, 3}) {
    EXPECT_TRUE(std::equal(want.begin() + token * SmallStore::kHidden,
                           want.begin() + (token + 1) * SmallStore::kHidden,
                           t.out.begin() + token * SmallStore::kHidden));
  }
  EXPECT_EQ(t.out[SmallStore::kHidden], 0.0f);
  expect_right(*cache, 0, t);  // an error of the disk is not for ever
  EXPECT_EQ(cache->statistics().failed_tokens, 1u);
}

TEST_F(MoeCache, ServesTheLowerWidthOfABadRefinementUnlessStrict) {
  const auto bad = [](const Record& r) {
    if (r.layer == 1 && r.expert == 2 && r.level == 1) fail(PYRT_ECORRUPT, "injected");
  };
  for (const bool strict : {false, true}) {
    Cache::Options options = tight();
    options.strict = strict;
    const auto cache = make(options, bad);
    for (int round = 0; round < 2; ++round) {
      Tokens t(3, 1, 5);
      t.ids = {2, 2, 4};
      t.levels = {2, 0, 2};
      cache->ffn(1, t.routing(), nullptr, t.out.data(), t.status.data());
      cache->check();
      EXPECT_EQ(t.status, (std::vector<uint8_t>{uint8_t(strict ? 1 : 2), 0, 0}));
      if (strict) continue;
      t.levels[0] = 0;
      EXPECT_EQ(t.out, small_.expected(1, t.routing()));
    }
    const CacheStatistics s = cache->statistics();
    EXPECT_EQ(s.checksum_errors, 2u);  // read again once, then never
    EXPECT_EQ(s.quarantined, 1u);
  }
}

TEST_F(MoeCache, FailsTheTokensOfABadBasePlaneAlone) {
  const auto cache = make(tight(), [](const Record& r) {
    if (r.expert == 2 && r.level == 0) fail(PYRT_ECORRUPT, "injected");
  });
  Tokens t(3, 2, 6);
  t.ids = {1, 2, 0, 1, 5, 4};
  cache->ffn(0, t.routing(), nullptr, t.out.data(), t.status.data());
  EXPECT_EQ(t.status, (std::vector<uint8_t>{1, 0, 0}));
  cache->check();
}

TEST_F(MoeCache, AFileThatShrinksGivesErrorsNotSignals) {
  const SmallStore own;
  Cache cache(own.store(), std::make_unique<FileReader>(own.store(), true), tight());
  std::filesystem::resize_file(own.path(), kPage * 2);
  Tokens t(2, 1, 7);
  t.ids = {5, 5};
  cache.ffn(1, t.routing(), nullptr, t.out.data(), t.status.data());
  EXPECT_EQ(t.status, (std::vector<uint8_t>{1, 1}));
  cache.check();
}

TEST_F(MoeCache, PrefetchedPlanesAreThereAndCountedAndJunkIsNot) {
  Cache::Options options;
  options.limit_bytes = 64 * kUnit;
  const auto cache = make(options);
  const int32_t soon[] = {1, 4};
  cache->prefetch(1, soon, 2, 1);
  cache->drain();
  EXPECT_EQ(cache->missing_bytes(1, soon, 2, 1), 0u);
  Tokens t(2, 1, 8);
  t.ids = {1, 1};
  t.levels = {1, 0};
  expect_right(*cache, 1, t);
  const CacheStatistics s = cache->statistics();
  EXPECT_EQ(s.misses[0] + s.misses[1], 0u);
  EXPECT_EQ(s.prefetch_useful_bytes * 2, s.prefetched_bytes);
  cache->shrink(0);
  EXPECT_EQ(cache->statistics().prefetch_wasted_bytes * 2, s.prefetched_bytes);
  const int32_t outside = 6;
  EXPECT_THROW(cache->prefetch(1, &outside, 1, 0), Error);
  EXPECT_THROW(cache->prefetch(2, soon, 1, 0), Error);
  EXPECT_THROW(cache->prefetch(1, soon, 1, 3), Error);
}

TEST_F(MoeCache, AboveItsFloorATokenTakesWhatIsThereAndTheRestComesLater) {
  Cache::Options options;
  options.limit_bytes = 64 * kUnit;
  const auto cache = make(options);
  Tokens t(1, 1, 9);
  t.ids[0] = 3;
  t.levels[0] = 2;
  const uint8_t floor = 0;
  cache->ffn(0, t.routing(), &floor, t.out.data(), t.status.data());
  cache->drain();
  t.levels[0] = 0;
  EXPECT_EQ(t.out, small_.expected(0, t.routing()));
  t.levels[0] = 2;
  cache->ffn(0, t.routing(), &floor, t.out.data(), t.status.data());
  EXPECT_EQ(t.out, small_.expected(0, t.routing()));
}

TEST_F(MoeCache, ChildOfAForkIsRefusedAndCanEnd) {
  const auto cache = make(tight());
  Tokens t(2, 2, 10);
  expect_right(*cache, 0, t);
  const pid_t child = fork();
  if (child == 0) {
    try {
      cache->ffn(0, t.routing(), nullptr, t.out.data(), nullptr);
    } catch (const Error& error) {
      _exit(error.status() == PYRT_ESTATE ? 0 : 2);
    }
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// Random calls, prefetches and pressure beside a model of what must hold.
TEST_F(MoeCache, RandomUseKeepsEveryInvariant) {
  std::mt19937 random(11);
  std::atomic<uint32_t> tick{0};
  pool::Budget budget(3 * kUnit);
  pool::BudgetClient* other = budget.add("kv", 5, nullptr, nullptr);
  Cache::Options options;
  options.limit_bytes = 3 * kUnit;
  options.budget = &budget;
  options.worth_errors = true;
  const auto cache = make(options, [&](const Record&) {
    if (++tick % 7 == 0) fail(PYRT_EIO, "injected");  // never three times in a row
  });
  uint64_t held = 0;
  for (uint32_t i = 0; i < 300; ++i) {
    switch (random() % 5) {
      case 0: {
        const int32_t soon[] = {int32_t(random() % 6), int32_t(random() % 6)};
        cache->prefetch(random() % 2, soon, 2, int(random() % 3));
        break;
      }
      case 1:
        if (held == 0) {
          budget.reserve(*other, 2 * kUnit);
          held = 2 * kUnit;
        } else {
          budget.give_back(*other, held);
          held = 0;
        }
        break;
      case 2:
        EXPECT_LE(cache->missing_bytes(0, nullptr, 0, 2), 0u);
        cache->check();
        break;
      default: {
        Tokens t(1 + random() % 12, 1 + random() % 3, i);
        cache->ffn(i % 2, t.routing(), nullptr, t.out.data(), t.status.data());
        const std::vector<float> want = small_.expected(i % 2, t.routing());
        for (size_t token = 0; token < t.status.size(); ++token) {
          if (t.status[token] == 1) continue;
          const auto at = static_cast<int64_t>(token) * SmallStore::kHidden;
          ASSERT_TRUE(std::equal(want.begin() + at, want.begin() + at + SmallStore::kHidden,
                                 t.out.begin() + at));
        }
      }
    }
    cache->check();
  }
  cache->drain();
  cache->check();
  budget.remove(other, true);
}

TEST(MoePlan, LoadsWhatMostTokensWaitForFirst) {
  // tokens at levels 0..2
  const int64_t counts[] = {1, 0, 4, 9, 0, 0, 0, 0, 0, 2, 2, 2};
  const int32_t resident[] = {0, 0, 0, 1};
  const double load[] = {4, 2, 2}, compute[] = {1, 1, 1};
  const Demand demand{4, 3, counts, resident, load, compute};
  const std::vector<PlaneId> want{{1, 0}, {0, 0}, {3, 1}, {0, 1}, {0, 2}, {3, 2}};
  EXPECT_EQ(plan(demand, Order::kHebf), want);
  const std::vector<PlaneId> by_id{{0, 0}, {0, 1}, {0, 2}, {1, 0}, {3, 1}, {3, 2}};
  EXPECT_EQ(plan(demand, Order::kById), by_id);
  EXPECT_LE(makespan(demand, want), makespan(demand, by_id));
}

}  // namespace
}  // namespace pyruntime::moe
