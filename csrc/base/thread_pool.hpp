// The process's one thread pool.
//
// Shape: one job at a time. A job is an index range cut into chunks of `grain`; the calling thread
// and the workers claim chunks from one atomic counter until none is left. Which thread computes
// which chunk is open, so a body must give the same bytes for an index whoever runs it: no result
// may depend on the pool's size.
//
// Ownership: the pool is created on first use and never destroyed (workers may sleep in it while
// the process exits). The job lives on the caller's stack; workers join and leave it under the
// mutex, and parallel_for returns only when every worker that joined has left.
//
// Concurrency: parallel_for may be called from any thread. A call made while another job runs, or
// from inside a body, runs its range on the calling thread alone: it never waits, so it cannot
// deadlock. Workers sleep on a condition variable (a futex). Before they do, and before the caller
// sleeps until the last worker has left, they look for kSpin: the jobs of a model's step follow
// each other in less, and being woken takes a core longer than that.
//
// Fork: workers do not exist in the child; the child's pool restarts on its next use. Do not fork
// from inside a body: chunks claimed by workers of the parent would be missing in the child.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace pyruntime::base {

class ThreadPool {
 public:
  static constexpr int kMaxSize = 1024;

  static ThreadPool& process();

  // Threads that work on a job, the caller included.
  int size() const noexcept { return target_size_.load(std::memory_order_relaxed); }

  // Throws PYRT_EINVAL outside 1..kMaxSize and PYRT_ESTATE from inside a body.
  void resize(int size);

  // Calls body(begin, end) over disjoint ranges that cover [0, count), each of at most `grain`
  // indices, and returns when all are done. `body` must not throw.
  template <class Body>
  void parallel_for(int64_t count, int64_t grain, Body&& body) {
    run(
        count, grain,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
        },
        &body);
  }

 private:
  using Function = void (*)(void* context, int64_t begin, int64_t end);

  struct Job {
    Function function;
    void* context;
    int64_t count;
    int64_t grain;
    std::atomic<int64_t> next{0};
    void work() noexcept;
  };

  ThreadPool();
  void run(int64_t count, int64_t grain, Function function, void* context);
  void start_workers();  // mutex held
  void worker(int index);
  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();

  std::atomic<int> target_size_;
  std::atomic<bool> busy_{false};  // a job is open; claimed by its caller
  std::mutex mutex_;               // guards everything below
  std::condition_variable wake_;   // a job opened, or the pool shrank
  std::condition_variable left_;   // a worker left the job or ended
  Job* job_ = nullptr;
  // Written under the mutex; read without it by those that are about to sleep.
  std::atomic<uint64_t> job_id_{0};
  std::atomic<int> participants_{0};
  int workers_ = 0;
};

}  // namespace pyruntime::base
