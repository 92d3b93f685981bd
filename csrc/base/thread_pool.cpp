#include "base/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "base/log.hpp"
#include "base/status.hpp"

namespace pyruntime::base {
namespace {

thread_local bool inside_job = false;

constexpr std::chrono::microseconds kSpin{20};

void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Looks whether `done` for kSpin at most.
template <class Done>
void spin(const Done& done) {
  if (done()) return;
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
}

int default_size() {
  if (const char* wanted = std::getenv("PYRUNTIME_THREADS")) {
    const int size = std::atoi(wanted);
    if (size >= 1 && size <= ThreadPool::kMaxSize) return size;
    log(LogLevel::warning, "PYRUNTIME_THREADS=%s is not in 1..%d; using the CPUs of this process",
        wanted, ThreadPool::kMaxSize);
  }
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, ThreadPool::kMaxSize);
}

}  // namespace

ThreadPool& ThreadPool::process() {
  // Never destroyed: workers sleep in it until the process is gone.
  static ThreadPool* const pool = [] {
    auto* created = new ThreadPool;
    pthread_atfork([] { process().before_fork(); }, [] { process().after_fork_in_parent(); },
                   [] { process().after_fork_in_child(); });
    return created;
  }();
  return *pool;
}

ThreadPool::ThreadPool() : target_size_(default_size()) {}

void ThreadPool::Job::work() noexcept {
  inside_job = true;
  for (;;) {
    const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
    if (begin >= count) break;
    function(context, begin, std::min(begin + grain, count));
  }
  inside_job = false;
}

void ThreadPool::run(int64_t count, int64_t grain, Function function, void* context) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const bool alone = count <= grain || size() == 1 || inside_job;
  if (alone || busy_.exchange(true, std::memory_order_acquire)) {
    for (int64_t begin = 0; begin < count; begin += grain) {
      function(context, begin, std::min(begin + grain, count));
    }
    return;
  }
  Job job{function, context, count, grain};
  {
    std::scoped_lock lock(mutex_);
    start_workers();
    job_ = &job;
    ++job_id_;
  }
  const int64_t chunks = (count + grain - 1) / grain;
  if (chunks > 2) {
    wake_.notify_all();
  } else {
    wake_.notify_one();
  }
  job.work();
  {
    std::unique_lock lock(mutex_);
    job_ = nullptr;  // closed: a worker that wakes late finds nothing to join
  }
  spin([&] { return participants_.load(std::memory_order_acquire) == 0; });
  {
    std::unique_lock lock(mutex_);
    left_.wait(lock, [&] { return participants_ == 0; });
    left_.notify_all();  // a resize may wait for the job to end
  }
  busy_.store(false, std::memory_order_release);
}

void ThreadPool::start_workers() {
  while (workers_ < size() - 1) {
    try {
      std::thread(&ThreadPool::worker, this, workers_).detach();
    } catch (const std::system_error& error) {
      // The caller works alone or with those that started: slower, never wrong.
      log(LogLevel::warning, "thread pool: cannot start worker %d: %s", workers_, error.what());
      return;
    }
    ++workers_;
  }
}

void ThreadPool::worker(int index) {
  uint64_t seen = 0;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return index >= size() - 1 || (job_ != nullptr && job_id_ != seen); });
    if (index >= size() - 1) break;
    seen = job_id_;
    Job* const job = job_;
    ++participants_;
    lock.unlock();
    job->work();
    lock.lock();
    --participants_;
    left_.notify_all();
    lock.unlock();
    spin([&] { return job_id_.load(std::memory_order_acquire) != seen; });
    lock.lock();
  }
  --workers_;
  left_.notify_all();
}

void ThreadPool::resize(int size) {
  if (size < 1 || size > kMaxSize) {
    fail(PYRT_EINVAL, "size is %d; the thread pool takes 1..%d", size, kMaxSize);
  }
  if (inside_job) fail(PYRT_ESTATE, "the thread pool cannot be resized from inside a job");
  std::unique_lock lock(mutex_);
  left_.wait(lock, [&] { return job_ == nullptr && participants_ == 0; });
  target_size_.store(size, std::memory_order_relaxed);
  wake_.notify_all();
  left_.wait(lock, [&] { return workers_ <= this->size() - 1; });
}

void ThreadPool::before_fork() { mutex_.lock(); }

void ThreadPool::after_fork_in_parent() { mutex_.unlock(); }

void ThreadPool::after_fork_in_child() {
  // Condition variables remember waiters that do not exist here, so they start afresh.
  new (&wake_) std::condition_variable;
  new (&left_) std::condition_variable;
  job_ = nullptr;
  participants_ = 0;
  workers_ = 0;
  busy_.store(false, std::memory_order_relaxed);
  mutex_.unlock();
}

}  // namespace pyruntime::base
