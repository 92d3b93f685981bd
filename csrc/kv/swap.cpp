#include "kv/swap.hpp"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "base/status.hpp"

namespace pyruntime::kv {
namespace {

using Clock = std::chrono::steady_clock;

uint64_t nanoseconds(Clock::duration time) {
  return static_cast<uint64_t>(std::chrono::nanoseconds(time).count());
}

uint64_t thread_cpu_ns() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

unsigned long long wide(uint64_t value) { return value; }

}  // namespace

SwapEngine::SwapEngine(const SwapOptions& options)
    : options_(options),
      process_(getpid()),
      signals_(std::make_unique<Signals>()),
      random_(options.seed) {
  for (const uint32_t workers : options.workers) {
    if (workers < 1 || workers > 16)
      fail(PYRT_EINVAL, "workers is %u; it must be in 1..16", workers);
  }
  if (options.queue_limit < 1 || options.queue_limit > 1u << 20u) {
    fail(PYRT_EINVAL, "queue_limit is %u; it must be in 1..2^20", options.queue_limit);
  }
  if (options.delay_ns > 1000000000u) {
    fail(PYRT_EINVAL, "delay_ns is %llu; it must be at most 10^9", wide(options.delay_ns));
  }
}

SwapEngine::~SwapEngine() {
  if (getpid() != process_) {  // no worker of ours exists here; their handles cannot be joined
    (void)signals_.release();
    for (auto& lane : threads_) (void)new std::vector<std::thread>(std::move(lane));
    return;
  }
  {
    const std::scoped_lock lock(mutex_);
    closing_ = true;
    for (auto& [ticket, job] : jobs_) job->cancel.store(true, std::memory_order_relaxed);
    recheck_fenced();
    for (auto& wake : signals_->wake) wake.notify_all();
  }
  for (auto& lane : threads_) {
    for (std::thread& thread : lane) thread.join();
  }
}

void SwapEngine::List::push(Job* job) noexcept {
  job->next = nullptr;
  (last == nullptr ? first : last->next) = job;
  last = job;
}

SwapEngine::Job* SwapEngine::List::pop() noexcept {
  Job* const job = first;
  first = job->next;
  if (first == nullptr) last = nullptr;
  return job;
}

bool SwapEngine::List::remove(Job* job) noexcept {
  Job* before = nullptr;
  for (Job* at = first; at != nullptr; before = at, at = at->next) {
    if (at != job) continue;
    (before == nullptr ? first : before->next) = job->next;
    if (last == job) last = before;
    return true;
  }
  return false;
}

void SwapEngine::require_this_process() const {
  if (getpid() != process_) fail(PYRT_ESTATE, "the swap engine belongs to the parent process");
}

SwapEngine::SpaceState& SwapEngine::state(SpaceId space) {
  if (space < 1 || space > spaces_.size() || !spaces_[space - 1].open) {
    fail(PYRT_EINVAL, "space is %u; there is none such", space);
  }
  return spaces_[space - 1];
}

SpaceId SwapEngine::open_space(const Space& space) {
  const std::scoped_lock lock(mutex_);
  SpaceState made{space, true, std::vector<Mark>(space.num_blocks), 0};
  for (size_t i = 0; i < spaces_.size(); ++i) {
    if (spaces_[i].open) continue;
    spaces_[i] = std::move(made);
    return static_cast<SpaceId>(i + 1);
  }
  if (spaces_.size() >= 1u << 16u) fail(PYRT_EFULL, "65536 spaces are registered; no more fit");
  spaces_.push_back(std::move(made));
  return static_cast<SpaceId>(spaces_.size());
}

SpaceId SwapEngine::add_space(const Space& space) {
  require_this_process();
  space.check();
  return open_space(space);
}

SpaceId SwapEngine::add_space(uint32_t num_blocks) {
  require_this_process();
  if (num_blocks < 1 || num_blocks == kNone) {
    fail(PYRT_EINVAL, "num_blocks is %u; it must be in 1..2^32 - 2", num_blocks);
  }
  Space ids;
  ids.num_blocks = num_blocks;
  return open_space(ids);
}

void SwapEngine::remove_space(SpaceId space) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  SpaceState& found = state(space);
  if (found.touches != 0) fail(PYRT_ESTATE, "jobs in flight touch space %u", space);
  found = SpaceState();
}

uint32_t SwapEngine::add_fence() {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  if (fences_.size() >= 1u << 20u) fail(PYRT_EFULL, "2^20 fences were made; no more fit");
  fences_.push_back(0);
  return static_cast<uint32_t>(fences_.size());
}

void SwapEngine::signal(uint32_t fence, uint64_t value) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  if (fence < 1 || fence > fences_.size()) {
    fail(PYRT_EINVAL, "fence is %u; there is none such", fence);
  }
  fences_[fence - 1] = std::max(fences_[fence - 1], value);
  recheck_fenced();
}

Ticket SwapEngine::copy(SpaceId from, SpaceId to, std::span<const SwapRun> runs, FencePoint after) {
  require_this_process();
  auto job = std::make_unique<Job>();
  job->after = after;
  job->touches.reserve(2 * runs.size());
  for (const SwapRun& run : runs) {
    job->touches.push_back({from, run.from, run.count, false});
    job->touches.push_back({to, run.to, run.count, true});
    job->blocks += run.count;
  }
  Lock lock(mutex_);
  const SpaceState& source = state(from);
  const SpaceState& target = state(to);
  if (source.space.bases.empty() || target.space.bases.empty()) {
    fail(PYRT_EINVAL, "a space without memory cannot be copied");
  }
  const CopyShape shape(source.space, target.space);
  for (const SwapRun& run : runs) job->descriptors += shape.descriptors(run.count);
  job->bytes = job->blocks * source.space.block_bytes();
  const bool streaming = job->bytes >= CopyShape::kStreamBytes;
  // Spaces in use do not move (a deque) and cannot be removed.
  job->body = [shape, streaming, source = &source.space, target = &target.space,
               kept = std::vector<SwapRun>(runs.begin(), runs.end())](const GoOn& go_on) {
    bool all = true;
    for (const SwapRun& run : kept) {
      all = all && shape.copy(*source, *target, run, streaming, go_on);
    }
    if (streaming) stream_fence();
    return all ? PYRT_OK : PYRT_ECANCELED;
  };
  return add(std::move(job), lock);
}

Ticket SwapEngine::submit(Lane lane, std::span<const Touch> touches, Body body, FencePoint after) {
  require_this_process();
  auto job = std::make_unique<Job>();
  job->lane = lane;
  job->after = after;
  job->touches.assign(touches.begin(), touches.end());
  job->body = std::move(body);
  Lock lock(mutex_);
  return add(std::move(job), lock);
}

template <class Visit>
void SwapEngine::each_mark(const Job& job, Visit&& visit) {
  for (const Touch& touch : job.touches) {
    SpaceState& found = spaces_[touch.space - 1];
    for (uint32_t i = 0; i < touch.count; ++i) visit(found.marks[touch.first + i], touch.write);
  }
}

void SwapEngine::check_touches(const Job& job) {
  for (const Touch& touch : job.touches) {
    const SpaceState& found = state(touch.space);
    const uint64_t end = uint64_t{touch.first} + touch.count;
    if (touch.count < 1 || end > found.space.num_blocks) {
      fail(PYRT_EINVAL, "run [%u, %llu) is empty or leaves space %u, which has %u blocks",
           touch.first, wide(end), touch.space, found.space.num_blocks);
    }
  }
  if (job.after.fence > fences_.size()) {
    fail(PYRT_EINVAL, "fence is %u; there is none such", job.after.fence);
  }
  // A ticket is used once for each attempt, so what a refused job left here means nothing later.
  const Ticket mine = next_ticket_++;
  bool twice = false;
  each_mark(job, [&](Mark& mark, bool write) {
    twice = twice || mark.last_write == mine || (write && mark.last_read == mine);
    (write ? mark.last_write : mark.last_read) = mine;
  });
  if (twice) fail(PYRT_EINVAL, "runs write a block twice, or one that they also read");
}

bool SwapEngine::overlap(const Job& earlier, const Job& later, bool* reads) noexcept {
  bool any = false;
  for (const Touch& a : earlier.touches) {
    for (const Touch& b : later.touches) {
      const bool meet = a.space == b.space && (a.write || b.write) &&
                        a.first < uint64_t{b.first} + b.count &&
                        b.first < uint64_t{a.first} + a.count;
      any = any || meet;
      if (meet && a.write && !b.write) *reads = true;
    }
  }
  return any;
}

Ticket SwapEngine::add(std::unique_ptr<Job> owned, Lock&) {
  Job& job = *owned;
  if (closing_) fail(PYRT_ECLOSED, "the swap engine is closing");
  if (jobs_.size() >= options_.queue_limit) {
    fail(PYRT_EFULL, "%u swaps are in flight or not collected; collect some", options_.queue_limit);
  }
  check_touches(job);
  const Ticket ticket = job.ticket = next_ticket_ - 1;
  start_workers(static_cast<size_t>(job.lane));

  bool conflict = false;
  each_mark(job, [&](const Mark& mark, bool write) {
    conflict = conflict || mark.writers != 0 || (write && mark.readers != 0);
  });
  struct Link {
    Job* earlier;
    bool reads;
  };
  std::vector<Link> links;
  if (conflict) {
    for (const auto& [other, earlier] : jobs_) {
      bool reads = false;
      if (earlier->finished || !overlap(*earlier, job, &reads)) continue;
      links.push_back({earlier.get(), reads});
      auto& dependents = earlier->dependents;
      if (dependents.size() == dependents.capacity()) dependents.reserve(2 * dependents.size() + 2);
    }
  }
  jobs_.emplace(ticket, std::move(owned));

  // Nothing fails from here on.
  each_mark(job, [](Mark& mark, bool write) { ++(write ? mark.writers : mark.readers); });
  for (const Touch& touch : job.touches) ++spaces_[touch.space - 1].touches;
  for (const Link& link : links) link.earlier->dependents.push_back({&job, link.reads});
  job.blockers = static_cast<uint32_t>(links.size());
  ++unfinished_;
  ++stats_.jobs;
  if (conflict) ++stats_.conflicts;
  if (job.blockers == 0) make_ready(job);
  return ticket;
}

void SwapEngine::make_ready(Job& job) noexcept {
  const FencePoint& after = job.after;
  const bool reached = after.fence == 0 || fences_[after.fence - 1] >= after.value;
  if (!reached && !job.cancel.load(std::memory_order_relaxed)) {
    fenced_.push(&job);
    return;
  }
  const auto lane = static_cast<size_t>(job.lane);
  ready_[lane].push(&job);
  signals_->wake[lane].notify_one();
}

void SwapEngine::recheck_fenced() noexcept {
  List waiting;
  std::swap(waiting, fenced_);
  while (!waiting.empty()) make_ready(*waiting.pop());
}

void SwapEngine::start_workers(size_t lane) {
  auto& threads = threads_[lane];
  if (!threads.empty()) return;
  threads.reserve(options_.workers[lane]);
  for (uint32_t i = 0; i < options_.workers[lane]; ++i) {
    try {
      threads.emplace_back([this, lane] { work(lane); });
    } catch (const std::exception& error) {
      if (threads.empty()) fail(PYRT_ENOMEM, "no thread for swaps: %s", error.what());
      return;  // fewer do as well
    }
  }
}

void SwapEngine::work(size_t lane) noexcept {
  Lock lock(mutex_);
  for (;;) {
    signals_->wake[lane].wait(lock, [&] { return closing_ || !ready_[lane].empty(); });
    if (ready_[lane].empty()) return;
    Job& job = *ready_[lane].pop();
    pyrt_status status = job.source_failed ? PYRT_EIO : PYRT_ECANCELED;
    if (!job.source_failed && !job.cancel.load(std::memory_order_relaxed)) {
      lock.unlock();
      const auto begin = Clock::now();
      const uint64_t cpu = thread_cpu_ns();
      status = run(job);
      const uint64_t spent = nanoseconds(Clock::now() - begin);
      const uint64_t on_cpu = thread_cpu_ns() - cpu;
      lock.lock();
      stats_.copy_ns += spent;
      stats_.copy_cpu_ns += on_cpu;
    }
    finish(job, status);
  }
}

pyrt_status SwapEngine::run(Job& job) noexcept {
  try {
    pyrt_status broken = PYRT_OK;
    const pyrt_status status = job.body([&] {
      if (!next_part(job)) broken = PYRT_EIO;
      return broken == PYRT_OK && !job.cancel.load(std::memory_order_relaxed);
    });
    return broken != PYRT_OK ? broken : status;
  } catch (const Error& error) {
    return error.status();
  } catch (const std::exception&) {
    return PYRT_ENOMEM;  // what bodies allocate is all that can fail otherwise
  }
}

bool SwapEngine::next_part(Job&) noexcept {
  if (options_.delay_ns != 0) {
    uint64_t delay = 0;
    {
      const std::scoped_lock lock(mutex_);
      delay = random_() % options_.delay_ns;
    }
    std::this_thread::sleep_for(std::chrono::nanoseconds(delay));
  }
  if (fail_countdown_.load(std::memory_order_relaxed) == 0) return true;
  return fail_countdown_.fetch_sub(1, std::memory_order_relaxed) != 1;
}

void SwapEngine::finish(Job& job, pyrt_status status) noexcept {
  each_mark(job, [](Mark& mark, bool write) { --(write ? mark.writers : mark.readers); });
  for (const Touch& touch : job.touches) --spaces_[touch.space - 1].touches;
  for (const Job::Dependent& dependent : job.dependents) {
    if (status != PYRT_OK && dependent.reads) dependent.job->source_failed = true;
    if (--dependent.job->blockers == 0) make_ready(*dependent.job);
  }
  ++stats_.finished;
  if (status == PYRT_OK) {
    stats_.blocks += job.blocks;
    stats_.bytes += job.bytes;
    stats_.descriptors += job.descriptors;
  } else if (status == PYRT_ECANCELED) {
    ++stats_.cancelled;
  } else {
    ++stats_.failed;
  }
  job.status = status;
  job.finished = true;
  --unfinished_;
  ended_.push(&job);
  if (waiting_ != 0) signals_->ended.notify_all();
}

void SwapEngine::cancel(Ticket ticket) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  const auto found = jobs_.find(ticket);
  if (found == jobs_.end()) return;
  Job& job = *found->second;
  job.cancel.store(true, std::memory_order_relaxed);
  if (fenced_.remove(&job)) make_ready(job);
}

bool SwapEngine::finished(Ticket ticket) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  return ended(ticket);
}

bool SwapEngine::ended(Ticket ticket) const noexcept {
  const auto found = jobs_.find(ticket);
  return found == jobs_.end() || found->second->finished;
}

bool SwapEngine::wait_until(Lock& lock, int64_t timeout_ns, const std::function<bool()>& done) {
  if (done()) return true;
  const auto begin = Clock::now();
  ++waiting_;
  ++stats_.waits;
  bool reached = true;
  if (timeout_ns < 0) {
    signals_->ended.wait(lock, done);
  } else {
    reached = signals_->ended.wait_until(lock, begin + std::chrono::nanoseconds(timeout_ns), done);
  }
  --waiting_;
  stats_.wait_ns += nanoseconds(Clock::now() - begin);
  return reached;
}

bool SwapEngine::wait(Ticket ticket, int64_t timeout_ns) {
  require_this_process();
  Lock lock(mutex_);
  return wait_until(lock, timeout_ns, [&] { return ended(ticket); });
}

bool SwapEngine::wait_all(int64_t timeout_ns) {
  require_this_process();
  Lock lock(mutex_);
  return wait_until(lock, timeout_ns, [&] { return unfinished_ == 0; });
}

size_t SwapEngine::collect(std::span<Completion> out) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  size_t n = 0;
  for (; n < out.size() && !ended_.empty(); ++n) {
    const Job* job = ended_.pop();
    out[n] = {job->ticket, job->status};
    jobs_.erase(job->ticket);
  }
  return n;
}

bool SwapEngine::busy(SpaceId space, BlockId block, bool for_writing) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  return marked(space, block, for_writing);
}

bool SwapEngine::marked(SpaceId space, BlockId block, bool for_writing) {
  const SpaceState& found = state(space);
  if (block >= found.space.num_blocks) {
    fail(PYRT_EINVAL, "block is %u; space %u has %u", block, space, found.space.num_blocks);
  }
  const Mark& mark = found.marks[block];
  return mark.writers != 0 || (for_writing && mark.readers != 0);
}

void SwapEngine::wait_block(SpaceId space, BlockId block, bool for_writing) {
  require_this_process();
  Lock lock(mutex_);
  wait_until(lock, -1, [&] { return !marked(space, block, for_writing); });
}

void SwapEngine::fail_part(int64_t n) { fail_countdown_.store(n, std::memory_order_relaxed); }

SwapStats SwapEngine::stats() {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  SwapStats now = stats_;
  now.in_flight = unfinished_;
  return now;
}

}  // namespace pyruntime::kv
