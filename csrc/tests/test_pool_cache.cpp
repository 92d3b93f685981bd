// Explicit caches, their inlined calls, and the memory resource.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <list>
#include <memory_resource>
#include <set>
#include <thread>
#include <vector>

#include "pyruntime/pool_cache.hpp"
#include "pyruntime/pyruntime.h"

namespace pyruntime {
namespace {

class PoolCaches : public ::testing::TestWithParam<uint32_t> {
 protected:
  void SetUp() override { make(1000); }
  void make(uint64_t capacity, uint64_t max_capacity = 0) {
    pyrt_pool_destroy(pool_, 1);
    pyrt_pool_options options;
    pyrt_pool_options_init(&options);
    options.object_bytes = 4000;
    options.capacity = capacity;
    options.max_capacity = max_capacity;
    options.check = GetParam();
    ASSERT_EQ(pyrt_pool_create(&options, &pool_), PYRT_OK) << pyrt_last_error();
  }
  void TearDown() override {
    EXPECT_EQ(pyrt_pool_check(pool_), PYRT_OK) << pyrt_last_error();
    EXPECT_EQ(pyrt_pool_destroy(pool_, 0), PYRT_OK) << pyrt_last_error();
  }
  pyrt_pool* pool_ = nullptr;
};

TEST_P(PoolCaches, HandOutEveryObjectOnceAndTakeItBack) {
  make(1000, 5000);
  PoolCache cache(pool_);
  for (int round = 0; round < 3; ++round) {
    std::set<void*> out;
    while (void* object = cache.get()) EXPECT_TRUE(out.insert(object).second);
    EXPECT_EQ(out.size(), 5000u);
    for (void* object : out) EXPECT_EQ(cache.put(object), PYRT_OK) << pyrt_last_error();
  }
  std::vector<void*> bulk(5000);
  EXPECT_EQ(cache.get_bulk(bulk.data(), bulk.size()), PYRT_OK);
  EXPECT_EQ(cache.get_bulk(bulk.data(), 1), PYRT_EFULL);
  EXPECT_EQ(cache.put_bulk(bulk.data(), bulk.size()), PYRT_OK);
}

TEST_P(PoolCaches, ObjectsMoveBetweenCachesAndThreads) {
  PoolCache one(pool_), two(pool_);
  std::vector<void*> out;
  while (void* object = one.get()) out.push_back(object);
  ASSERT_EQ(out.size(), 1000u);
  for (void* object : out) EXPECT_EQ(two.put(object), PYRT_OK);
  // What lies in `two` is within everybody's reach.
  for (void*& object : out) EXPECT_NE(object = pyrt_pool_get(pool_), nullptr);
  std::thread([&] {
    EXPECT_EQ(pyrt_pool_put_bulk(pool_, out.data(), out.size()), PYRT_OK);
  }).join();
}

TEST_P(PoolCaches, RefuseWhatIsNoObject) {
  PoolCache cache(pool_);
  void* const object = cache.get();
  char elsewhere = 0;
  for (void* wrong : {static_cast<void*>(nullptr), static_cast<void*>(&elsewhere),
                      static_cast<void*>(static_cast<char*>(object) + 1)}) {
    EXPECT_EQ(cache.put(wrong), PYRT_EINVAL);
    EXPECT_EQ(cache.put_bulk(&wrong, 1), PYRT_EINVAL);
  }
  EXPECT_EQ(cache.put_bulk(nullptr, 1), PYRT_EINVAL);
  EXPECT_EQ(cache.get_bulk(nullptr, 1), PYRT_EINVAL);
  EXPECT_EQ(cache.put(object), PYRT_OK);
  if (GetParam() != PYRT_CHECK_RANGE) {
    EXPECT_EQ(cache.put(object), PYRT_ESTATE);
  }
  EXPECT_EQ(pyrt_pool_cache_get(nullptr), nullptr);
  EXPECT_EQ(pyrt_pool_cache_put(nullptr, object), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_cache_get_bulk(nullptr, nullptr, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_cache_put_bulk(nullptr, nullptr, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_cache_create(nullptr, nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_cache_create(pool_, nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_cache_destroy(nullptr), PYRT_OK);
  EXPECT_EQ(pyrt_pool_destroy(pool_, 0), PYRT_ESTATE);  // the cache is still there
}

TEST_P(PoolCaches, GoOnInAForkedChild) {
  PoolCache cache(pool_);
  void* const before = cache.get();
  const pid_t child = fork();
  if (child == 0) {
    std::set<void*> out;
    while (void* object = cache.get()) out.insert(object);
    const bool good = out.size() == 999 && cache.put(before) == PYRT_OK &&
                      pyrt_pool_put(pool_, *out.begin()) == PYRT_OK;
    _exit(good ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(cache.put(before), PYRT_OK);
}

TEST_P(PoolCaches, HoldNodesOfContainers) {
  PoolResource resource(pool_);
  {
    std::pmr::list<std::array<char, 3000>> list(&resource);
    for (int i = 0; i < 1000; ++i) list.emplace_back();
    EXPECT_EQ(pyrt_pool_get(pool_), nullptr);
    EXPECT_THROW(list.emplace_back(), std::bad_alloc);
    EXPECT_EQ(list.size(), 1000u);
    std::pmr::vector<char> large(10'000, &resource);  // from upstream
  }
  EXPECT_THROW(PoolResource(nullptr), std::invalid_argument);
  EXPECT_TRUE(resource.is_equal(PoolResource(pool_)));
}

INSTANTIATE_TEST_SUITE_P(Checks, PoolCaches, ::testing::Values(PYRT_CHECK_RANGE, PYRT_CHECK_STATE));

}  // namespace
}  // namespace pyruntime
