// Filters that have grown: nested generations beside an exact multiset, in geometries so small that
// everything collides; what they promise; their files.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
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

struct Case {
  uint32_t bits, slots;
};
class GrownFilters : public ::testing::TestWithParam<Case> {
 protected:
  Options options(uint64_t capacity, uint64_t seed = 1) const {
    return {capacity, GetParam().bits, GetParam().slots, seed};
  }
};
INSTANTIATE_TEST_SUITE_P(All, GrownFilters,
                         ::testing::Values(Case{16, 8}, Case{16, 16}, Case{8, 8}, Case{8, 16}),
                         [](const auto& info) {
                           return "bits" + std::to_string(info.param.bits) + "slots" +
                                  std::to_string(info.param.slots);
                         });

std::vector<uint64_t> random_keys(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> keys(n);
  for (uint64_t& key : keys) key = random();
  return keys;
}

// Inserts all keys, growing where as many are in as fit, or one is refused.
void insert_growing(Filter& filter, std::vector<uint64_t> keys) {
  std::vector<uint8_t> status(keys.size());
  while (!keys.empty()) {
    const Info now = filter.info();
    if (now.occupied >= now.capacity) {
      filter.grow(now.generations);
      continue;
    }
    const size_t n = std::min<size_t>(keys.size(), now.capacity - now.occupied);
    const size_t at = keys.size() - n;
    filter.insert(keys.data() + at, n, status.data(), false);
    std::vector<uint64_t> left;
    for (size_t i = 0; i < n; ++i) {
      ASSERT_TRUE(status[i] == kOk || status[i] == kFull);
      if (status[i] == kFull) left.push_back(keys[at + i]);
    }
    if (!left.empty()) filter.grow(now.generations);
    keys.resize(at);
    keys.insert(keys.end(), left.begin(), left.end());
  }
}

TEST(NestedGeometry, AKeysSegmentIsHalfOfTheNextGenerationsAndNothingElseChanges) {
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 200'000; ++trial) {
    View coarse{};
    // The limits and what is around them come up often.
    coarse.num_segments = 1 + (random() & (kMaxSegments / 2 - 1)) % (1 + (random() >> 40));
    coarse.buckets = 2 * (1 + static_cast<uint32_t>(random() % 4096));
    View fine = coarse;
    fine.num_segments *= 2;
    const uint64_t h = trial % 8 == 0 ? ~uint64_t{0} << random() % 64 : random();
    const Position a = locate_hash<16>(coarse, h), b = locate_hash<16>(fine, h);
    ASSERT_EQ(a.segment, b.segment / 2);
    ASSERT_LT(b.segment, fine.num_segments);
    ASSERT_TRUE(a.first == b.first && a.second == b.second && a.fingerprint == b.fingerprint);
  }
}

TEST_P(GrownFilters, TinyOnesFollowAMultisetThroughInsertsDeletesGrowthAndFiles) {
  uint64_t deletes = 0, most_generations = 0, compacted = 0;
  // Keys of few fingerprints, so that many collide in one generation and not in the next.
  std::vector<uint64_t> universe;
  for (uint64_t key = 0; universe.size() < 300; ++key) {
    const uint64_t h = base::mix64(key ^ 7);
    if ((GetParam().bits == 8 ? fingerprint_of<8>(h) : fingerprint_of<16>(h)) <= 6) {
      universe.push_back(key);
    }
  }
  for (uint64_t seed = 0; seed < 60; ++seed) {
    std::mt19937_64 random(seed);
    auto filter = std::make_unique<Filter>(options(1 + random() % 30, 7));
    std::map<uint64_t, uint32_t> model;
    std::vector<uint64_t> present;  // as a multiset
    const size_t keys_in_use = 10 + random() % (universe.size() - 10);
    for (int step = 0; step < 400; ++step) {
      const uint64_t what = random() % 100;
      if (what < 55 || present.empty()) {
        // Some keys again and again.
        const uint64_t key = universe[random() % (what % 8 == 0 ? 4 : keys_in_use)];
        uint8_t status = 9;
        const bool unique = what % 11 == 0;
        filter->insert(&key, 1, &status, unique);
        if (status == kOk) present.push_back(key), ++model[key];
        if (unique && model.contains(key)) {
          ASSERT_NE(status, kFull);
        }
        if (status == kFull && filter->info().generations < 7) filter->grow(0);
      } else if (what < 96) {
        const size_t n = 1 + random() % std::min<size_t>(present.size(), 5);
        std::shuffle(present.begin(), present.end(), random);
        std::vector<uint64_t> gone(present.end() - static_cast<ptrdiff_t>(n), present.end());
        present.resize(present.size() - n);
        for (const uint64_t key : gone) {
          if (--model[key] == 0) model.erase(key);
        }
        ASSERT_EQ(filter->remove(gone.data(), n, nullptr), n);
        deletes += n;
      } else if (what < 97) {
        if (filter->info().generations < 7) filter->grow(0);
      } else if (what < 98) {
        const uint32_t before = filter->info().generations;
        if (seed % 2 == 0 && before < 7) continue;  // half of them grow on
        const uint32_t dropped = filter->compact();
        compacted += dropped;
        ASSERT_EQ(filter->info().generations, before - dropped);
      } else {
        std::vector<uint8_t> file(filter->file_bytes());
        filter->save(file.data(), file.size(), 2);
        uint8_t kind = 0;
        const uint64_t hash = filter->words_hash();
        filter.reset(Filter::load(file.data(), file.size(), &kind));
        ASSERT_EQ(filter->words_hash(), hash);
        ASSERT_EQ(kind, 2);
      }
      filter->check();
      ASSERT_EQ(filter->info().occupied, present.size());
      most_generations = std::max<uint64_t>(most_generations, filter->info().generations);
      std::vector<uint64_t> keys;
      for (const auto& [key, copies] : model) keys.push_back(key);
      std::vector<uint8_t> found(keys.size());
      std::vector<uint32_t> counts(keys.size());
      ASSERT_EQ(filter->contains(keys.data(), keys.size(), found.data()), keys.size())
          << "seed " << seed << " step " << step;
      filter->count(keys.data(), keys.size(), counts.data());
      for (size_t i = 0; i < keys.size(); ++i) ASSERT_GE(counts[i], model[keys[i]]);
    }
  }
  EXPECT_GT(deletes, 5'000u);
  EXPECT_GT(compacted, 20u);
  EXPECT_EQ(most_generations, 7u);
}

// github.com/seiflotfy/cuckoofilter issue 50: a scalable filter that had grown lost keys when
// others were deleted (160 of 15 000 there).
TEST_P(GrownFilters, DeletingHalfOfTheKeysLosesNoneOfTheOthers) {
  for (const uint64_t capacity : {16, 1000, 9000}) {
    Filter filter(options(capacity, 50));
    auto keys = random_keys(30'000, capacity);
    insert_growing(filter, keys);
    EXPECT_GE(filter.info().generations, 2u);
    std::mt19937_64 random(3);
    std::shuffle(keys.begin(), keys.end(), random);
    while (keys.size() > 100) {
      const size_t half = keys.size() / 2;
      ASSERT_EQ(filter.remove(keys.data() + half, keys.size() - half, nullptr), keys.size() - half);
      keys.resize(half);
      std::vector<uint8_t> found(half);
      ASSERT_EQ(filter.contains(keys.data(), half, found.data()), half);
      filter.check();
    }
    ASSERT_EQ(filter.remove(keys.data(), keys.size(), nullptr), keys.size());
    EXPECT_EQ(filter.info().occupied, 0u);
  }
}

TEST_P(GrownFilters, HoldWhatTheyPromise) {
  for (const uint64_t capacity : {1, 7, 100, 1000, 5000, 20'000, 70'000}) {
    for (uint64_t seed = 0; seed < (capacity < 2000 ? 20 : 1); ++seed) {
      for (const uint32_t generations : {2, 4}) {
        if (capacity * generations > 150'000) continue;
        Filter filter(options(capacity, seed));
        while (filter.info().generations < generations) filter.grow(0);
        const uint64_t promised = filter.info().capacity;
        ASSERT_GE(promised, capacity);
        if (capacity >= 5000) {
          ASSERT_GT(promised, filter.info().num_slots * 7 / 10);
        }
        const auto keys = random_keys(promised, 1000 + seed);
        ASSERT_EQ(filter.insert(keys.data(), keys.size(), nullptr, false), promised)
            << capacity << " seed " << seed << " generations " << generations;
        filter.check();
      }
    }
  }
}

TEST_P(GrownFilters, RoomThatDeletesMakeInOlderGenerationsIsUsed) {
  Filter filter(options(5000));
  const auto keys = random_keys(30'000, 4);
  filter.insert(keys.data(), 5000, nullptr, false);
  filter.grow(1);
  filter.grow(1);  // has happened
  EXPECT_EQ(filter.info().generations, 2u);
  ASSERT_EQ(filter.remove(keys.data(), 5000, nullptr), 5000u);
  std::vector<uint8_t> status(keys.size());
  const uint64_t stored = filter.insert(keys.data(), keys.size(), status.data(), false);
  EXPECT_GT(stored, filter.info().num_slots * 94 / 100);
  // What failed has left no trace.
  const uint64_t hash = filter.words_hash();
  std::vector<uint64_t> in;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (status[i] == kOk) in.push_back(keys[i]);
  }
  ASSERT_EQ(in.size(), stored);
  for (size_t i = 0, tried = 0; i < keys.size() && tried < 20; ++i) {
    if (status[i] == kOk) continue;
    ++tried;
    if (filter.insert(&keys[i], 1, nullptr, false) == 0) {
      ASSERT_EQ(filter.words_hash(), hash);
    }
  }
  ASSERT_EQ(filter.contains(in.data(), in.size(), status.data()), in.size());
  filter.check();
}

TEST_P(GrownFilters, ManyCopiesOfOneKeyDoNotLookFull) {
  Filter filter(options(1000));
  const uint32_t limit = 2 * GetParam().slots;
  const std::vector<uint64_t> copies(200, 42);
  std::vector<uint8_t> status(copies.size());
  for (uint32_t generations = 1; generations <= 4; ++generations) {
    filter.insert(copies.data(), copies.size(), status.data(), false);
    EXPECT_EQ(filter.info().occupied, limit * generations);
    EXPECT_EQ(std::count(status.begin(), status.end(), kDupLimit), 200 - limit);
    EXPECT_EQ(filter.insert(copies.data(), 1, status.data(), true), 0u);
    EXPECT_EQ(status[0], kExists);
    uint32_t count = 0;
    filter.count(copies.data(), 1, &count);
    EXPECT_EQ(count, limit * generations);
    filter.grow(0);
  }
  EXPECT_EQ(filter.remove(copies.data(), copies.size(), nullptr), 4 * limit);
  filter.check();
}

TEST_P(GrownFilters, UniqueLooksInEveryGeneration) {
  Filter filter(options(1000));
  const auto keys = random_keys(4000, 8);
  std::vector<uint8_t> status(keys.size());
  filter.insert(keys.data(), 900, nullptr, false);
  filter.grow(0);
  filter.insert(keys.data() + 900, 900, nullptr, false);
  filter.grow(0);
  const uint64_t stored = filter.insert(keys.data(), 3000, status.data(), true);
  EXPECT_EQ(std::count(status.begin(), status.begin() + 1800, kExists), 1800);
  EXPECT_EQ(std::count(status.begin() + 1800, status.begin() + 3000, kOk), stored);
  EXPECT_GT(stored, 600u);  // the rest looks as if it were in
  EXPECT_EQ(filter.insert(keys.data(), 3000, nullptr, true), 0u);
}

TEST_P(GrownFilters, FalsePositivesAreAsTheFormulaSays) {
  Filter filter(options(20'000, 6));
  const auto keys = random_keys(130'000, 7);
  insert_growing(filter, keys);
  ASSERT_EQ(filter.info().generations, 3u);
  const uint64_t probes = GetParam().bits == 8 ? 200'000 : 2'000'000;
  const auto asked = random_keys(probes, 8);
  std::vector<uint8_t> out(probes);
  const auto hits = static_cast<double>(filter.contains(asked.data(), probes, out.data()));
  const double expected = filter.info().expected_fpr * static_cast<double>(probes);
  EXPECT_NEAR(hits, expected, 0.1 * expected);
}

TEST_P(GrownFilters, MergedOnesHoldWhatBothDid) {
  struct Sizes {
    size_t mine;
    uint32_t my_generations;
    size_t theirs;
    uint32_t their_generations;
  };
  for (const auto& [mine, my_generations, theirs, their_generations] :
       {Sizes{400, 1, 400, 1}, Sizes{1200, 2, 400, 1}, Sizes{400, 1, 1200, 2},
        Sizes{1500, 3, 1500, 2}, Sizes{2000, 2, 1200, 2}}) {
    Filter a(options(1000, 3)), b(options(1000, 3));
    while (a.info().generations < my_generations) a.grow(0);
    while (b.info().generations < their_generations) b.grow(0);
    const auto keys = random_keys(mine + theirs, mine);
    ASSERT_EQ(a.insert(keys.data(), mine, nullptr, false), mine);
    ASSERT_EQ(b.insert(keys.data() + mine, theirs, nullptr, false), theirs);
    const uint64_t before = b.words_hash();
    a.merge(b);
    EXPECT_EQ(b.words_hash(), before);
    EXPECT_EQ(a.info().occupied, keys.size());
    a.check();
    std::vector<uint8_t> found(keys.size());
    ASSERT_EQ(a.contains(keys.data(), keys.size(), found.data()), keys.size());
    // What came from either can go, and takes nothing else with it.
    ASSERT_EQ(a.remove(keys.data(), mine, nullptr), mine);
    ASSERT_EQ(a.contains(keys.data() + mine, theirs, found.data()), theirs);
    ASSERT_EQ(a.remove(keys.data() + mine, theirs, nullptr), theirs);
    EXPECT_EQ(a.info().occupied, 0u);
  }
}

TEST_P(GrownFilters, AMergeThatFailsChangesNothing) {
  Filter a(options(1000, 3)), b(options(1000, 3)), other(options(1000, 4));
  const auto keys = random_keys(1900, 4);
  ASSERT_EQ(a.insert(keys.data(), 950, nullptr, false), 950u);
  ASSERT_EQ(b.insert(keys.data() + 950, 950, nullptr, false), 950u);
  const uint64_t before = a.words_hash();
  for (const Filter* from : {&b, &other, &a}) {
    try {
      a.merge(*from);
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.status(), from == &b ? PYRT_EFULL : PYRT_EINVAL);
    }
    EXPECT_EQ(a.words_hash(), before);
    EXPECT_EQ(a.info().occupied, 950u);
  }
}

TEST_P(GrownFilters, CompactingGivesBackWhatDeletesLeftEmpty) {
  for (const uint64_t capacity : {16, 1000, 9000}) {
    Filter filter(options(capacity, 50));
    auto keys = random_keys(30'000, capacity);
    insert_growing(filter, keys);
    const uint32_t full = filter.info().generations;
    std::mt19937_64 random(4);
    std::shuffle(keys.begin(), keys.end(), random);
    while (filter.info().generations > 1) {
      const Info before = filter.info();
      const uint32_t dropped = filter.compact();
      const Info after = filter.info();
      filter.check();
      ASSERT_EQ(after.occupied, keys.size());
      ASSERT_EQ(after.generations + dropped, before.generations);
      ASSERT_GE(after.capacity, after.occupied);
      ASSERT_EQ(dropped > 0, after.bytes < before.bytes);
      std::vector<uint8_t> found(keys.size());
      ASSERT_EQ(filter.contains(keys.data(), keys.size(), found.data()), keys.size());
      const size_t left = keys.size() * 7 / 10;
      ASSERT_EQ(filter.remove(keys.data() + left, keys.size() - left, nullptr), keys.size() - left);
      keys.resize(left);
      ASSERT_EQ(filter.contains(keys.data(), keys.size(), found.data()), keys.size());
    }
    ASSERT_GE(full, 2u);
    ASSERT_GT(keys.size(), 0u);
    EXPECT_EQ(filter.compact(), 0u);
    ASSERT_EQ(filter.remove(keys.data(), keys.size(), nullptr), keys.size());
    EXPECT_EQ(filter.words_hash(), Filter(options(capacity, 50)).words_hash());
  }
}

TEST_P(GrownFilters, CompactedOnesHoldWhatTheyPromise) {
  Filter filter(options(5000, 3));
  const auto keys = random_keys(40'000, 12);
  while (filter.info().generations < 3) filter.grow(0);
  const uint64_t some = filter.info().capacity * 2 / 7;  // goes to the newest
  ASSERT_EQ(filter.insert(keys.data(), some, nullptr, false), some);
  ASSERT_EQ(filter.compact(), 1u);
  const uint64_t promised = filter.info().capacity;
  ASSERT_GT(promised, some);
  ASSERT_EQ(filter.insert(keys.data() + some, promised - some, nullptr, false), promised - some);
  std::vector<uint8_t> found(keys.size());
  ASSERT_EQ(filter.contains(keys.data(), promised, found.data()), promised);
  filter.check();
  // Now that it is full nothing moves.
  const uint64_t hash = filter.words_hash();
  EXPECT_EQ(filter.compact(), 0u);
  EXPECT_EQ(filter.words_hash(), hash);
}

// Copies of one key fill its buckets in each generation, so the newest cannot go; those of other
// keys that had gone to older ones by then are taken out of there again.
TEST_P(GrownFilters, CompactingThatFailsTakesNothingAndAddsNothing) {
  Filter filter(options(1000));
  const uint32_t limit = 2 * GetParam().slots;
  const std::vector<uint64_t> copies(limit, 42);
  auto keys = random_keys(900, 13);
  ASSERT_EQ(filter.insert(copies.data(), limit, nullptr, false), limit);
  filter.grow(0);
  ASSERT_EQ(filter.insert(copies.data(), limit, nullptr, false), limit);
  // One may have the same pair of buckets.
  std::erase_if(keys, [&](uint64_t key) { return filter.insert(&key, 1, nullptr, false) == 0; });
  ASSERT_GE(keys.size(), 895u);
  std::vector<uint32_t> before(keys.size()), after(keys.size());
  filter.count(keys.data(), keys.size(), before.data());
  EXPECT_EQ(filter.compact(), 0u);
  filter.check();
  EXPECT_EQ(filter.info().generations, 2u);
  EXPECT_EQ(filter.info().occupied, keys.size() + 2 * limit);
  filter.count(keys.data(), keys.size(), after.data());
  EXPECT_EQ(before, after);
  // One generation less is enough once there are fewer copies.
  ASSERT_EQ(filter.remove(copies.data(), limit, nullptr), limit);
  EXPECT_EQ(filter.compact(), 1u);
  ASSERT_EQ(filter.remove(copies.data(), limit, nullptr), limit);
  ASSERT_EQ(filter.remove(keys.data(), keys.size(), nullptr), keys.size());
  EXPECT_EQ(filter.info().occupied, 0u);
}

TEST_P(GrownFilters, BitsAreTheAnswersOfContains) {
  Filter filter(options(40'000, 5));
  const auto keys = random_keys(200'003, 5);
  for (int round = 0; round < 2; ++round) {
    insert_growing(filter, {keys.begin(), keys.begin() + 30'000});
    for (const size_t n : {1, 7, 8, 9, 1023, 1024, 1025, 65'537, 200'003}) {
      std::vector<uint8_t> out(n), bits((n + 7) / 8 + 1, 0xa5);
      const uint64_t present = filter.contains(keys.data(), n, out.data());
      ASSERT_EQ(filter.contains_bits(keys.data(), n, bits.data()), present);
      for (size_t i = 0; i < (n + 7) / 8 * 8; ++i) {
        ASSERT_EQ(bits[i / 8] >> i % 8 & 1, i < n ? out[i] : 0) << i;
      }
      ASSERT_EQ(bits.back(), 0xa5);
    }
    filter.grow(0);
  }
}

TEST_P(GrownFilters, ClearLeavesOneGeneration) {
  Filter filter(options(100));
  const Info before = filter.info();
  insert_growing(filter, random_keys(1000, 9));
  filter.clear();
  EXPECT_EQ(filter.info().occupied, 0u);
  EXPECT_EQ(filter.info().generations, 1u);
  EXPECT_EQ(filter.info().bytes, before.bytes);
  EXPECT_EQ(filter.info().capacity, 100u);
}

TEST_P(GrownFilters, DevicesTakeOneGeneration) {
  Filter filter(options(100)), other(options(100));
  const auto keys = random_keys(1000, 10);
  other.insert(keys.data(), 50, nullptr, false);
  std::vector<uint8_t> words(other.words_bytes());
  other.read_words(words.data());
  insert_growing(filter, keys);
  const auto refused = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.status() == PYRT_EUNSUPPORTED;
    }
    return false;
  };
  std::vector<uint8_t> out(filter.words_bytes());
  EXPECT_TRUE(refused([&] { filter.read_words(out.data()); }));
  EXPECT_TRUE(refused([&] { static_cast<void>(filter.view()); }));
  filter.write_words(words.data());
  EXPECT_EQ(filter.words_hash(), other.words_hash());
  EXPECT_EQ(filter.info().generations, 1u);
  filter.check();
}

TEST_P(GrownFilters, GrowthEndsWithATypedError) {
  Filter filter(options(1));
  try {
    for (int i = 0; i < 30; ++i) filter.grow(0);
    FAIL();
  } catch (const Error& error) {
    EXPECT_TRUE(error.status() == PYRT_EFULL || error.status() == PYRT_ENOMEM);
  }
  const uint64_t key = 1;
  uint8_t found = 0;
  EXPECT_EQ(filter.insert(&key, 1, nullptr, false), 1u);
  EXPECT_EQ(filter.contains(&key, 1, &found), 1u);
}

TEST_P(GrownFilters, FilesComeBackAndDamageIsRefused) {
  Filter filter(options(60, 9));
  const auto keys = random_keys(400, 10);
  insert_growing(filter, keys);
  std::vector<uint8_t> file(filter.file_bytes());
  filter.save(file.data(), file.size(), 1);
  uint8_t kind = 0;
  std::unique_ptr<Filter> back(Filter::load(file.data(), file.size(), &kind));
  EXPECT_EQ(back->words_hash(), filter.words_hash());
  EXPECT_EQ(back->info().generations, filter.info().generations);
  EXPECT_EQ(back->info().expected_fpr, filter.info().expected_fpr);
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
  std::vector<uint8_t> longer = file;
  longer.resize(file.size() + 64);
  EXPECT_TRUE(refused(longer, longer.size()));
  for (size_t bit = 0; bit < file.size() * 8; bit += bit < 128 * 8 ? 1 : 13) {
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
  EXPECT_TRUE(lie([](FileHeader& h) { ++h.generations; }));
  EXPECT_TRUE(lie([](FileHeader& h) { --h.generations; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.generations = 0; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.generations = 1; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.generations = 255; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.num_segments = kMaxSegments; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.num_segments *= 2; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.major = 1; }));
  EXPECT_TRUE(lie([](FileHeader& h) { h.major = 3; }));
  EXPECT_TRUE(lie([](FileHeader& h) { ++h.occupied; }));
}

// While a key is moved in the newer table, deletes of keys that collide with it take both copies of
// it, though their own are in the older table. The mover's undo then has to look there.
TEST(FilterInterleavings, ASpoiltMoveIsUndoneInAnOlderGeneration) {
  using E = Exclusive;
  int undone = 0;
  for (size_t victim = 0; victim < 2000; ++victim) {
    std::vector<uint64_t> old_words(4), new_words(8);
    std::vector<uint32_t> old_epochs(1), new_epochs(2);
    std::vector<uint64_t> counters(kNumCounters);
    const View coarse{old_words.data(), old_epochs.data(), counters.data(), 1, 3, 4, 3};
    const View fine{new_words.data(), new_epochs.data(), counters.data(), 2, 3, 4, 3, &coarse};
    std::vector<uint64_t> in;  // each of them is in both
    for (uint64_t key = 1; key < 3000 && in.size() < 31; ++key) {
      const Position p = locate<8>(fine, key);
      if (p.segment != 0) continue;
      if (insert<E, 8, 8>(fine, p) != kOk) continue;
      ASSERT_EQ((insert<E, 8, 8>(coarse, locate<8>(coarse, key))), kOk);
      in.push_back(key);
    }
    const uint64_t chosen = in[victim % in.size()];
    uint64_t deleted = 0;
    bool undoing = false;
    Hooked::hook = [&](Step step) {
      undoing |= step == Step::undoing;
      if (step != Step::copied || deleted != 0) return;
      const Position p = locate<8>(fine, chosen);
      while (count<E, 8, 8>(fine, p) != 0) {
        ASSERT_TRUE((remove<E, 8, 8>(fine, p)));
        ++new_epochs[0];
        ++deleted;
      }
    };
    uint64_t fresh = 100'000 + victim;
    while (locate<8>(fine, fresh).segment != 0) fresh += 1000;
    const Status status = insert<Hooked, 8, 8>(fine, locate<8>(fine, fresh));
    Hooked::hook = nullptr;
    uint64_t copies = 0;
    for (const auto* words : {&old_words, &new_words}) {
      for (const uint64_t word : *words) {
        copies += 8 - static_cast<uint64_t>(count_bits(zero_lanes<8, 8>(word)));
      }
    }
    EXPECT_EQ(copies, 2 * in.size() + (status == kOk) - deleted) << victim;
    undone += undoing && deleted > 0;
  }
  EXPECT_GE(undone, 10);
}

}  // namespace
}  // namespace pyruntime::filter
