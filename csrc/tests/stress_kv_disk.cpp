// Threads that put, get and match beside each other in a tier that is far too small for them, while
// another damages payloads: nobody may be handed anything but the right data.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <thread>

#include "tests/support/kv_disk.hpp"

namespace kv = pyruntime::kv;
using kv::DiskFound;
using kv::test::Items;

namespace {

constexpr uint64_t kItem = 4096;

void work(kv::Disk& disk, uint64_t seed, int steps, std::atomic<uint64_t>& hits) {
  std::mt19937_64 random(seed);
  for (int step = 0; step < steps; ++step) {
    std::vector<uint64_t> numbers(1 + random() % 5);
    const uint64_t first = random() % 60;
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = first + i;
    const Items items(numbers, kItem);
    const uint64_t action = random() % 8;
    if (action < 2) {
      try {
        disk.put(items.keys.data(), numbers.size(), items.data.data());
      } catch (const pyruntime::Error& error) {
        EXPECT_EQ(error.status(), PYRT_EIO);
      }
    } else if (action < 3) {
      EXPECT_LE(disk.match(items.keys.data(), numbers.size()), numbers.size());
    } else if (action < 4 && seed == 1) {
      disk.fail_io(1 + static_cast<int64_t>(random() % 20), kv::DiskFault::io);
    } else {
      std::vector<uint8_t> out(items.data.size());
      std::vector<DiskFound> found(numbers.size());
      disk.get(items.keys.data(), numbers.size(), out.data(), found.data());
      for (size_t i = 0; i < numbers.size(); ++i) {
        if (found[i] != DiskFound::hit) continue;
        ++hits;
        EXPECT_TRUE(std::equal(out.begin() + static_cast<std::ptrdiff_t>(i * kItem),
                               out.begin() + static_cast<std::ptrdiff_t>((i + 1) * kItem),
                               items.data.begin() + static_cast<std::ptrdiff_t>(i * kItem)));
      }
    }
  }
}

TEST(KvDiskStress, OnlyRightDataIsHandedOut) {
  char folder[] = "/tmp/pyruntime-kv-disk-XXXXXX";
  ASSERT_NE(mkdtemp(folder), nullptr);
  const std::string path = std::string(folder) + "/blocks";
  kv::Disk disk(path, {kItem, 2 * 4096 + 24 * kItem, "stress"});
  std::atomic<uint64_t> hits{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  for (uint64_t seed = 1; seed < 5; ++seed) {
    threads.emplace_back([&, seed] { work(disk, seed, 250, hits); });
  }
  std::thread damage([&] {
    const int file = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
    std::mt19937_64 random(9);
    while (!done) {
      const char byte = static_cast<char>(random());
      const uint64_t offset = 2 * 4096 + random() % (24 * kItem);
      EXPECT_EQ(pwrite(file, &byte, 1, static_cast<off_t>(offset)), 1);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    ::close(file);
  });
  for (std::thread& thread : threads) thread.join();
  done = true;
  damage.join();
  disk.check();
  const kv::DiskStats stats = disk.stats();
  EXPECT_GT(hits.load(), 0u);
  EXPECT_GT(stats.corrupt, 0u);
  EXPECT_GT(stats.evicted, 0u);
  EXPECT_EQ(stats.hits, hits.load());
  std::filesystem::remove_all(folder);
}

}  // namespace
