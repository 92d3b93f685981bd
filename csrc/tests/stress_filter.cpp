// Writers at high load beside readers that must never miss a key that is in.
// PYRUNTIME_TEST_SCALE multiplies the rounds: 750 makes 10^8 inserts and deletes of the first test,
// beside the lookups.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "filter/filter.hpp"

namespace pyruntime::filter {
namespace {

int scale() {
  const char* text = std::getenv("PYRUNTIME_TEST_SCALE");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

// Two threads insert and delete so many keys at a time, for so many rounds, in a filter that others
// are in to 93 %; two look for those all the while.
void write_beside_readers(Filter& filter, size_t keys, int rounds, std::atomic<uint64_t>& writes,
                          std::atomic<uint64_t>& reads) {
  const uint64_t slots_in_all = filter.info().num_slots;
  std::vector<uint64_t> fixed;
  std::mt19937_64 random(1);
  for (uint64_t i = 0; i < slots_in_all * 93 / 100; ++i) fixed.push_back(random());
  ASSERT_EQ(filter.insert(fixed.data(), fixed.size(), nullptr, false), fixed.size());
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> misses{0}, lost{0};
  std::vector<std::thread> threads;
  for (uint64_t id = 0; id < 2; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937_64 mine(100 + id);
      std::vector<uint64_t> own(keys);
      std::vector<uint8_t> status(own.size());
      for (int round = 0; round < rounds; ++round) {
        for (uint64_t& key : own) key = mine();
        filter.insert(own.data(), own.size(), status.data(), false);
        std::vector<uint64_t> stored;
        for (size_t i = 0; i < own.size(); ++i) {
          if (status[i] == kOk) stored.push_back(own[i]);
        }
        if (filter.remove(stored.data(), stored.size(), nullptr) != stored.size()) ++lost;
        writes += own.size() + stored.size();
      }
    });
  }
  for (int id = 0; id < 2; ++id) {
    threads.emplace_back([&] {
      std::vector<uint8_t> out(fixed.size());
      while (!stop) {
        misses += fixed.size() - filter.contains(fixed.data(), fixed.size(), out.data());
        reads += fixed.size();
      }
    });
  }
  threads[0].join();
  threads[1].join();
  stop = true;
  threads[2].join();
  threads[3].join();
  EXPECT_EQ(misses, 0u);
  EXPECT_EQ(lost, 0u);
  filter.check();
  EXPECT_EQ(filter.info().occupied, fixed.size());
  EXPECT_GT(filter.info().moves, 0u);
}

TEST(FilterStress, ReadersNeverMissAPresentKey) {
  std::atomic<uint64_t> writes{0}, reads{0};
  for (const uint32_t slots : {8U, 16U}) {
    Filter filter({20'000, 16, slots, 3});
    write_beside_readers(filter, filter.info().num_slots * 2 / 100, 40 * scale(), writes, reads);
  }
  std::printf("%" PRIu64 " inserts and deletes beside %" PRIu64 " lookups\n", writes.load(),
              reads.load());
}

TEST(FilterStress, ReadersMissNothingBesideSortedBatches) {
  // Two segments in groups of one; every batch is sorted, the readers' too. Of the many keys few
  // find room: the load goes up to where inserts fail.
  Filter filter({100'000, 16, 8, 3});
  filter.set_sort_limits({0, 1, 1 << 20});
  ASSERT_EQ(filter.info().num_segments, 2u);
  std::atomic<uint64_t> writes{0}, reads{0};
  write_beside_readers(filter, filter.info().num_slots * 4 / 100, 6 * scale(), writes, reads);
}

TEST(FilterStress, GrowingAndCompactingLoseNothingAndAreNotKeptOut) {
  Filter filter({500, 8, 8, 5});  // collisions are many
  std::vector<uint64_t> fixed;
  std::mt19937_64 random(2);
  for (int i = 0; i < 400; ++i) fixed.push_back(random());
  ASSERT_EQ(filter.insert(fixed.data(), fixed.size(), nullptr, false), fixed.size());
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> misses{0}, lost{0}, kept{0};
  std::vector<std::thread> threads;
  for (uint64_t id = 0; id < 2; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937_64 mine(200 + id);
      std::vector<uint64_t> present;
      const int rounds = 60 * scale();
      for (int round = 0; round < rounds; ++round) {
        std::vector<uint64_t> keys(150);
        for (uint64_t& key : keys) key = mine();
        std::vector<uint8_t> status(keys.size());
        filter.insert(keys.data(), keys.size(), status.data(), false);
        bool full = false;
        for (size_t i = 0; i < keys.size(); ++i) {
          if (status[i] == kOk) present.push_back(keys[i]);
          full |= status[i] == kFull;
        }
        const uint32_t generations = filter.info().generations;
        if (full && generations < 6) filter.grow(generations);
        std::shuffle(present.begin(), present.end(), mine);
        // Now and then nearly all go, and with them a generation.
        const bool ebb = round % 8 == 7;
        const size_t left = ebb ? present.size() / 10 : present.size() - present.size() / 3;
        const size_t gone = present.size() - left;
        if (filter.remove(present.data() + left, gone, nullptr) != gone) ++lost;
        present.resize(left);
        if (ebb) filter.compact();
        std::vector<uint8_t> out(left);
        if (filter.contains(present.data(), left, out.data()) != left) ++misses;
      }
      kept += present.size();
    });
  }
  for (int id = 0; id < 3; ++id) {
    threads.emplace_back([&] {
      std::vector<uint8_t> out(fixed.size());
      while (!stop) {
        misses += fixed.size() - filter.contains(fixed.data(), fixed.size(), out.data());
      }
    });
  }
  threads[0].join();
  threads[1].join();
  // Readers that follow each other without a gap do not hold it up.
  for (uint32_t i = filter.info().generations; i < 7; ++i) filter.grow(i);
  EXPECT_EQ(filter.info().generations, 7u);
  EXPECT_GE(filter.compact(), 3u);
  stop = true;
  for (size_t i = 2; i < threads.size(); ++i) threads[i].join();
  EXPECT_EQ(misses, 0u);
  EXPECT_EQ(lost, 0u);
  filter.check();
  EXPECT_EQ(filter.info().occupied, fixed.size() + kept);
}

}  // namespace
}  // namespace pyruntime::filter
