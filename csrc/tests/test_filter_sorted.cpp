// Large batches, sorted by segment: per key as without, whatever the keys are.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <random>
#include <vector>

#include "base/thread_pool.hpp"
#include "filter/filter.hpp"
#include "tests/support/filter_exec.hpp"

namespace pyruntime::filter {
namespace {

constexpr SortLimits kAlways{0, 300'000, 50'000};
constexpr SortLimits kNever{~uint64_t{0}, 300'000, 50'000};

struct Case {
  uint32_t bits, slots;
};
class SortedFilters : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { base::ThreadPool::process().resize(1); }
  std::unique_ptr<Filter> make(uint64_t capacity, const SortLimits& limits) const {
    auto made = std::make_unique<Filter>(Options{capacity, GetParam().bits, GetParam().slots, 1});
    made->set_sort_limits(limits);
    return made;
  }
};
INSTANTIATE_TEST_SUITE_P(All, SortedFilters,
                         ::testing::Values(Case{16, 8}, Case{16, 16}, Case{8, 8}, Case{8, 16}),
                         [](const auto& info) {
                           return "bits" + std::to_string(info.param.bits) + "slots" +
                                  std::to_string(info.param.slots);
                         });

enum class Kind { random, skewed, repeated };

// Skewed: all in the first three segments of a filter with seed 1.
std::vector<uint64_t> keys_of(Kind kind, size_t n, uint64_t num_segments, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> keys;
  while (keys.size() < n) {
    const uint64_t key = random();
    if (kind == Kind::skewed && scale_hash(base::mix64(key ^ 1), num_segments) > 2) continue;
    const size_t copies = kind == Kind::repeated ? 1 + key % 5 : 1;
    keys.insert(keys.end(), copies, key);
  }
  keys.resize(n);
  if (kind == Kind::repeated) std::shuffle(keys.begin(), keys.end(), random);
  return keys;
}

TEST_P(SortedFilters, EveryKeyGetsTheAnswerItGetsUnsorted) {
  for (const Kind kind : {Kind::random, Kind::skewed, Kind::repeated}) {
    const auto sorted = make(700'000, kAlways), plain = make(700'000, kNever);
    const uint64_t segments = plain->info().num_segments;
    ASSERT_GT(segments, 8u);
    const size_t n = kind == Kind::skewed ? 140'000 : 500'001;
    const auto keys = keys_of(kind, n, segments, 1);
    const auto others = keys_of(kind, n, segments, 2);
    std::vector<uint8_t> a(n, 99), b(n, 99);
    std::vector<uint32_t> many_a(n), many_b(n);
    const auto same_answers = [&](const std::vector<uint64_t>& asked) {
      ASSERT_EQ(sorted->contains(asked.data(), n, a.data()),
                plain->contains(asked.data(), n, b.data()));
      ASSERT_EQ(a, b);
      std::vector<uint8_t> bits(n / 8 + 2, 0xee), wanted(n / 8 + 2, 0xee);
      ASSERT_EQ(sorted->contains_bits(asked.data(), n, bits.data()),
                plain->contains_bits(asked.data(), n, wanted.data()));
      ASSERT_EQ(bits, wanted);
      sorted->count(asked.data(), n, many_a.data());
      plain->count(asked.data(), n, many_b.data());
      ASSERT_EQ(many_a, many_b);
    };
    // A first part that relocates nothing, or as good as: then the words are the same as well.
    const size_t part = n / 2;
    ASSERT_EQ(sorted->insert(keys.data(), part, a.data(), false), part);
    ASSERT_EQ(plain->insert(keys.data(), part, b.data(), false), part);
    ASSERT_EQ(a, b);
    if (plain->info().moves == 0) {
      EXPECT_EQ(sorted->words_hash(), plain->words_hash());
    }
    ASSERT_NO_FATAL_FAILURE(same_answers(keys));
    ASSERT_NO_FATAL_FAILURE(same_answers(others));
    // The rest, then half of it again where it is not.
    std::fill(a.begin(), a.end(), 99);
    std::fill(b.begin(), b.end(), 99);
    ASSERT_EQ(sorted->insert(keys.data() + part, n - part, a.data(), true),
              plain->insert(keys.data() + part, n - part, b.data(), true));
    if (GetParam().bits == 16 && kind != Kind::skewed) {
      EXPECT_EQ(a, b);  // few fingerprints are equal, so what is found is the same
    }
    ASSERT_EQ(sorted->contains(keys.data(), n, a.data()), n);
    sorted->check();
    plain->check();
  }
}

TEST_P(SortedFilters, FillToFailureAndWhatFailsLeavesNoTrace) {
  const auto filter = make(200'000, kAlways);
  const size_t slots = filter->info().num_slots;
  const auto keys = keys_of(Kind::random, slots * 101 / 100, 1, 3);
  std::vector<uint8_t> status(keys.size(), 99), found(keys.size());
  const uint64_t stored = filter->insert(keys.data(), keys.size(), status.data(), false);
  EXPECT_LT(stored, keys.size());
  EXPECT_GT(stored, slots * 95 / 100);
  filter->check();
  EXPECT_EQ(filter->info().occupied, stored);
  filter->contains(keys.data(), keys.size(), found.data());
  std::vector<uint64_t> failed;
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_TRUE(status[i] == kOk || status[i] == kFull || status[i] == kDupLimit);
    ASSERT_TRUE(status[i] != kOk || found[i] == 1) << i;
    if (status[i] == kFull) failed.push_back(keys[i]);
  }
  // There is still no room for one or another of them: repeat until none finds any.
  uint64_t before = 0;
  while (failed.size() > 0) {
    before = filter->words_hash();
    const uint64_t more = filter->insert(failed.data(), failed.size(), status.data(), false);
    if (more == 0) break;
    std::vector<uint64_t> left;
    for (size_t i = 0; i < failed.size(); ++i) {
      if (status[i] == kFull) left.push_back(failed[i]);
    }
    failed.swap(left);
  }
  ASSERT_GT(failed.size(), 0u);
  EXPECT_EQ(filter->words_hash(), before);
}

TEST_P(SortedFilters, ManyCopiesOfAKeyInOneBatch) {
  const auto filter = make(200'000, kAlways);
  auto keys = keys_of(Kind::random, 100'000, 1, 4);
  for (size_t i = 0; i < keys.size(); i += 1000) keys[i] = 42;  // 100 of them
  std::vector<uint8_t> status(keys.size(), 99);
  const uint64_t copies = 2 * GetParam().slots;
  EXPECT_LE(filter->insert(keys.data(), keys.size(), status.data(), false),
            keys.size() - 100 + copies);
  size_t refused = 0;
  for (size_t i = 0; i < keys.size(); i += 1000) {
    ASSERT_TRUE(status[i] == kOk || status[i] == kDupLimit || status[i] == kFull);
    refused += status[i] != kOk;
  }
  EXPECT_GE(refused, 100 - copies);
  const auto once = make(200'000, kAlways);
  once->insert(keys.data(), keys.size(), status.data(), true);
  EXPECT_EQ(status[0], kOk);
  for (size_t i = 1000; i < keys.size(); i += 1000) ASSERT_EQ(status[i], kExists);
  uint32_t count = 0;
  const uint64_t key = 42;
  once->count(&key, 1, &count);
  if (GetParam().bits == 16) {
    EXPECT_EQ(count, 1u);
  }
}

TEST_P(SortedFilters, SeveralThreadsShareABatch) {
  base::ThreadPool::process().resize(3);
  const auto filter = make(700'000, kAlways);
  const auto keys = keys_of(Kind::random, 690'000, 1, 5);
  std::vector<uint8_t> status(keys.size(), 99);
  EXPECT_EQ(filter->insert(keys.data(), keys.size(), status.data(), false), keys.size());
  EXPECT_EQ(std::count(status.begin(), status.end(), kOk), std::ptrdiff_t(keys.size()));
  EXPECT_EQ(filter->contains(keys.data(), keys.size(), status.data()), keys.size());
  EXPECT_EQ(std::count(status.begin(), status.end(), 1), std::ptrdiff_t(keys.size()));
  EXPECT_EQ(filter->remove(keys.data(), keys.size(), status.data()), keys.size());
  EXPECT_EQ(filter->info().occupied, 0u);
  filter->check();
}

TEST_P(SortedFilters, WithoutMemoryToSortInTheyAreAsBefore) {
  const SortLimits large{0, 300'000, 1 << 24};  // of one piece
  const auto filter = make(1'500'000, large);
  const auto keys = keys_of(Kind::random, 1'400'000, 1, 6);
  std::vector<uint8_t> status(keys.size(), 99);
  const SortPlan plan = plan_sort(large, filter->words_bytes(), filter->info().num_segments,
                                  keys.size(), base::ThreadPool::process().size());
  ASSERT_GE(plan.chunk, keys.size());
  size_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_AS, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = pages * 4096 + (4 << 20);  // 11 MiB and more are wanted
  ASSERT_EQ(setrlimit(RLIMIT_AS, &tight), 0);
  const bool refused = Sorted::make(plan) == nullptr;
  const uint64_t stored = filter->insert(keys.data(), keys.size(), status.data(), false);
  const uint64_t found = filter->contains(keys.data(), keys.size(), status.data());
  const uint64_t removed = filter->remove(keys.data(), keys.size(), status.data());
  ASSERT_EQ(setrlimit(RLIMIT_AS, &before), 0);
  EXPECT_TRUE(refused);
  EXPECT_EQ(stored, keys.size());
  EXPECT_EQ(found, keys.size());
  EXPECT_EQ(removed, keys.size());
  filter->check();
}

TEST(SortPlans, AreTakenWhereTheyPay) {
  const SortLimits limits;
  constexpr uint64_t kMiB = 1 << 20;
  EXPECT_EQ(plan_sort(limits, 16 * kMiB, 128, 100 * kMiB, 1).chunk, 0u);  // the L3 holds it
  EXPECT_EQ(plan_sort(limits, 128 * kMiB, 1024, 1000, 1).chunk, 0u);      // a key in 2000 lines
  EXPECT_EQ(plan_sort(limits, 1024 * kMiB, 8192, 100 * kMiB, 1).chunk, 0u);
  for (const int threads : {1, 2, 7}) {
    for (const uint64_t n : {uint64_t{63'800'000}, uint64_t{40'000'001}}) {
      const SortPlan plan = plan_sort(limits, 128 * kMiB, 1024, n, threads);
      ASSERT_NE(plan.chunk, 0u);
      EXPECT_LE(plan.chunk, limits.max_chunk);
      EXPECT_EQ(plan.chunk % 8, 0u);
      EXPECT_EQ(plan.shift, 1u);
      EXPECT_EQ(plan.groups, 512u);
    }
  }
  // What the fields of an entry hold is enough, whatever the limits.
  const SortPlan wide =
      plan_sort({0, ~uint64_t{0}, ~uint64_t{0} >> 20}, 1 << 20, kMaxSegments, uint64_t{1} << 30, 1);
  EXPECT_LE(wide.chunk, Sorted::kMaxChunk);
  EXPECT_LE(wide.shift, Sorted::kMaxShift);
}

TEST(SortedBlocks, EveryEntryComesBackInOrderWhereverItGoes) {
  // A table of empty words: `count` of its keys is 0, but what is read is every entry once.
  for (const bool one_group : {false, true}) {
    Filter filter({700'000, 16, 8, 1});
    const View view = filter.view();
    const Kernels& set = kernels(simd::level(), 16, 8);
    const auto keys = keys_of(Kind::random, 65'536, 1, 8);
    std::vector<uint64_t> asked = keys;
    if (one_group) std::fill(asked.begin(), asked.end(), keys[0]);
    const SortPlan plan{asked.size(), 1, static_cast<uint32_t>((view.num_segments - 1) / 2 + 1)};
    const auto sorted = Sorted::make(plan);
    ASSERT_NE(sorted, nullptr);
    for (int again = 0; again < 2; ++again) {
      sorted->clear();
      set.sort(view, asked.data(), asked.size(), *sorted);
      std::vector<uint8_t> seen(asked.size());
      size_t total = 0;
      for (uint32_t group = 0; group < plan.groups; ++group) {
        const uint64_t* block = sorted->first_block(group);
        uint64_t last = 0;
        for (size_t i = 0; i < sorted->count(group); ++i) {
          if (i > 0 && i % Sorted::kBlockEntries == 0) block = sorted->block_after(block);
          const uint64_t entry = block[i % Sorted::kBlockEntries], index = entry >> 40;
          ASSERT_TRUE(i == 0 || index > last);
          last = index;
          const Position p = locate<16>(view, asked[index]);
          ASSERT_EQ(p.segment, group * 2 + (entry >> 29 & 0x7ff));
          ASSERT_EQ(p.first, entry >> 16 & 0x1fff);
          ASSERT_EQ(p.fingerprint, entry & 0xffff);
          ++seen[index];
          ++total;
        }
      }
      EXPECT_EQ(total, asked.size());
      EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), std::ptrdiff_t(asked.size()));
    }
  }
}

}  // namespace
}  // namespace pyruntime::filter
