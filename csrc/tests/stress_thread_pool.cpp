#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

#include "base/status.hpp"
#include "base/thread_pool.hpp"

namespace pyruntime::base {
namespace {

int64_t sum_by_pool(int64_t count, int64_t grain) {
  std::vector<int64_t> seen(static_cast<size_t>(count));
  ThreadPool::process().parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)] += i + 1;
  });
  return std::accumulate(seen.begin(), seen.end(), int64_t{0});
}

TEST(ThreadPool, CoversEveryIndexOnceAtEverySize) {
  for (int size : {1, 2, 3, 8}) {
    ThreadPool::process().resize(size);
    for (int64_t count : {0, 1, 2, 7, 1000}) {
      for (int64_t grain : {0, 1, 3, 1000, 5000}) {
        EXPECT_EQ(sum_by_pool(count, grain), count * (count + 1) / 2) << size << ' ' << grain;
      }
    }
  }
}

TEST(ThreadPool, NestedCallsRunInline) {
  ThreadPool::process().resize(4);
  std::atomic<int64_t> total{0};
  ThreadPool::process().parallel_for(8, 1, [&](int64_t, int64_t) {
    ThreadPool::process().parallel_for(10, 1,
                                       [&](int64_t begin, int64_t end) { total += end - begin; });
  });
  EXPECT_EQ(total, 80);
}

TEST(ThreadPool, ManyCallersAtOnceWithResizes) {
  std::atomic<bool> stop{false};
  std::thread resizer([&] {
    for (int i = 0; !stop; ++i) ThreadPool::process().resize(1 + i % 5);
  });
  std::vector<std::thread> callers;
  for (int t = 0; t < 8; ++t) {
    callers.emplace_back([] {
      for (int i = 0; i < 200; ++i) ASSERT_EQ(sum_by_pool(100, 7), 5050);
    });
  }
  for (auto& caller : callers) caller.join();
  stop = true;
  resizer.join();
}

TEST(ThreadPool, RefusesBadSizes) {
  EXPECT_THROW(ThreadPool::process().resize(0), Error);
  EXPECT_THROW(ThreadPool::process().resize(ThreadPool::kMaxSize + 1), Error);
}

TEST(ThreadPool, RefusesResizeFromInsideAJob) {
  ThreadPool::process().resize(2);
  std::atomic<int> refused{0};
  ThreadPool::process().parallel_for(4, 1, [&](int64_t, int64_t) {
    try {
      ThreadPool::process().resize(3);
    } catch (const Error& error) {
      refused += error.status() == PYRT_ESTATE;
    }
  });
  EXPECT_EQ(refused, 4);
}

TEST(ThreadPool, WorksInAForkedChild) {
  ThreadPool::process().resize(4);
  ASSERT_EQ(sum_by_pool(1000, 1), 500500);
  const pid_t child = fork();
  if (child == 0) _exit(sum_by_pool(1000, 1) == 500500 ? 0 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(sum_by_pool(1000, 1), 500500);
}

}  // namespace
}  // namespace pyruntime::base
