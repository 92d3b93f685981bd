// The cuckoo filter: a multiset model, fill to failure, false positives, interleavings, files.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "base/status.hpp"
#include "filter/evict.hpp"
#include "filter/filter.hpp"
#include "tests/support/filter_exec.hpp"

namespace pyruntime::filter {
namespace {

std::vector<uint64_t> random_keys(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> keys(n);
  for (uint64_t& key : keys) key = random();
  return keys;
}

struct Case {
  uint32_t bits, slots;
};
class Filters : public ::testing::TestWithParam<Case> {
 protected:
  Options options(uint64_t capacity, uint64_t seed = 1) const {
    return {capacity, GetParam().bits, GetParam().slots, seed};
  }
};

TEST(Xxh64, ReferenceValues) {
  EXPECT_EQ(base::xxh64("", 0, 0), 0xef46db3751d8e999ULL);
  EXPECT_EQ(base::xxh64("a", 1, 0), 0xd24ec4f1a98c6e5bULL);
  EXPECT_EQ(base::xxh64("abc", 3, 0), 0x44bc2cf5ad770999ULL);
  const std::string text = "Nobody inspects the spammish repetition";
  EXPECT_EQ(base::xxh64(text.data(), text.size(), 0), 0xfbcea83c8a378bf1ULL);
}

TEST_P(Filters, HoldsWhatItPromises) {
  for (const uint64_t capacity : {1, 7, 100, 1000, 5000, 20'000, 70'000, 200'000}) {
    for (uint64_t seed = 0; seed < (capacity < 2000 ? 100 : 5); ++seed) {
      Filter filter(options(capacity, seed));
      const auto keys = random_keys(capacity, 1000 + seed);
      std::vector<uint8_t> found(keys.size());
      ASSERT_EQ(filter.insert(keys.data(), keys.size(), nullptr, false), capacity)
          << capacity << " seed " << seed;
      ASSERT_EQ(filter.contains(keys.data(), keys.size(), found.data()), capacity);
      filter.check();
    }
  }
}

TEST_P(Filters, FollowsAMultiset) {
  Filter filter(options(3000));
  std::map<uint64_t, uint32_t> model;
  std::mt19937_64 random(5);
  for (int step = 0; step < 30'000; ++step) {
    const uint64_t key = random() % 4000 * 0x10001;
    uint8_t status = 9;
    if (random() % 2 != 0 && model.size() < 2500) {
      if (filter.insert(&key, 1, &status, false) != 0) ++model[key];
      ASSERT_TRUE(status == kOk || status == kDupLimit || status == kFull);
    } else if (model.contains(key)) {
      ASSERT_EQ(filter.remove(&key, 1, &status), 1u);
      ASSERT_EQ(status, 0);
      if (--model[key] == 0) model.erase(key);
    }
    if (step % 1000 != 0) continue;
    filter.check();
    uint64_t total = 0;
    for (const auto& [present, copies] : model) {
      uint32_t count = 0;
      filter.count(&present, 1, &count);
      ASSERT_GE(count, copies);
      total += copies;
    }
    ASSERT_EQ(filter.info().occupied, total);
  }
}

TEST_P(Filters, AFailedInsertHasChangedNothingAndRefillingGoesOn) {
  Filter filter(options(20'000));
  std::vector<uint64_t> in;
  std::mt19937_64 random(6);
  for (int cycle = 0; cycle < 20; ++cycle) {
    int failures = 0;
    while (failures < 10) {
      const uint64_t key = random();
      uint8_t status = 9;
      const uint64_t before = failures > 0 ? filter.words_hash() : 0;
      if (filter.insert(&key, 1, &status, false) == 1) {
        in.push_back(key);
        continue;
      }
      ASSERT_EQ(status, kFull);
      if (failures++ > 0) {
        ASSERT_EQ(filter.words_hash(), before);
      }
    }
    EXPECT_GT(filter.info().occupied, filter.info().num_slots * 94 / 100);
    std::vector<uint8_t> found(in.size());
    ASSERT_EQ(filter.contains(in.data(), in.size(), found.data()), in.size());
    std::shuffle(in.begin(), in.end(), random);
    const size_t gone = in.size() / 3;
    std::vector<uint8_t> status(gone);
    ASSERT_EQ(filter.remove(in.data() + in.size() - gone, gone, status.data()), gone);
    in.resize(in.size() - gone);
    filter.check();
  }
}

TEST_P(Filters, FalsePositivesAreAsTheFormulaSays) {
  const uint64_t n = 100'000;
  const auto sequence = [](uint64_t i) { return i; };
  const auto stride = [](uint64_t i) { return i << 20; };
  const auto swapped = [](uint64_t i) { return __builtin_bswap64(i); };
  for (const std::function<uint64_t(uint64_t)>& shape :
       {std::function<uint64_t(uint64_t)>(sequence), std::function<uint64_t(uint64_t)>(stride),
        std::function<uint64_t(uint64_t)>(swapped)}) {
    for (const double load : {0.5, 0.9, 0.95}) {
      Filter filter(options(n, 77));
      std::vector<uint64_t> keys;
      const auto fill = static_cast<uint64_t>(static_cast<double>(filter.info().num_slots) * load);
      for (uint64_t i = 0; i < fill; ++i) keys.push_back(shape(i));
      ASSERT_EQ(filter.insert(keys.data(), keys.size(), nullptr, false), fill);
      const uint64_t probes = GetParam().bits == 8 ? 400'000 : 4'000'000;
      uint64_t hits = 0;
      std::vector<uint64_t> asked(1 << 16);
      std::vector<uint8_t> out(asked.size());
      for (uint64_t at = 0; at < probes; at += asked.size()) {
        for (size_t i = 0; i < asked.size(); ++i) asked[i] = shape(fill + at + i);
        hits += filter.contains(asked.data(), asked.size(), out.data());
      }
      const double asked_in_all = std::ceil(static_cast<double>(probes) / 65536) * 65536;
      const double expected = filter.info().expected_fpr * asked_in_all;
      EXPECT_NEAR(static_cast<double>(hits), expected, 0.1 * expected) << load;
    }
  }
}

TEST_P(Filters, ManyCopiesOfOneKeyReachALimitNotFailure) {
  Filter filter(options(10'000));
  const uint64_t key = 42;
  for (uint32_t i = 0; i < 2 * GetParam().slots; ++i) {
    ASSERT_EQ(filter.insert(&key, 1, nullptr, false), 1u);
  }
  uint8_t status = 9;
  EXPECT_EQ(filter.insert(&key, 1, &status, false), 0u);
  EXPECT_EQ(status, kDupLimit);
  EXPECT_EQ(filter.insert(&key, 1, &status, true), 0u);
  EXPECT_EQ(status, kExists);
  for (uint32_t i = 0; i < 2 * GetParam().slots; ++i) {
    ASSERT_EQ(filter.remove(&key, 1, nullptr), 1u);
  }
  EXPECT_EQ(filter.remove(&key, 1, &status), 0u);
  EXPECT_EQ(status, 1);
  filter.check();
}

TEST_P(Filters, FilesComeBackAndDamageIsRefused) {
  Filter filter(options(2000, 9));
  const auto keys = random_keys(1800, 10);
  filter.insert(keys.data(), keys.size(), nullptr, false);
  std::vector<uint8_t> file(filter.file_bytes());
  filter.save(file.data(), file.size(), 1);
  uint8_t kind = 0;
  std::unique_ptr<Filter> back(Filter::load(file.data(), file.size(), &kind));
  EXPECT_EQ(kind, 1);
  EXPECT_EQ(back->words_hash(), filter.words_hash());
  std::vector<uint8_t> found(keys.size());
  EXPECT_EQ(back->contains(keys.data(), keys.size(), found.data()), keys.size());
  const auto refused = [&](const std::vector<uint8_t>& bytes, size_t size) {
    try {
      std::unique_ptr<Filter> read(Filter::load(bytes.data(), size, &kind));
    } catch (const Error& error) {
      return error.status() == PYRT_ECORRUPT || error.status() == PYRT_EVERSION;
    }
    return false;
  };
  for (size_t size = 0; size < file.size(); size += 64) EXPECT_TRUE(refused(file, size));
  std::mt19937 random(11);
  for (size_t bit = 0; bit < file.size() * 8; bit += bit < 128 * 8 ? 1 : 1 + random() % 97) {
    std::vector<uint8_t> bad = file;
    bad[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    EXPECT_TRUE(refused(bad, bad.size())) << bit;
  }
  // Lies with a right checksum.
  const auto lie = [&](const std::function<void(FileHeader&)>& change) {
    std::vector<uint8_t> bad = file;
    FileHeader h;
    std::memcpy(&h, bad.data(), sizeof h);
    change(h);
    h.header_hash = base::xxh64(&h, offsetof(FileHeader, header_hash), 0);
    std::memcpy(bad.data(), &h, sizeof h);
    return refused(bad, bad.size());
  };
  EXPECT_TRUE(lie([](FileHeader& h) { h.num_segments = ~0ull; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.num_segments = kMaxSegments; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.buckets = 0; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.buckets += 1; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.slots = 4; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.threshold = 0; }));
  EXPECT_TRUE(lie([](FileHeader& h) { ++h.occupied; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.body_bytes = ~0ull - 64; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.major = 2; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.major = 3; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.generations = 1; }));
}

TEST_P(Filters, EverySimdLevelGivesTheSameBytesAndAnswers) {
  const auto keys = random_keys(50'000, 12);
  const int bits = static_cast<int>(GetParam().bits), slots = static_cast<int>(GetParam().slots);
  std::vector<std::vector<uint8_t>> answers;
  Filter filter(options(40'000));
  filter.insert(keys.data(), 35'000, nullptr, false);
  for (const auto level : {simd::Level::scalar, simd::Level::avx2, simd::Level::avx512}) {
    if (level > simd::detected()) continue;
    std::vector<uint8_t> out(keys.size());
    // The same words through another table.
    std::vector<uint8_t> file(filter.file_bytes());
    filter.save(file.data(), file.size(), 1);
    FileHeader h;
    std::memcpy(&h, file.data(), sizeof h);
    std::vector<uint64_t> words(h.body_bytes / 8), counters(kNumCounters);
    std::memcpy(words.data(), file.data() + sizeof h, h.body_bytes);
    std::vector<uint32_t> epochs(h.num_segments);
    const View view{words.data(), epochs.data(), counters.data(), h.num_segments,
                    h.seed,       h.buckets,     h.threshold};
    kernels(level, bits, slots).contains(view, keys.data(), keys.size(), out.data());
    answers.push_back(out);
  }
  for (const auto& answer : answers) EXPECT_EQ(answer, answers.front());
  // Inserts up to where keys are relocated and refused, and deletes.
  std::vector<std::vector<uint64_t>> tables;
  std::vector<std::vector<uint8_t>> statuses;
  for (const auto level : {simd::Level::scalar, simd::Level::avx2, simd::Level::avx512}) {
    if (level > simd::detected()) continue;
    std::vector<uint64_t> words(filter.words_bytes() / 8), counters(kNumCounters);
    std::vector<uint32_t> epochs(filter.info().num_segments);
    View view = filter.view();
    view.words = words.data();
    view.epochs = epochs.data();
    view.counters = counters.data();
    const Kernels& set = kernels(level, bits, slots);
    std::vector<uint8_t> status(keys.size(), 99);
    EXPECT_GT(set.insert(view, keys.data(), keys.size(), status.data(), false), 40'000u);
    EXPECT_GT(counters[kMoves], 0u);
    tables.push_back(words);
    statuses.push_back(status);
    set.remove(view, keys.data() + 1000, 20'000, status.data());
    tables.push_back(words);
    statuses.push_back(status);
  }
  for (size_t i = 2; i < tables.size(); ++i) {
    EXPECT_EQ(tables[i], tables[i % 2]);
    EXPECT_EQ(statuses[i], statuses[i % 2]);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Filters,
                         ::testing::Values(Case{16, 8}, Case{16, 16}, Case{8, 8}, Case{8, 16}),
                         [](const auto& info) {
                           return "bits" + std::to_string(info.param.bits) + "slots" +
                                  std::to_string(info.param.slots);
                         });

TEST(FilterInterleavings, NoKeyIsMissedAndNoCopyIsLostAtAnyStep) {
  // A small full segment, so that inserts move keys; at every step of a move every key is looked
  // up, and once a key on the path is deleted.
  int steps = 0;
  for (const bool deleting : {false, true}) {
    for (int victim = 0; victim < 60; ++victim) {
      std::vector<uint64_t> words(8 * 2);
      std::vector<uint32_t> epochs(1);
      std::vector<uint64_t> counters(kNumCounters);
      const View view{words.data(), epochs.data(), counters.data(), 1, 3, 8, 3};
      std::vector<uint64_t> in;
      for (uint64_t key = 1; in.size() < 62; ++key) {
        if (insert<Hooked, 16, 8>(view, locate<16>(view, key)) == kOk) in.push_back(key);
        if (key > 5000) break;  // as full as it gets
      }
      uint64_t deleted = 0;
      Hooked::hook = [&](Step step) {
        steps += step == Step::bumped;
        if (deleting && deleted == 0) {
          deleted = in[static_cast<size_t>(victim) % in.size()];
          ASSERT_TRUE((remove<Exclusive, 16, 8>(view, locate<16>(view, deleted))));
          ++epochs[0];
        }
        for (const uint64_t key : in) {
          if (key != deleted) {
            ASSERT_TRUE((contains<Exclusive, 16, 8>(view, locate<16>(view, key)))) << key;
          }
        }
      };
      const uint64_t fresh = 100'000 + static_cast<uint64_t>(victim);
      const Status status = insert<Hooked, 16, 8>(view, locate<16>(view, fresh));
      Hooked::hook = nullptr;
      size_t copies = 0;
      for (const uint64_t word : words) {
        copies += 4 - static_cast<size_t>(count_bits(zero_lanes<16, 8>(word)));
      }
      EXPECT_EQ(copies, in.size() + (status == kOk) - (deleted != 0));
      for (const uint64_t key : in) {
        if (key != deleted) {
          EXPECT_TRUE((contains<Exclusive, 16, 8>(view, locate<16>(view, key))));
        }
      }
    }
  }
  EXPECT_GE(steps, 40);
}

TEST(FilterInterleavings, ADeleteThatLeavesAnotherCopyIsSeenByLookups) {
  // A key in its second bucket. Its lookup has passed the first when one that collides goes in
  // there, and a delete of that takes the copy in the second.
  for (const auto level : {simd::Level::scalar, simd::Level::avx2, simd::Level::avx512}) {
    if (level > simd::detected()) continue;
    std::vector<uint64_t> words(4);
    std::vector<uint32_t> epochs(1);
    std::vector<uint64_t> counters(kNumCounters);
    const View view{words.data(), epochs.data(), counters.data(), 1, 3, 4, 3};
    const Position p = locate<8>(view, 1);
    uint64_t mirrored = 2;  // with the buckets the other way round
    for (;; ++mirrored) {
      const Position q = locate<8>(view, mirrored);
      if (q.fingerprint == p.fingerprint && q.first == p.second) break;
    }
    words[p.second] = p.fingerprint;
    int calls = 0;
    Hooked::hook = [&](Step step) {
      if (step != Step::between_buckets || ++calls > 1) return;
      words[p.first] = p.fingerprint;
      uint8_t status = 99;
      EXPECT_EQ(kernels(level, 8, 8).remove(view, &mirrored, 1, &status), 1u);
      EXPECT_EQ(words[p.second], 0u);
    };
    EXPECT_TRUE((contains<Hooked, 8, 8>(view, p)));
    Hooked::hook = nullptr;
    EXPECT_EQ(calls, 1);  // the second time it is in the first bucket
  }
}

}  // namespace
}  // namespace pyruntime::filter
