#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "pyruntime/pool.h"

namespace {

struct Handle {
  explicit Handle(pyrt_pool_options options) { status = pyrt_pool_create(&options, &pool); }
  Handle(Handle&& other) noexcept : pool(other.pool), status(other.status) { other.pool = nullptr; }
  ~Handle() { EXPECT_EQ(pyrt_pool_destroy(pool, 0), PYRT_OK) << pyrt_last_error(); }
  pyrt_pool_statistics statistics() const {
    pyrt_pool_statistics s;
    s.struct_size = sizeof s;
    EXPECT_EQ(pyrt_pool_get_statistics(pool, &s), PYRT_OK);
    return s;
  }
  pyrt_pool* pool = nullptr;
  pyrt_status status;
};

pyrt_pool_options options_of(uint64_t object_bytes, uint64_t capacity) {
  pyrt_pool_options o;
  pyrt_pool_options_init(&o);
  o.object_bytes = object_bytes;
  o.capacity = capacity;
  return o;
}

void expect_sound(const Handle& h) {
  ASSERT_EQ(pyrt_pool_check(h.pool), PYRT_OK) << pyrt_last_error();
  const auto s = h.statistics();
  EXPECT_EQ(s.capacity, s.in_use + s.cached + s.depot);
}

TEST(Pool, HandsOutEveryObjectOnceAndNoMore) {
  for (uint64_t bytes : {1u, 8u, 64u, 100u, 2048u, 65536u, 70000u, 3u << 20}) {
    for (uint64_t capacity : {1u, 2u, 255u, 256u, 257u, 1000u}) {
      if (bytes * capacity > (64u << 20)) continue;
      Handle h(options_of(bytes, capacity));
      ASSERT_EQ(h.status, PYRT_OK) << pyrt_last_error();
      std::set<void*> seen;
      while (void* object = pyrt_pool_get(h.pool)) {
        std::memset(object, 0xA5, bytes);
        ASSERT_TRUE(seen.insert(object).second);
        const int64_t index = pyrt_pool_index_of(h.pool, object);
        ASSERT_GE(index, 0);
        ASSERT_EQ(pyrt_pool_ptr_of(h.pool, static_cast<uint64_t>(index)), object);
      }
      EXPECT_EQ(seen.size(), capacity) << bytes;
      expect_sound(h);
      for (void* object : seen) ASSERT_EQ(pyrt_pool_put(h.pool, object), PYRT_OK);
      expect_sound(h);
      EXPECT_EQ(h.statistics().in_use, 0u);
    }
  }
}

TEST(Pool, ColoursPowerOfTwoStridesUnlessAlignmentIsAsked) {
  Handle coloured(options_of(2048, 10));
  pyrt_pool_layout layout;
  layout.struct_size = sizeof layout;
  ASSERT_EQ(pyrt_pool_get_layout(coloured.pool, &layout), PYRT_OK);
  EXPECT_EQ(layout.stride, 2112u);
  auto o = options_of(2048, 10);
  o.align = 2048;
  Handle aligned(o);
  ASSERT_EQ(pyrt_pool_get_layout(aligned.pool, &layout), PYRT_OK);
  EXPECT_EQ(layout.stride, 2048u);
}

TEST(Pool, BulkIsAllOrNothing) {
  Handle h(options_of(64, 1000));
  std::vector<void*> objects(1001);
  EXPECT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 1001), PYRT_EFULL);
  expect_sound(h);
  EXPECT_EQ(h.statistics().in_use, 0u);
  ASSERT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 1000), PYRT_OK);
  EXPECT_EQ(std::set<void*>(objects.begin(), objects.begin() + 1000).size(), 1000u);
  objects[999] = &h;  // foreign: nothing of the list may be taken
  EXPECT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 1000), PYRT_EINVAL);
  EXPECT_EQ(h.statistics().in_use, 1000u);
  EXPECT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 999), PYRT_OK);
  EXPECT_EQ(pyrt_pool_destroy(h.pool, 0), PYRT_ESTATE);
  EXPECT_NE(std::string(pyrt_last_error()).find("1 objects"), std::string::npos);
  pyrt_pool_destroy(h.pool, 1);
  h.pool = nullptr;
}

TEST(Pool, RefusesForeignAndMisalignedPointers) {
  Handle h(options_of(100, 50));
  int local = 0;
  void* object = pyrt_pool_get(h.pool);
  EXPECT_EQ(pyrt_pool_put(h.pool, &local), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_put(h.pool, nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_put(h.pool, static_cast<char*>(object) + 1), PYRT_EINVAL);
  EXPECT_NE(std::string(pyrt_last_error()).find("not the start"), std::string::npos);
  pyrt_pool_layout layout;
  layout.struct_size = sizeof layout;
  pyrt_pool_get_layout(h.pool, &layout);
  void* beyond = static_cast<char*>(layout.base) + 50 * layout.stride;
  EXPECT_EQ(pyrt_pool_put(h.pool, beyond), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_put(h.pool, object), PYRT_OK);
  expect_sound(h);
}

TEST(Pool, StateChecksFindDoubleReleaseAndOverwrites) {
  auto o = options_of(64, 10);
  o.check = PYRT_CHECK_STATE;
  Handle h(o);
  void* a = pyrt_pool_get(h.pool);
  void* b = pyrt_pool_get(h.pool);
  void* twice[] = {a, b, a};
  EXPECT_EQ(pyrt_pool_put_bulk(h.pool, twice, 3), PYRT_ESTATE);
  EXPECT_EQ(h.statistics().in_use, 2u);
  EXPECT_EQ(pyrt_pool_put(h.pool, a), PYRT_OK);
  EXPECT_EQ(pyrt_pool_put(h.pool, a), PYRT_ESTATE);
  EXPECT_NE(std::string(pyrt_last_error()).find("twice"), std::string::npos);
  static_cast<char*>(a)[63] = 1;  // use after release
  EXPECT_EQ(pyrt_pool_get(h.pool), a);
  EXPECT_EQ(h.statistics().overwrites, 1u);
  EXPECT_EQ(pyrt_pool_put(h.pool, a), PYRT_OK);
  EXPECT_EQ(pyrt_pool_put(h.pool, b), PYRT_OK);
  expect_sound(h);
}

TEST(PoolDeathTest, GuardModeTrapsOverrunsAndUseAfterRelease) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  auto o = options_of(4096, 10);
  o.check = PYRT_CHECK_GUARD;
  Handle h(o);
  auto* object = static_cast<volatile char*>(pyrt_pool_get(h.pool));
  object[4095] = 1;
  EXPECT_DEATH(object[4096] = 1, "");
  EXPECT_EQ(pyrt_pool_put(h.pool, const_cast<char*>(object)), PYRT_OK);
  EXPECT_DEATH(object[0] = 1, "");
  EXPECT_EQ(pyrt_pool_put(h.pool, const_cast<char*>(object)), PYRT_ESTATE);
}

TEST(Pool, GrowsUpToItsLimit) {
  auto o = options_of(1 << 16, 10);
  o.max_capacity = 500;
  Handle h(o);
  std::vector<void*> objects(500);
  ASSERT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 500), PYRT_OK) << pyrt_last_error();
  EXPECT_EQ(pyrt_pool_get(h.pool), nullptr);
  EXPECT_GT(h.statistics().grows, 0u);
  EXPECT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 500), PYRT_OK);
  expect_sound(h);
}

TEST(Pool, LastObjectIsReachableFromAnyThread) {
  Handle h(options_of(64, 100));
  std::thread([&] {  // takes all, gives all back, and stays idle with them in its cache
    std::vector<void*> objects(100);
    ASSERT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 100), PYRT_OK);
    ASSERT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 100), PYRT_OK);
    std::thread([&] {
      std::vector<void*> all(100);
      ASSERT_EQ(pyrt_pool_get_bulk(h.pool, all.data(), 100), PYRT_OK) << pyrt_last_error();
      ASSERT_EQ(pyrt_pool_put_bulk(h.pool, all.data(), 100), PYRT_OK);
    }).join();
    EXPECT_GT(h.statistics().steals, 0u);
  })
      .join();
  std::vector<void*> all(100);  // and after both have ended
  ASSERT_EQ(pyrt_pool_get_bulk(h.pool, all.data(), 100), PYRT_OK) << pyrt_last_error();
  ASSERT_EQ(pyrt_pool_put_bulk(h.pool, all.data(), 100), PYRT_OK);
  expect_sound(h);
}

TEST(Pool, ThreadBirthsAndDeathsDoNotGrowIt) {
  Handle h(options_of(64, 64));
  for (int i = 0; i < 500; ++i) {
    std::thread([&] {
      void* object = pyrt_pool_get(h.pool);
      ASSERT_NE(object, nullptr);
      ASSERT_EQ(pyrt_pool_put(h.pool, object), PYRT_OK);
    }).join();
  }
  EXPECT_LE(h.statistics().num_caches, 1u);
  expect_sound(h);
}

TEST(Pool, TrimGivesUnitsBackAndTheyReturn) {
  Handle h(options_of(1 << 16, 300));
  std::vector<void*> objects(300);
  ASSERT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 300), PYRT_OK);
  for (void* object : objects) std::memset(object, 1, 1 << 16);
  void* kept = objects.back();
  ASSERT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 299), PYRT_OK);
  uint64_t released = 0;
  ASSERT_EQ(pyrt_pool_trim(h.pool, &released), PYRT_OK);
  EXPECT_GE(released, 8u << 20);
  EXPECT_EQ(static_cast<char*>(kept)[100], 1);
  expect_sound(h);
  ASSERT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 299), PYRT_OK) << pyrt_last_error();
  EXPECT_EQ(std::set<void*>(objects.begin(), objects.end()).size(), 300u);
  ASSERT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 300), PYRT_OK);
  expect_sound(h);
}

TEST(Pool, IndicesNameObjects) {
  Handle h(options_of(2048, 600));
  std::vector<uint32_t> indices(600);
  ASSERT_EQ(pyrt_pool_get_indices(h.pool, indices.data(), 600), PYRT_OK);
  EXPECT_EQ(*std::max_element(indices.begin(), indices.end()), 599u);
  uint32_t one;
  EXPECT_EQ(pyrt_pool_get_indices(h.pool, &one, 1), PYRT_EFULL);
  const uint32_t bad = 600;
  EXPECT_EQ(pyrt_pool_put_indices(h.pool, &bad, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_put_indices(h.pool, indices.data(), 600), PYRT_OK);
  expect_sound(h);
}

TEST(Pool, RefusesBadOptionsByName) {
  const auto refused = [](auto change, const char* name) {
    auto o = options_of(64, 10);
    change(o);
    pyrt_pool* pool = nullptr;
    EXPECT_EQ(pyrt_pool_create(&o, &pool), PYRT_EINVAL) << name;
    EXPECT_EQ(pool, nullptr);
    EXPECT_NE(std::string(pyrt_last_error()).find(name), std::string::npos) << pyrt_last_error();
  };
  refused([](auto& o) { o.struct_size = 0; }, "struct_size");
  refused([](auto& o) { o.object_bytes = 0; }, "object_bytes");
  refused([](auto& o) { o.object_bytes = ~uint64_t{0}; }, "object_bytes");
  refused([](auto& o) { o.capacity = 0; }, "capacity");
  refused([](auto& o) { o.capacity = ~uint64_t{0}; }, "capacity");
  refused([](auto& o) { o.max_capacity = 5; }, "max_capacity");
  refused([](auto& o) { o.align = 3; }, "align");
  refused([](auto& o) { o.align = uint64_t{1} << 40; }, "align");
  refused([](auto& o) { o.pages = 9; }, "pages");
  refused([](auto& o) { o.prefault = 9; }, "prefault");
  refused([](auto& o) { o.check = 9; }, "check");
  refused([](auto& o) { o.fork = 9; }, "fork");
  refused([](auto& o) { o.node = 99; }, "node");
  refused([](auto& o) { o.cache_objects = 1; }, "cache_objects");
  refused([](auto& o) { o.check = PYRT_CHECK_GUARD, o.prefault = PYRT_PREFAULT_SYNC; }, "prefault");
}

TEST(Pool, TooMuchMemoryIsATypedError) {
  auto o = options_of(1 << 20, uint64_t{1} << 40);
  pyrt_pool* pool = nullptr;
  EXPECT_EQ(pyrt_pool_create(&o, &pool), PYRT_ENOMEM);
}

TEST(Pool, NullHandlesAreRefused) {
  void* object = nullptr;
  uint32_t index = 0;
  EXPECT_EQ(pyrt_pool_create(nullptr, nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_destroy(nullptr, 0), PYRT_OK);
  EXPECT_EQ(pyrt_pool_get(nullptr), nullptr);
  EXPECT_EQ(pyrt_pool_put(nullptr, object), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_get_bulk(nullptr, &object, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_put_bulk(nullptr, &object, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_get_indices(nullptr, &index, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_put_indices(nullptr, &index, 1), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_ptr_of(nullptr, 0), nullptr);
  EXPECT_EQ(pyrt_pool_index_of(nullptr, &object), -1);
  EXPECT_EQ(pyrt_pool_prefault(nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_trim(nullptr, nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_flush_thread(nullptr), PYRT_EINVAL);
  EXPECT_EQ(pyrt_pool_check(nullptr), PYRT_EINVAL);
  pyrt_pool_options_init(nullptr);
}

int in_child(auto body) {
  const pid_t child = fork();
  if (child == 0) _exit(body() ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST(Pool, ForkedChildHasItsOwnCopy) {
  Handle h(options_of(64, 512));
  std::vector<void*> objects(100);
  ASSERT_EQ(pyrt_pool_get_bulk(h.pool, objects.data(), 100), PYRT_OK);
  EXPECT_EQ(0, in_child([&] {
              std::vector<void*> rest(412);
              return pyrt_pool_get_bulk(h.pool, rest.data(), 412) == PYRT_OK &&
                     pyrt_pool_get(h.pool) == nullptr &&
                     pyrt_pool_put_bulk(h.pool, objects.data(), 100) == PYRT_OK &&
                     pyrt_pool_check(h.pool) == PYRT_OK;
            }));
  EXPECT_EQ(h.statistics().in_use, 100u);
  ASSERT_EQ(pyrt_pool_put_bulk(h.pool, objects.data(), 100), PYRT_OK);
}

TEST(Pool, ExcludedFromForkMeansTypedErrors) {
  auto o = options_of(64, 512);
  o.fork = PYRT_FORK_EXCLUDE;
  o.prefault = PYRT_PREFAULT_BACKGROUND;
  Handle h(o);
  void* object = pyrt_pool_get(h.pool);
  EXPECT_EQ(0, in_child([&] {
              void* other;
              return pyrt_pool_get(h.pool) == nullptr &&
                     pyrt_pool_put(h.pool, object) == PYRT_ESTATE &&
                     pyrt_pool_get_bulk(h.pool, &other, 1) == PYRT_ESTATE;
            }));
  EXPECT_EQ(pyrt_pool_put(h.pool, object), PYRT_OK);
}

TEST(Pool, PrefaultFillsWithHugePagesWhereTheKernelGivesThem) {
  auto o = options_of(4096, 4096);
  o.prefault = PYRT_PREFAULT_SYNC;
  Handle h(o);
  const auto s = h.statistics();
  EXPECT_LE(s.huge_bytes, s.committed_bytes);
  o.pages = PYRT_PAGES_4K;
  Handle small(o);
  EXPECT_EQ(small.statistics().huge_bytes, 0u);
}

TEST(Pool, HugetlbFallsBackAndSaysSo) {
  auto o = options_of(4096, 1 << 20);  // 4 GiB: more than anyone reserved
  o.pages = PYRT_PAGES_HUGETLB;
  Handle h(o);
  ASSERT_EQ(h.status, PYRT_OK);
  EXPECT_GT(h.statistics().fallbacks, 0u);
  void* object = pyrt_pool_get(h.pool);
  std::memset(object, 1, 4096);
  EXPECT_EQ(pyrt_pool_put(h.pool, object), PYRT_OK);
}

}  // namespace
