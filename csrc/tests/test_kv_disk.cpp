// The disk tier: beside a model, and after every crash, fault and damage.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <list>
#include <numeric>
#include <set>

#include "tests/support/kv_disk.hpp"

namespace kv = pyruntime::kv;
namespace fs = std::filesystem;
using kv::Disk;
using kv::DiskFault;
using kv::DiskFound;
using kv::DiskOptions;
using kv::test::Items;
using kv::test::Medium;
using kv::test::SimulatedFile;

namespace {

constexpr uint64_t kItem = 5000;  // no multiple of a page

DiskOptions options_of(uint64_t slots, uint64_t item_bytes = kItem) {
  const uint64_t slot = (item_bytes + 4095) / 4096 * 4096;
  return {item_bytes, 4096 + (slots * 64 + 4095) / 4096 * 4096 + slots * slot, "model|16|float32"};
}

pyrt_status status_of(const std::function<void()>& call) {
  try {
    call();
    return PYRT_OK;
  } catch (const pyruntime::Error& error) {
    return error.status();
  }
}

uint64_t put(Disk& disk, const std::vector<uint64_t>& numbers) {
  const Items items(numbers, disk.item_bytes());
  return disk.put(items.keys.data(), numbers.size(), items.data.data());
}

// What is found; the data of hits must be right, and no other data may be handed out.
std::vector<DiskFound> get(Disk& disk, const std::vector<uint64_t>& numbers) {
  const Items items(numbers, disk.item_bytes());
  std::vector<uint8_t> out(items.data.size(), 0xee);
  std::vector<DiskFound> found(numbers.size(), DiskFound::corrupt);
  disk.get(items.keys.data(), numbers.size(), out.data(), found.data());
  for (size_t i = 0; i < numbers.size(); ++i) {
    const auto at = static_cast<std::ptrdiff_t>(i * disk.item_bytes());
    const auto bytes = static_cast<std::ptrdiff_t>(disk.item_bytes());
    std::vector<uint8_t> expected(disk.item_bytes(), 0);
    if (found[i] == DiskFound::hit)
      expected = {items.data.begin() + at, items.data.begin() + at + bytes};
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), out.begin() + at)) << numbers[i];
  }
  return found;
}

std::set<uint64_t> there(Disk& disk, uint64_t numbers) {
  std::set<uint64_t> found;
  for (uint64_t i = 0; i < numbers; ++i) {
    if (get(disk, {i})[0] == DiskFound::hit) found.insert(i);
  }
  return found;
}

std::vector<uint64_t> from_to(uint64_t first, uint64_t end) {
  std::vector<uint64_t> numbers(end - first);
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

class KvDisk : public testing::Test {
 protected:
  KvDisk() {
    char name[] = "/tmp/pyruntime-kv-disk-XXXXXX";
    folder_ = mkdtemp(name);
    path_ = folder_ + "/blocks";
  }
  ~KvDisk() override { fs::remove_all(folder_); }

  std::vector<char> bytes() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void write(const std::vector<char>& bytes) const {
    std::ofstream(path_, std::ios::binary | std::ios::trunc)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }

  std::string folder_, path_;
};

TEST_F(KvDisk, KeepsItemsAcrossReopening) {
  const DiskOptions options = options_of(12);
  {
    Disk disk(path_, options);
    EXPECT_EQ(disk.stats().capacity, 11u);
    EXPECT_EQ(put(disk, {1, 2, 3, 2}), 3u);
    EXPECT_EQ(put(disk, {3, 4}), 1u);
    EXPECT_EQ(get(disk, {4, 9, 1}), (std::vector{DiskFound::hit, DiskFound::miss, DiskFound::hit}));
    const Items some({1, 2, 3, 9, 4}, kItem);
    EXPECT_EQ(disk.match(some.keys.data(), 5), 3u);
    EXPECT_EQ(disk.match(some.keys.data() + 96, 2), 0u);
    disk.check();
    struct stat found{};
    ASSERT_EQ(stat(path_.c_str(), &found), 0);
    EXPECT_EQ(found.st_mode & 0777u, 0600u);
    EXPECT_EQ(static_cast<uint64_t>(found.st_size), disk.stats().file_bytes);
    EXPECT_LE(disk.stats().file_bytes, options.capacity_bytes);
  }
  Disk disk(path_, options);
  EXPECT_EQ(there(disk, 10), (std::set<uint64_t>{1, 2, 3, 4}));
  EXPECT_EQ(disk.stats().corrupt, 0u);
  EXPECT_EQ(put(disk, {1, 4}), 0u);
  disk.check();
}

TEST_F(KvDisk, RunsOfWholePagesAreReadAndWrittenAtOnce) {
  Disk disk(path_, options_of(80, 8192));
  EXPECT_EQ(put(disk, from_to(0, 75)), 75u);
  std::vector<uint64_t> numbers = from_to(0, 75);
  EXPECT_EQ(get(disk, numbers), std::vector<DiskFound>(75, DiskFound::hit));
  std::reverse(numbers.begin() + 10, numbers.begin() + 40);
  numbers.insert(numbers.begin() + 60, {500, 3, 3});
  const std::vector<DiskFound> found = get(disk, numbers);
  EXPECT_EQ(std::count(found.begin(), found.end(), DiskFound::miss), 1);
  disk.check();
}

TEST_F(KvDisk, EvictsWhatWasUsedLongestAgo) {
  const DiskOptions options = options_of(9);  // 8 items
  {
    Disk disk(path_, options);
    put(disk, from_to(0, 8));  // 7 is the oldest
    get(disk, {7});
    EXPECT_EQ(put(disk, {20, 21}), 2u);
    EXPECT_EQ(there(disk, 30), (std::set<uint64_t>{0, 1, 2, 3, 4, 7, 20, 21}));
    EXPECT_EQ(disk.stats().evicted, 2u);
    // More than there is room for: the first, and nothing of the call evicts them.
    EXPECT_EQ(put(disk, from_to(40, 60)), 8u);
    EXPECT_EQ(there(disk, 60).size(), 8u);
    EXPECT_EQ(*there(disk, 60).rbegin(), 47u);
  }
  {
    Disk disk(path_, options);  // the order is that of the puts, 40 the latest
    put(disk, {1, 2});
    EXPECT_EQ(there(disk, 60), (std::set<uint64_t>{1, 2, 40, 41, 42, 43, 44, 45}));
    disk.check();
  }
}

// Random calls beside a list in the order of use, with reopening.
TEST_F(KvDisk, DoesWhatAModelDoes) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    std::mt19937_64 random(seed);
    const DiskOptions options = options_of(20 + seed, 64 + seed);
    auto medium = std::make_shared<Medium>();
    auto disk = std::make_unique<Disk>(std::make_unique<SimulatedFile>(medium), "disk", options);
    const uint64_t capacity = disk->stats().capacity;
    std::list<uint64_t> model;  // the most recent first
    std::vector<uint64_t> put_order;
    const auto use = [&](const std::vector<uint64_t>& numbers, size_t n, bool add) {
      for (size_t i = n; i-- > 0;) {
        const auto at = std::find(model.begin(), model.end(), numbers[i]);
        if (at == model.end() && !add) continue;
        if (at != model.end()) model.erase(at);
        model.push_front(numbers[i]);
      }
      while (model.size() > capacity) model.pop_back();
    };
    for (int step = 0; step < 400; ++step) {
      std::vector<uint64_t> numbers(random() % 8);
      for (uint64_t& number : numbers) number = random() % 40;
      const uint64_t action = random() % 8;
      if (action < 4) {
        put(*disk, numbers);
        use(numbers, numbers.size(), true);
      } else if (action < 6) {
        const std::vector<DiskFound> found = get(*disk, numbers);
        for (size_t i = 0; i < numbers.size(); ++i) {
          const bool known = std::find(model.begin(), model.end(), numbers[i]) != model.end();
          EXPECT_EQ(found[i], known ? DiskFound::hit : DiskFound::miss);
        }
        use(numbers, numbers.size(), false);
      } else if (action < 7) {
        size_t n = 0;
        while (n < numbers.size() &&
               std::find(model.begin(), model.end(), numbers[n]) != model.end()) {
          ++n;
        }
        const Items items(numbers, disk->item_bytes());
        EXPECT_EQ(disk->match(items.keys.data(), numbers.size()), n);
        use(numbers, n, false);
      }
      disk->check();
      EXPECT_EQ(disk->stats().items, model.size());
      if (random() % 50 == 0) {
        disk.reset();
        disk = std::make_unique<Disk>(std::make_unique<SimulatedFile>(medium), "disk", options);
        const std::set<uint64_t> found = there(*disk, 40);
        EXPECT_EQ(found, std::set<uint64_t>(model.begin(), model.end()));
        // Uses are not written: make the orders alike again.
        std::vector<uint64_t> all(found.begin(), found.end());
        get(*disk, all);
        model.assign(all.begin(), all.end());
      }
    }
  }
}

// A crash at every write and sync, also after one that failed earlier. Nothing half-written may be
// seen, not even by its checksum, and what was durable and not being evicted is there.
TEST_F(KvDisk, IsRightAfterEveryCrash) {
  const DiskOptions options = options_of(12, 700);  // rounds of one item
  const std::vector<std::vector<uint64_t>> puts = {from_to(0, 6),  {3, 7, 8},       from_to(10, 18),
                                                   {0, 1, 20, 21}, from_to(30, 44), {10, 50}};
  for (int64_t fails_at : {0, 31, 44}) {
    for (int64_t stop_at = 1;; ++stop_at) {
      auto medium = std::make_shared<Medium>();
      std::set<uint64_t> before, during;
      bool finished = false;
      try {
        Disk disk(std::make_unique<SimulatedFile>(medium, stop_at), "disk", options);
        disk.fail_io(fails_at, DiskFault::io);
        for (const std::vector<uint64_t>& numbers : puts) {
          during = {numbers.begin(), numbers.end()};
          before = there(disk, 60);
          try {
            put(disk, numbers);
          } catch (const pyruntime::Error& error) {
            disk.check();
            if (stop_at <= medium->writes_and_syncs) throw;
          }
        }
        finished = true;
      } catch (const pyruntime::Error& error) {
        EXPECT_STREQ(error.what(), "crashed");
      }
      for (uint64_t seed = 0; seed < (finished ? 1 : 5); ++seed) {
        auto left = std::make_shared<Medium>();
        left->content = left->durable = finished ? medium->durable : medium->after_crash(seed);
        std::unique_ptr<Disk> disk;
        const pyrt_status status = status_of([&] {
          disk = std::make_unique<Disk>(std::make_unique<SimulatedFile>(left), "disk", options);
        });
        if (stop_at <= 2) {  // while the file was made
          EXPECT_TRUE(status == PYRT_OK || status == PYRT_ECORRUPT) << status;
          if (status != PYRT_OK) continue;
        }
        ASSERT_EQ(status, PYRT_OK);
        disk->check();
        const std::set<uint64_t> found = there(*disk, 60);
        EXPECT_EQ(disk->stats().corrupt, 0u) << fails_at << " " << stop_at << " " << seed;
        std::vector<uint64_t> lost;
        for (const uint64_t number : before) {
          if (!found.contains(number) && !during.contains(number)) lost.push_back(number);
        }
        // One that failed may take the records of what it was about to evict, should it crash.
        EXPECT_LE(lost.size(), during.size() + (fails_at == 0 ? 0 : 1));
        put(*disk, from_to(0, 11));
        EXPECT_EQ(there(*disk, 11).size(), 11u);
      }
      if (finished) break;
    }
  }
}

TEST_F(KvDisk, LeavesThingsAsTheyWereWhenAWriteFails) {
  for (const DiskFault fault : {DiskFault::io, DiskFault::space}) {
    for (int64_t n = 1;; ++n) {
      auto medium = std::make_shared<Medium>();
      Disk disk(std::make_unique<SimulatedFile>(medium), "disk", options_of(17, 100));
      put(disk, from_to(0, 16));
      const std::set<uint64_t> before = there(disk, 60);
      disk.fail_io(n, fault);
      const pyrt_status status = status_of([&] { put(disk, {40}); });
      disk.fail_io(0, fault);
      disk.check();
      if (status == PYRT_OK) {
        EXPECT_GT(n, 4);
        break;
      }
      EXPECT_EQ(status, fault == DiskFault::io ? PYRT_EIO : PYRT_EFULL);
      EXPECT_EQ(disk.stats().failures, 1u);
      EXPECT_EQ(disk.stats().evicted, 0u);
      EXPECT_EQ(there(disk, 60), before);
      EXPECT_EQ(put(disk, {40}), 1u);
      EXPECT_EQ(there(disk, 60).size(), 16u);
      EXPECT_EQ(disk.stats().corrupt, 0u);
    }
  }
}

TEST_F(KvDisk, AFailedReadDropsNothing) {
  Disk disk(path_, options_of(17));
  put(disk, {1, 2, 3});
  disk.fail_io(2, DiskFault::read);
  EXPECT_EQ(status_of([&] { get(disk, {1, 2, 3}); }), PYRT_EIO);
  disk.check();
  EXPECT_EQ(disk.stats().failures, 1u);
  EXPECT_EQ(there(disk, 5).size(), 3u);
}

TEST_F(KvDisk, DropsWhatIsDamaged) {
  const DiskOptions options = options_of(17);
  Disk disk(path_, options);
  put(disk, {1, 2, 3});
  const std::vector<uint8_t> wanted = kv::test::payload_of(2, kItem);
  std::vector<char> all = bytes();
  const auto at = std::search(all.begin(), all.end(), wanted.begin(), wanted.end(),
                              [](char a, uint8_t b) { return static_cast<uint8_t>(a) == b; });
  ASSERT_NE(at, all.end());
  const auto offset = at - all.begin() + 4321;
  const char flipped = static_cast<char>(all[static_cast<size_t>(offset)] ^ 4);
  const int file = ::open(path_.c_str(), O_WRONLY);
  ASSERT_EQ(pwrite(file, &flipped, 1, offset), 1);
  ::close(file);
  EXPECT_EQ(get(disk, {1, 2, 2, 3}),
            (std::vector{DiskFound::hit, DiskFound::corrupt, DiskFound::corrupt, DiskFound::hit}));
  disk.check();
  EXPECT_EQ(get(disk, {2}), std::vector{DiskFound::miss});
  EXPECT_EQ(disk.stats().corrupt, 1u);
  EXPECT_EQ(disk.stats().items, 2u);
  EXPECT_EQ(put(disk, {2}), 1u);
  EXPECT_EQ(there(disk, 5).size(), 3u);
}

TEST_F(KvDisk, AnyFlippedByteIsFound) {
  const DiskOptions options = options_of(17, 300);
  {
    Disk disk(path_, options);
    put(disk, from_to(0, 20));
    put(disk, from_to(18, 22));
  }
  const std::vector<char> whole = bytes();
  std::mt19937 random(5);
  for (size_t at = 0; at < whole.size();) {
    std::vector<char> damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << random() % 8));
    auto medium = std::make_shared<Medium>();
    medium->content = medium->durable = damaged;
    std::unique_ptr<Disk> disk;
    const pyrt_status status = status_of([&] {
      disk = std::make_unique<Disk>(std::make_unique<SimulatedFile>(medium), "disk", options);
    });
    if (status != PYRT_OK) {
      EXPECT_LT(at, sizeof(kv::DiskHeader));
      EXPECT_TRUE(status == PYRT_ECORRUPT || status == PYRT_EVERSION) << status;
    } else {
      EXPECT_GE(at, sizeof(kv::DiskHeader));
      disk->check();
      EXPECT_GE(there(*disk, 25).size(), 15u) << at;  // which compares the data of hits
      disk->check();
    }
    // Every byte of header, records and payloads, and some of the padding.
    const bool padding = (at >= sizeof(kv::DiskHeader) && at < 4096) || at % 4096 >= 300;
    at += padding && at > 4096 + 17 * 64 ? 257 : at >= sizeof(kv::DiskHeader) && at < 4000 ? 96 : 3;
  }
}

TEST_F(KvDisk, AShorterFileLosesWhatIsBeyondItsEnd) {
  const DiskOptions options = options_of(17);
  {
    Disk disk(path_, options);
    put(disk, from_to(0, 16));
  }
  const std::vector<char> whole = bytes();
  for (const size_t size : {size_t{1}, sizeof(kv::DiskHeader) - 1, sizeof(kv::DiskHeader),
                            size_t{4096}, size_t{4096 + 100}, size_t{8192}, size_t{8192 + 5000},
                            whole.size() / 2, whole.size() - 8192, whole.size() - 1}) {
    write({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)});
    if (size < sizeof(kv::DiskHeader)) {
      EXPECT_EQ(status_of([&] { Disk disk(path_, options); }), PYRT_ECORRUPT);
      continue;
    }
    Disk disk(path_, options);
    EXPECT_EQ(disk.stats().items,
              size <= 8192
                  ? 0
                  : std::min<size_t>((size - 8192) / 8192 + (size % 8192 >= kItem ? 1 : 0), 16));
    there(disk, 20);
    EXPECT_EQ(disk.stats().corrupt, 0u);
    put(disk, from_to(0, 16));
    EXPECT_EQ(there(disk, 20).size(), 16u);
    disk.check();
  }
}

TEST_F(KvDisk, RefusesOtherFiles) {
  const DiskOptions options = options_of(17);
  {
    Disk disk(path_, options);
  }
  const auto opens = [&](const std::function<void(DiskOptions&)>& change) {
    DiskOptions changed = options;
    change(changed);
    return status_of([&] { Disk disk(path_, changed); });
  };
  EXPECT_EQ(opens([](DiskOptions&) {}), PYRT_OK);
  EXPECT_EQ(opens([](DiskOptions& o) { o.fingerprint = "other"; }), PYRT_EINVAL);
  EXPECT_EQ(opens([](DiskOptions& o) { o.item_bytes = 4999; }), PYRT_EINVAL);
  EXPECT_EQ(opens([](DiskOptions& o) { o.capacity_bytes *= 2; }), PYRT_EINVAL);
  EXPECT_EQ(opens([](DiskOptions& o) { o.capacity_bytes = 100; }), PYRT_EINVAL);
  std::vector<char> all = bytes();
  all[8] = 2;
  write(all);
  EXPECT_EQ(opens([](DiskOptions&) {}), PYRT_EVERSION);
  write(std::vector<char>(5000, 'x'));
  EXPECT_EQ(opens([](DiskOptions&) {}), PYRT_ECORRUPT);
  write(std::vector<char>(50000, 0));
  EXPECT_EQ(opens([](DiskOptions&) {}), PYRT_ECORRUPT);
  EXPECT_EQ(status_of([&] { Disk disk(folder_, options); }), PYRT_EIO);
  EXPECT_EQ(status_of([&] { Disk disk(folder_ + "/none/blocks", options); }), PYRT_ENOENT);
}

TEST_F(KvDisk, BelongsToOneProcess) {
  const DiskOptions options = options_of(17);
  Disk disk(path_, options);
  EXPECT_EQ(status_of([&] { Disk second(path_, options); }), PYRT_ESTATE);
  const pid_t child = fork();
  if (child == 0) {  // allocates nothing
    const uint8_t key[32] = {};
    try {
      (void)disk.match(key, 1);
    } catch (const pyruntime::Error& error) {
      _exit(error.status() == PYRT_ESTATE ? 0 : 2);
    }
    _exit(1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  put(disk, {1});
}

}  // namespace
