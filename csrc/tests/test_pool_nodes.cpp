// Pools on several nodes, on a topology that threads only claim to be on.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "pyruntime/pyruntime.h"

namespace pyruntime {
namespace {

constexpr uint64_t kEach = 600;  // objects of a node
constexpr int32_t kNodes[] = {2, 0, 5, 7};

thread_local int32_t claimed_node = 2;
int32_t claimed(void*) { return claimed_node; }

class NodePoolsTest : public ::testing::Test {
 protected:
  void SetUp() override { make(); }
  void make(uint32_t fork = PYRT_FORK_COW) {
    pyrt_node_pools_destroy(set_, 1);
    pyrt_pool_options options;
    pyrt_pool_options_init(&options);
    options.object_bytes = 64;
    options.capacity = kEach;
    options.fork = fork;
    ASSERT_EQ(pyrt_node_pools_create(&options, kNodes, 4, claimed, nullptr, &set_), PYRT_OK)
        << pyrt_last_error();
    claimed_node = kNodes[0];
  }
  void TearDown() override {
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(pyrt_pool_check(pyrt_node_pools_at(set_, i)), PYRT_OK) << pyrt_last_error();
    }
    EXPECT_EQ(pyrt_node_pools_destroy(set_, 0), PYRT_OK) << pyrt_last_error();
  }
  // Which of the nodes' pools has the object; 4: none.
  uint32_t owner(const void* object) const {
    uint32_t i = 0;
    while (i < 4 && pyrt_pool_index_of(pyrt_node_pools_at(set_, i), object) < 0) ++i;
    return i;
  }
  std::vector<void*> take(size_t n) {
    std::vector<void*> out;
    while (out.size() < n) {
      out.push_back(pyrt_node_pools_get(set_));
      EXPECT_NE(out.back(), nullptr);
    }
    return out;
  }
  void give(const std::vector<void*>& objects) {
    EXPECT_EQ(pyrt_node_pools_put_bulk(set_, objects.data(), objects.size()), PYRT_OK)
        << pyrt_last_error();
  }
  pyrt_node_pools* set_ = nullptr;
};

TEST_F(NodePoolsTest, AThreadGetsMemoryOfItsNode) {
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < 4; ++i) {
    threads.emplace_back([this, i] {
      claimed_node = kNodes[i];
      EXPECT_EQ(pyrt_node_pools_home(set_), pyrt_node_pools_at(set_, i));
      std::vector<void*> got = take(kEach);
      for (const void* object : got) EXPECT_EQ(owner(object), i);
      give(got);
      got.resize(300);
      EXPECT_EQ(pyrt_node_pools_get_bulk(set_, got.data(), got.size()), PYRT_OK);
      for (const void* object : got) EXPECT_EQ(owner(object), i);
      give(got);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pyrt_node_pools_borrowed(set_), 0u);
}

TEST_F(NodePoolsTest, ObjectsGoBackToTheirNode) {
  std::vector<void*> first = take(kEach);
  std::thread([&] {
    claimed_node = kNodes[1];
    for (void* object : first) EXPECT_EQ(pyrt_node_pools_put(set_, object), PYRT_OK);
  }).join();
  std::vector<void*> again = take(kEach);
  std::sort(first.begin(), first.end());
  std::sort(again.begin(), again.end());
  EXPECT_EQ(first, again);
  EXPECT_EQ(pyrt_node_pools_borrowed(set_), 0u);
  give(again);
}

TEST_F(NodePoolsTest, AnExhaustedNodeBorrowsInTheOrderOfTheList) {
  claimed_node = kNodes[2];
  const std::vector<void*> all = take(4 * kEach);
  EXPECT_EQ(pyrt_node_pools_get(set_), nullptr);
  EXPECT_EQ(std::set<void*>(all.begin(), all.end()).size(), all.size());
  for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(owner(all[i]), (2 + i / kEach) % 4);
  EXPECT_EQ(pyrt_node_pools_borrowed(set_), 3 * kEach);
  give(all);
}

TEST_F(NodePoolsTest, AListMaySpanNodesAndIsAllOrNone) {
  std::vector<void*> list(4 * kEach);
  ASSERT_EQ(pyrt_node_pools_get_bulk(set_, list.data(), list.size()), PYRT_OK);
  EXPECT_EQ(pyrt_node_pools_borrowed(set_), 3 * kEach);
  void* one = nullptr;
  EXPECT_EQ(pyrt_node_pools_get_bulk(set_, &one, 1), PYRT_EFULL);
  std::shuffle(list.begin(), list.end(), std::mt19937(1));
  void* const kept = list.back();
  list.back() = &list;
  EXPECT_EQ(pyrt_node_pools_put_bulk(set_, list.data(), list.size()), PYRT_EINVAL);
  EXPECT_EQ(pyrt_node_pools_get(set_), nullptr) << "a refused list has given nothing back";
  list.back() = kept;
  give(list);
  list.resize(4 * kEach + 1);
  EXPECT_EQ(pyrt_node_pools_get_bulk(set_, list.data(), list.size()), PYRT_EFULL);
  list.resize(4 * kEach);
  ASSERT_EQ(pyrt_node_pools_get_bulk(set_, list.data(), list.size()), PYRT_OK)
      << "a refused get has lost nothing";
  give(list);
}

TEST_F(NodePoolsTest, AThreadOfNoKnownNodeBelongsToTheFirst) {
  for (const int32_t node : {-1, 1, 63, 64, INT32_MAX, INT32_MIN}) {
    claimed_node = node;
    EXPECT_EQ(pyrt_node_pools_home(set_), pyrt_node_pools_at(set_, 0)) << node;
  }
}

TEST_F(NodePoolsTest, NodesThatAreNotThereFallBackAndAreCounted) {
  // No machine of ours has node 7; one that has would count nothing.
  int32_t real[64];
  const uint32_t n = std::min(pyrt_nodes(real, 64), 64u);
  pyrt_pool_statistics statistics;
  statistics.struct_size = sizeof statistics;
  ASSERT_EQ(pyrt_pool_get_statistics(pyrt_node_pools_at(set_, 3), &statistics), PYRT_OK);
  EXPECT_EQ(statistics.fallbacks > 0, std::find(real, real + n, 7) == real + n);
}

TEST_F(NodePoolsTest, AllNodesOfTheMachineByDefault) {
  pyrt_pool_options options;
  pyrt_pool_options_init(&options);
  options.object_bytes = 64;
  options.capacity = 10;
  pyrt_node_pools* set = nullptr;
  ASSERT_EQ(pyrt_node_pools_create(&options, nullptr, 0, nullptr, nullptr, &set), PYRT_OK);
  const uint32_t n = pyrt_nodes(nullptr, 0);
  EXPECT_NE(pyrt_node_pools_at(set, n - 1), nullptr);
  EXPECT_EQ(pyrt_node_pools_at(set, n), nullptr);
  EXPECT_NE(pyrt_node_pools_home(set), nullptr);
  EXPECT_EQ(pyrt_node_pools_destroy(set, 0), PYRT_OK);
}

// Threads that change node, trade objects with each other and write to what they hold.
TEST_F(NodePoolsTest, ThreadsThatMoveBetweenNodes) {
  std::array<std::atomic<void*>, 64> shelf{};
  std::vector<std::thread> threads;
  for (uint32_t id = 1; id <= 8; ++id) {
    threads.emplace_back([&, id] {
      std::mt19937 random(id);
      std::vector<void*> mine;
      const auto stamp = [&](void* object) { std::memcpy(object, &id, sizeof id); };
      const auto keep = [&](void* object) {
        stamp(object);
        mine.push_back(object);
      };
      const auto drop = [&] {
        uint32_t found = 0;
        std::memcpy(&found, mine.back(), sizeof found);
        EXPECT_EQ(found, id) << "somebody else had this object too";
        void* const object = mine.back();
        mine.pop_back();
        return object;
      };
      for (int i = 0; i < 3000; ++i) {
        if (random() % 50 == 0) claimed_node = kNodes[random() % 4];
        const size_t n = random() % 40;
        switch (random() % 5) {
          case 0:
            if (void* const object = pyrt_node_pools_get(set_)) keep(object);
            break;
          case 1:
            if (mine.empty()) break;
            EXPECT_EQ(pyrt_node_pools_put(set_, drop()), PYRT_OK);
            break;
          case 2: {
            std::vector<void*> list(n);
            if (pyrt_node_pools_get_bulk(set_, list.data(), n) == PYRT_OK) {
              for (void* object : list) keep(object);
            }
            break;
          }
          case 3: {
            std::vector<void*> list;
            while (list.size() < n && !mine.empty()) list.push_back(drop());
            EXPECT_EQ(pyrt_node_pools_put_bulk(set_, list.data(), list.size()), PYRT_OK);
            break;
          }
          default:
            if (mine.empty()) break;
            if (void* const other = shelf[random() % shelf.size()].exchange(drop())) keep(other);
        }
      }
      while (!mine.empty()) EXPECT_EQ(pyrt_node_pools_put(set_, drop()), PYRT_OK);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::atomic<void*>& place : shelf) {
    void* const object = place.load();
    if (object != nullptr) {
      EXPECT_EQ(pyrt_node_pools_put(set_, object), PYRT_OK);
    }
  }
}

TEST_F(NodePoolsTest, AForkedChildHasItsOwnOrIsRefused) {
  for (const uint32_t mode : {PYRT_FORK_COW, PYRT_FORK_EXCLUDE}) {
    make(mode);
    void* const object = pyrt_node_pools_get(set_);
    const pid_t child = fork();
    if (child == 0) {
      bool right = pyrt_node_pools_put(set_, object) == (mode ? PYRT_ESTATE : PYRT_OK);
      right &= (pyrt_node_pools_get(set_) == nullptr) == (mode == PYRT_FORK_EXCLUDE);
      _exit(right ? 0 : 1);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "mode " << mode;
    EXPECT_EQ(pyrt_node_pools_put(set_, object), PYRT_OK);
  }
}

}  // namespace
}  // namespace pyruntime
