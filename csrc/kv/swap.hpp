// The swap engine: copies of block runs between tiers, and reads and writes of lower ones, beside
// the engine's steps.
//
// What it is. Jobs run on the engine's own threads, which sleep on a condition variable while there
// is nothing to do. A job names the blocks it reads and writes, in spaces registered before. Two
// lanes, each with its threads: memory copies never wait behind a disk.
//
//   submit -> [blocked] -> [ready, FIFO per lane] -> running -> finished -> collect
//
// Conflicts. Jobs that touch a block in the same way that at least one of them writes are run in
// the order of their submission; all others in any order. Marks hold, per block, how many
// unfinished jobs read and write it: without a conflict, submitting costs O(blocks). A job that
// reads what a failed or cancelled one should have written fails with it.
//
//   in flight  =  submitted and not yet *collected*: the owner learns of the end by collect (or
//   wait + collect), so that one thread decides when a block may be used again.
//
// `busy` tells whether a block may be written (no unfinished job touches it) or read (none writes
// it); `wait_block` waits for just the jobs that stand in the way.
//
// Fences. A job may name a fence and a value: it starts when the fence was signalled with at least
// that value, so that a copy follows the computation that writes its source.
//
// Cancelling. A job that has not started ends without a copy, also behind a fence; a running one
// stops at its next part and leaves its destination undefined. Both finish as PYRT_ECANCELED.
//
// Failure. Submitting fails as a whole and leaves no trace (PYRT_EFULL: queue_limit). Jobs report
// their status when collected. For tests: a delay of random length before every part, and
// `fail_part(n)`: the n-th part from now fails with PYRT_EIO.
//
// Threads. Any thread may call; one mutex guards all of it and is not held during a copy. A forked
// child has no workers: its calls give PYRT_ESTATE, and its destructor leaves them alone.
// Complexity: submit and finish O(blocks + jobs in conflict), busy O(1).
//
// Papers: FastSwitch (arXiv 2411.18424), 3.2: swaps by native threads, conflicts checked per block.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <thread>
#include <unordered_map>
#include <vector>

#include "kv/copy.hpp"

namespace pyruntime::kv {

using Ticket = uint64_t;
using SpaceId = uint32_t;

enum class Lane : uint32_t { copy = 0, disk = 1 };
inline constexpr size_t kNumLanes = 2;

struct Touch {  // of a job: blocks it reads or writes
  SpaceId space;
  BlockId first;
  uint32_t count;
  bool write;
};

struct FencePoint {
  uint32_t fence = 0;  // 0: none
  uint64_t value = 0;
};

struct Completion {
  Ticket ticket;
  pyrt_status status;
};

struct SwapOptions {
  uint32_t workers[kNumLanes] = {1, 1};  // 1..16 each
  uint32_t queue_limit = 4096;           // jobs not collected
  uint64_t delay_ns = 0;                 // tests: up to that long before each part
  uint64_t seed = 1;
};

struct SwapStats {
  uint64_t jobs = 0, finished = 0, failed = 0, cancelled = 0;
  uint64_t blocks = 0, bytes = 0, descriptors = 0;  // of finished copies
  uint64_t conflicts = 0;                           // jobs that waited for others
  uint64_t copy_ns = 0;                             // time inside copies
  uint64_t copy_cpu_ns = 0;                         // of it, on a CPU
  uint64_t waits = 0, wait_ns = 0;                  // callers that had to wait
  uint64_t in_flight = 0;
};

class SwapEngine {
 public:
  // A job's work besides copies; `go_on` is asked before each part: false means to stop.
  using GoOn = std::function<bool()>;
  using Body = std::function<pyrt_status(const GoOn& go_on)>;

  explicit SwapEngine(const SwapOptions& options = {});
  ~SwapEngine();  // cancels what is in flight and waits for its end
  SwapEngine(const SwapEngine&) = delete;
  SwapEngine& operator=(const SwapEngine&) = delete;

  // Where blocks lie. A space without bases has block ids only, for jobs with a body.
  SpaceId add_space(const Space& space);
  SpaceId add_space(uint32_t num_blocks);
  void remove_space(SpaceId space);  // PYRT_ESTATE while a job touches it

  uint32_t add_fence();
  void signal(uint32_t fence, uint64_t value);

  // PYRT_EINVAL: unknown spaces, runs outside them, a block written twice or read and written.
  Ticket copy(SpaceId from, SpaceId to, std::span<const SwapRun> runs, FencePoint after = {});
  Ticket submit(Lane lane, std::span<const Touch> touches, Body body, FencePoint after = {});

  void cancel(Ticket ticket);  // what has finished is left as it is
  bool finished(Ticket ticket);
  // Until the job finished; false after `timeout_ns` (negative: none).
  bool wait(Ticket ticket, int64_t timeout_ns = -1);
  bool wait_all(int64_t timeout_ns = -1);
  // Moves completions to `out`, in the order of their end; returns how many.
  size_t collect(std::span<Completion> out);

  bool busy(SpaceId space, BlockId block, bool for_writing);
  void wait_block(SpaceId space, BlockId block, bool for_writing);

  void fail_part(int64_t n);  // the n-th part from now, 1-based; 0: none
  SwapStats stats();
  // Throws PYRT_ECORRUPT unless the marks are those of the unfinished jobs.
  void check();

 private:
  struct Mark {
    uint32_t readers = 0;
    uint32_t writers = 0;
    Ticket last_read = 0;  // by the job being submitted: to find duplicates
    Ticket last_write = 0;
  };
  struct SpaceState {
    Space space;
    bool open = false;
    std::vector<Mark> marks;
    uint64_t touches = 0;
  };
  struct Job {
    Ticket ticket = 0;
    Lane lane = Lane::copy;
    std::vector<Touch> touches;
    Body body;
    FencePoint after;
    std::atomic<bool> cancel{false};
    bool finished = false;
    bool source_failed = false;
    pyrt_status status = PYRT_OK;
    uint32_t blockers = 0;
    Job* next = nullptr;  // in one of the lists below
    struct Dependent {
      Job* job;
      bool reads;  // what this one writes
    };
    std::vector<Dependent> dependents;
    uint64_t blocks = 0, bytes = 0, descriptors = 0;
  };
  // A queue through Job::next: nothing is allocated after a job was taken in.
  struct List {
    Job* first = nullptr;
    Job* last = nullptr;
    bool empty() const noexcept { return first == nullptr; }
    void push(Job* job) noexcept;
    Job* pop() noexcept;
    bool remove(Job* job) noexcept;
  };
  // Apart, because a forked child must not destroy what its parent's threads sleep on.
  struct Signals {
    std::condition_variable wake[kNumLanes];
    std::condition_variable ended;
  };
  using Lock = std::unique_lock<std::mutex>;

  Ticket add(std::unique_ptr<Job> job, Lock& lock);
  SpaceState& state(SpaceId space);
  void check_touches(const Job& job);
  template <class Visit>
  void each_mark(const Job& job, Visit&& visit);
  static bool overlap(const Job& earlier, const Job& later, bool* reads) noexcept;
  SpaceId open_space(const Space& space);
  void make_ready(Job& job) noexcept;
  void recheck_fenced() noexcept;
  void finish(Job& job, pyrt_status status) noexcept;
  void start_workers(size_t lane);
  void work(size_t lane) noexcept;
  pyrt_status run(Job& job) noexcept;
  bool next_part(Job& job) noexcept;
  bool ended(Ticket ticket) const noexcept;
  bool marked(SpaceId space, BlockId block, bool for_writing);
  bool wait_until(Lock& lock, int64_t timeout_ns, const std::function<bool()>& done);
  void require_this_process() const;

  const SwapOptions options_;
  const int64_t process_;
  std::atomic<int64_t> fail_countdown_{0};
  std::mutex mutex_;  // guards everything below
  std::unique_ptr<Signals> signals_;
  std::deque<SpaceState> spaces_;                          // SpaceId - 1
  std::vector<uint64_t> fences_;                           // fence - 1
  std::unordered_map<Ticket, std::unique_ptr<Job>> jobs_;  // not collected
  List ready_[kNumLanes];
  List fenced_;  // without blockers, before their fence
  List ended_;   // to be collected
  std::vector<std::thread> threads_[kNumLanes];
  std::mt19937_64 random_;
  SwapStats stats_;
  Ticket next_ticket_ = 1;
  uint64_t unfinished_ = 0;
  uint32_t waiting_ = 0;
  bool closing_ = false;
};

}  // namespace pyruntime::kv
