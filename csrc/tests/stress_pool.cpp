// Many threads on one pool, for ThreadSanitizer and AddressSanitizer. Every holder writes its name
// over the whole object and verifies it before giving it back, so an object owned twice is seen.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "pyruntime/pool_cache.hpp"

namespace {

constexpr size_t kObjectWords = 8;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kNoMallocInChild = true;
#else
constexpr bool kNoMallocInChild = false;
#endif

int scale() {
  const char* text = std::getenv("PYRUNTIME_TEST_SCALE");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

struct Mailbox {  // objects on their way to another thread
  std::mutex mutex;
  std::vector<uint64_t*> objects;
};

void sign(uint64_t* object, uint64_t name) {
  for (size_t i = 0; i < kObjectWords; ++i) object[i] = name;
}

void verify(const uint64_t* object, uint64_t name) {
  for (size_t i = 0; i < kObjectWords; ++i) ASSERT_EQ(object[i], name) << "object owned twice";
}

class Worker {
 public:
  Worker(pyrt_pool* pool, Mailbox& mailbox, uint64_t name)
      : pool_(pool), mailbox_(mailbox), name_(name), random_(name) {
    if (name % 2 != 0) cache_.emplace(pool);  // inlined calls, and other caches to take from
  }

  void run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFatalFailure(); ++i) step();
    while (!held_.empty()) release_one();
  }

 private:
  void step() {
    switch (random_() % 16) {
      case 0:
        get_many(1 + random_() % 600);
        break;
      case 1:
        put_many();
        break;
      case 2:
      case 3:
        send();
        break;
      case 4:
        receive();
        break;
      case 5:
        if (random_() % 64 == 0) {
          ASSERT_EQ(pyrt_pool_trim(pool_, nullptr), PYRT_OK);
        }
        break;
      case 6:
        if (random_() % 64 == 0) {
          ASSERT_EQ(pyrt_pool_check(pool_), PYRT_OK) << pyrt_last_error();
        }
        break;
      default:
        if (random_() % 2 != 0) {
          get_one();
        } else {
          release_one();
        }
    }
  }

  void keep(void* object) {
    sign(static_cast<uint64_t*>(object), name_);
    held_.push_back(static_cast<uint64_t*>(object));
  }
  void get_one() {
    if (void* object = cache_ ? cache_->get() : pyrt_pool_get(pool_)) keep(object);
  }
  void release_one() {
    if (held_.empty()) return;
    verify(held_.back(), name_);
    ASSERT_EQ(cache_ ? cache_->put(held_.back()) : pyrt_pool_put(pool_, held_.back()), PYRT_OK)
        << pyrt_last_error();
    held_.pop_back();
  }
  void get_many(size_t n) {
    std::vector<void*> got(n);
    const pyrt_status status =
        cache_ ? cache_->get_bulk(got.data(), n) : pyrt_pool_get_bulk(pool_, got.data(), n);
    if (status != PYRT_OK) return;
    for (void* object : got) keep(object);
  }
  void put_many() {
    for (const uint64_t* object : held_) verify(object, name_);
    const auto objects = reinterpret_cast<void* const*>(held_.data());
    ASSERT_EQ(cache_ ? cache_->put_bulk(objects, held_.size())
                     : pyrt_pool_put_bulk(pool_, objects, held_.size()),
              PYRT_OK);
    held_.clear();
  }
  void send() {
    if (held_.empty()) return;
    verify(held_.back(), name_);
    sign(held_.back(), 0);
    std::scoped_lock lock(mailbox_.mutex);
    mailbox_.objects.push_back(held_.back());
    held_.pop_back();
  }
  void receive() {
    std::vector<uint64_t*> mail;
    {
      std::scoped_lock lock(mailbox_.mutex);
      mail.swap(mailbox_.objects);
    }
    for (uint64_t* object : mail) {
      verify(object, 0);
      ASSERT_EQ(pyrt_pool_put(pool_, object), PYRT_OK);
    }
  }

  pyrt_pool* pool_;
  std::optional<pyruntime::PoolCache> cache_;
  Mailbox& mailbox_;
  uint64_t name_;
  std::mt19937 random_;
  std::vector<uint64_t*> held_;
};

void stress(uint64_t capacity, uint32_t check, bool forks) {
  pyrt_pool_options o;
  pyrt_pool_options_init(&o);
  o.object_bytes = kObjectWords * sizeof(uint64_t);
  o.capacity = capacity;
  o.max_capacity = 2 * capacity;
  o.check = check;
  pyrt_pool* pool = nullptr;
  ASSERT_EQ(pyrt_pool_create(&o, &pool), PYRT_OK);
  // A sanitizer's allocator, unlike glibc's, may be left locked by a thread that fork did not copy:
  // the child must not allocate there, so this thread's cache is made before the first fork.
  ASSERT_EQ(pyrt_pool_put(pool, pyrt_pool_get(pool)), PYRT_OK);
  Mailbox mailbox;
  std::vector<std::thread> threads;
  std::atomic<int> running{8};
  for (uint64_t t = 1; t <= 8; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t life = 0; life < 4; ++life) {  // thread exit is part of the stress
        std::thread([&, t, life] {
          Worker(pool, mailbox, t * 100 + life).run(2000 * scale());
        }).join();
      }
      --running;
    });
  }
  while (forks && running > 0) {
    const pid_t child = fork();
    if (child == 0) {
      std::array<void*, 64> some;
      const bool fine = pyrt_pool_get_bulk(pool, some.data(), 64) != PYRT_OK ||
                        pyrt_pool_put_bulk(pool, some.data(), 64) == PYRT_OK;
      _exit(fine && (kNoMallocInChild || pyrt_pool_check(pool) == PYRT_OK) ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  for (auto& thread : threads) thread.join();
  for (uint64_t* object : mailbox.objects) ASSERT_EQ(pyrt_pool_put(pool, object), PYRT_OK);
  ASSERT_EQ(pyrt_pool_check(pool), PYRT_OK) << pyrt_last_error();
  ASSERT_EQ(pyrt_pool_destroy(pool, 0), PYRT_OK) << pyrt_last_error();
}

TEST(PoolStress, Roomy) { stress(20000, PYRT_CHECK_RANGE, false); }
TEST(PoolStress, Tight) { stress(300, PYRT_CHECK_RANGE, false); }
TEST(PoolStress, FewerObjectsThanThreads) { stress(3, PYRT_CHECK_RANGE, false); }
TEST(PoolStress, StateChecked) { stress(2000, PYRT_CHECK_STATE, false); }
TEST(PoolStress, WithForks) { stress(4000, PYRT_CHECK_RANGE, true); }

}  // namespace
