// A shared mutex whose exclusive side is not kept out by a stream of new readers: the system's lets
// readers overtake, so that a filter that is always in use could never grow.
#pragma once

#include <atomic>
#include <mutex>
#include <shared_mutex>

namespace pyruntime::filter {

class Gate {
 public:
  void lock_shared() {
    // A hint: who misses it is one reader more, not an endless row of them.
    if (waiting_.load(std::memory_order_relaxed) != 0) {
      const std::lock_guard behind(turn_);
    }
    mutex_.lock_shared();
  }
  void unlock_shared() { mutex_.unlock_shared(); }
  void lock() {
    waiting_.fetch_add(1, std::memory_order_relaxed);
    turn_.lock();
    mutex_.lock();
  }
  void unlock() {
    mutex_.unlock();
    turn_.unlock();
    waiting_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  std::shared_mutex mutex_;
  std::mutex turn_;
  std::atomic<int> waiting_{0};
};

}  // namespace pyruntime::filter
