// One call of the cache: what it needs is ordered, loaded and computed as it comes in.
#include <algorithm>
#include <chrono>
#include <limits>

#include "base/status.hpp"
#include "moe/cache.hpp"

namespace pyruntime::moe {
namespace {

constexpr uint8_t kFailed = 1, kDegraded = 2;
constexpr double kAnything = std::numeric_limits<double>::infinity();

using Clock = std::chrono::steady_clock;

}  // namespace

// The tokens of one part of a call. Members run with the cache's mutex held, except `compute`.
class Cache::Call {
 public:
  Call(Cache& cache, int64_t slot, Ffn& ffn)
      : cache_(cache),
        slot_(slot),
        ffn_(ffn),
        pending_(ffn.buckets()),
        left_(cache.experts_, 0),
        wanted_(cache.experts_, -1),
        mine_(cache.experts_, 0) {
    for (const Ffn::Bucket& b : pending_) {
      ++left_[static_cast<size_t>(b.expert)];
      int32_t& wanted = wanted_[static_cast<size_t>(b.expert)];
      wanted = std::max(wanted, b.level);
    }
  }

  void run(std::unique_lock<std::mutex>& lock) {
    prepare();
    while (!pending_.empty()) {
      const bool moving = submit();
      std::vector<Ffn::Bucket> ready = take_ready();
      if (!ready.empty()) {
        compute(lock, ready);
        continue;
      }
      if (pending_.empty()) break;
      if (cache_.loading_ > 0 || !cache_.demand_.empty()) {
        wait(lock);
      } else if (!moving) {
        if (cache_.ahead_.empty()) {
          fail(PYRT_EINTERNAL, "the expert cache has no room for one expert");
        }
        cache_.cancel_ahead(-1);  // what is for later stands in the way
      }
    }
  }

  // Also after an exception: nothing stays pinned.
  void end() {
    for (int32_t e = 0; e < static_cast<int32_t>(mine_.size()); ++e) {
      if (!mine_[static_cast<size_t>(e)]) continue;
      for (int l = 0; l <= wanted(e); ++l) {
        Plane& p = cache_.plane(id(e), l);
        if (p.state != State::kAdmitted) continue;
        p.state = State::kAbsent;
        cache_.used_ -= cache_.plane_bytes_[l];
        --cache_.table_[id(e)].loads;
        cache_.unpin(id(e));
      }
      cache_.unpin(id(e));
    }
  }

 private:
  uint32_t id(int32_t expert) const { return cache_.index(slot_, expert); }
  int32_t wanted(int32_t expert) const { return wanted_[static_cast<size_t>(expert)]; }

  void own(int32_t expert) {
    if (mine_[static_cast<size_t>(expert)]) return;
    mine_[static_cast<size_t>(expert)] = 1;
    cache_.pin(id(expert));
  }

  // Counts uses, keeps what is complete, and plans what is missing.
  void prepare() {
    const auto levels = static_cast<int>(cache_.levels_);
    std::vector<int64_t> counts(wanted_.size() * cache_.levels_, 0);
    std::vector<int32_t> resident(wanted_.size(), 0);
    for (const Ffn::Bucket& b : pending_) {
      counts[static_cast<size_t>(b.expert * levels + b.level)] += b.last - b.first;
    }
    for (int32_t e = 0; e < static_cast<int32_t>(wanted_.size()); ++e) {
      if (wanted(e) < 0) continue;
      const Expert& expert = cache_.table_[id(e)];
      for (int l = 0; l <= wanted(e); ++l) use(e, l);
      int32_t& there = resident[static_cast<size_t>(e)];
      there = expert.resident;
      while (there <= wanted(e) && cache_.plane(id(e), there).state == State::kLoading) ++there;
      cache_.list(id(e));
      if (there > wanted(e)) own(e);
    }
    double load[kMaxLevels], compute[kMaxLevels], bytes = 0;
    for (int l = 0; l < levels; ++l) {
      const auto plane = static_cast<double>(cache_.plane_bytes_[l]);
      load[l] = plane * cache_.load_seconds_per_byte_;
      compute[l] = (bytes += plane) * cache_.compute_seconds_per_byte_;
    }
    const Demand demand{static_cast<int64_t>(wanted_.size()),
                        levels,
                        counts.data(),
                        resident.data(),
                        load,
                        compute};
    order_ = plan(demand, cache_.options_.order);
  }

  void use(int32_t expert, int level) {
    Plane& p = cache_.plane(id(expert), level);
    cache_.touch(p);
    const bool there = level < cache_.table_[id(expert)].resident;
    ++(there ? cache_.counters_.hits : cache_.counters_.misses)[level];
    if (p.state != State::kBad) p.error = 0;  // tried again
    if (p.prefetched) {
      p.prefetched = false;
      cache_.counters_.prefetch_useful_bytes += cache_.plane_bytes_[level];
      cache_.window_useful_ += cache_.plane_bytes_[level];
      cache_.judge_prefetch();
    }
  }

  // Queues planes, in order, of the experts there is room for; false if none was left or fitted.
  bool submit() {
    bool full = false, moved = false;
    std::erase_if(order_, [&](const PlaneId& p) {
      const uint32_t expert = id(p.expert);
      if (left_[static_cast<size_t>(p.expert)] == 0) return true;
      const int bad = cache_.quarantined_below(expert, wanted(p.expert));
      if (!mine_[static_cast<size_t>(p.expert)]) {
        const int to = bad < 0 ? wanted(p.expert) : bad - 1;
        if (full || !cache_.admit(expert, to, kAnything)) {
          full = true;
          return false;
        }
        own(p.expert);
      }
      // Lower ones too: they may have gone since the plan was made.
      for (int l = 0; l <= p.level; ++l) queue(expert, l);
      moved = true;
      return true;
    });
    if (moved) cache_.work_.notify_all();
    return moved;
  }

  void queue(uint32_t expert, int level) {
    Plane& p = cache_.plane(expert, level);
    if (p.state != State::kAdmitted) return;
    p.state = State::kQueued;
    cache_.demand_.push_back(expert * cache_.levels_ + static_cast<uint32_t>(level));
  }

  // Buckets whose planes are in memory leave `pending_`; those that cannot be had are settled.
  std::vector<Ffn::Bucket> take_ready() {
    std::vector<Ffn::Bucket> ready;
    std::erase_if(pending_, [&](Ffn::Bucket& b) {
      const uint32_t expert = id(b.expert);
      for (int l = cache_.table_[expert].resident; l <= b.level; ++l) {
        const Plane& p = cache_.plane(expert, l);
        if (p.error == 0) continue;
        if (l == 0 || cache_.options_.strict) {
          ffn_.mark(b, kFailed);
          done(b.expert);
          return true;
        }
        b.level = l - 1;
        ffn_.mark(b, kDegraded);
      }
      if (b.level >= cache_.table_[expert].resident) return false;
      ready.push_back(b);
      return true;
    });
    return ready;
  }

  void done(int32_t expert) {
    if (--left_[static_cast<size_t>(expert)] > 0 || !mine_[static_cast<size_t>(expert)]) return;
    mine_[static_cast<size_t>(expert)] = 0;
    cache_.unpin(id(expert));
  }

  void compute(std::unique_lock<std::mutex>& lock, const std::vector<Ffn::Bucket>& ready) {
    double work = 0;
    for (const Ffn::Bucket& b : ready) {
      cache_.pin(id(b.expert));
      double bytes = 0;
      for (int l = 0; l <= b.level; ++l) bytes += static_cast<double>(cache_.plane_bytes_[l]);
      work += bytes * static_cast<double>(b.last - b.first);
    }
    lock.unlock();
    const auto begin = Clock::now();
    ffn_.compute(ready);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    lock.lock();
    double& rate = cache_.compute_seconds_per_byte_;
    rate += 0.1 * (seconds / work - rate);
    for (const Ffn::Bucket& b : ready) {
      cache_.unpin(id(b.expert));
      done(b.expert);
    }
  }

  void wait(std::unique_lock<std::mutex>& lock) {
    const auto begin = Clock::now();
    cache_.done_.wait(lock);
    ++cache_.counters_.waits;
    cache_.counters_.wait_nanoseconds += static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count());
  }

  Cache& cache_;
  const int64_t slot_;
  Ffn& ffn_;
  std::vector<Ffn::Bucket> pending_;
  std::vector<int32_t> left_;    // buckets to compute, by expert
  std::vector<int32_t> wanted_;  // highest level, or -1
  std::vector<uint8_t> mine_;    // pinned until its buckets are computed
  std::vector<PlaneId> order_;   // still to be queued
};

void Cache::ffn(int64_t layer, const Routing& routing, const uint8_t* floors, float* out,
                uint8_t* status) {
  const int64_t slot = slot_of(layer);
  require_this_process();
  check_routing(routing, experts_, static_cast<int32_t>(levels_));
  std::scoped_lock one_call(call_mutex_);
  const LayerExperts& experts = layers_[static_cast<size_t>(slot)].experts;
  const int64_t hidden = experts.shapes[kGate].columns;
  const int64_t group = Ffn::tokens_in(experts, routing.top_k, options_.scratch_bytes);
  std::vector<uint8_t> levels, marks(static_cast<size_t>(routing.n));
  std::vector<int32_t> wished;
  Routing resolved = routing;
  if (floors != nullptr) {
    levels = resolve(slot, routing, floors, wished);
    resolved.levels = levels.data();
  }
  for (int64_t first = 0; first < routing.n; first += group) {
    const int64_t count = std::min(group, routing.n - first);
    Ffn run(experts, resolved.part(first, count, hidden), &scratch_);
    {
      std::unique_lock lock(mutex_);
      ++calls_;
      cancel_ahead(slot);
      Call call(*this, slot, run);
      try {
        call.run(lock);
      } catch (...) {
        if (!lock.owns_lock()) lock.lock();
        call.end();
        throw;
      }
      call.end();
    }
    run.finish(out + first * hidden, marks.data() + first);
  }
  for (int32_t e = 0; e < static_cast<int32_t>(wished.size()); ++e) {
    if (wished[static_cast<size_t>(e)] >= 0) prefetch(layer, &e, 1, wished[static_cast<size_t>(e)]);
  }
  std::scoped_lock lock(mutex_);
  for (const uint8_t mark : marks) {
    counters_.failed_tokens += mark == kFailed;
    counters_.degraded_tokens += mark == kDegraded;
  }
  if (status != nullptr) std::copy(marks.begin(), marks.end(), status);
}

// The levels slots get: what is in memory, between floor and wish. `wished` is, for each expert,
// the level that was wished for and is not there, or -1.
std::vector<uint8_t> Cache::resolve(int64_t slot, const Routing& routing, const uint8_t* floors,
                                    std::vector<int32_t>& wished) {
  std::vector<uint8_t> levels(static_cast<size_t>(routing.n * routing.top_k), kSkip);
  wished.assign(experts_, -1);
  std::scoped_lock lock(mutex_);
  for (int64_t s = 0; s < routing.n * routing.top_k; ++s) {
    if (routing.skipped(s)) continue;
    const int wish = routing.level_of(s), floor = std::min<int>(floors[s], wish);
    const int there = table_[index(slot, routing.ids[s])].resident - 1;
    levels[static_cast<size_t>(s)] = static_cast<uint8_t>(std::max(floor, std::min(wish, there)));
    int32_t& most = wished[static_cast<size_t>(routing.ids[s])];
    if (there < wish) most = std::max(most, wish);
  }
  return levels;
}

}  // namespace pyruntime::moe
