#include "moe/cache.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/os_memory.hpp"
#include "base/status.hpp"

namespace pyruntime::moe {
namespace {

constexpr double kNever = -1e12;  // log2 of the uses of what was never used
constexpr uint64_t kUnit = pool::kBudgetUnit;
// Prefetching is judged after this many bytes, and tried again after this many calls per layer.
constexpr uint64_t kWindowBytes = uint64_t{32} << 20;
constexpr uint64_t kPauseCalls = 256;

using Clock = std::chrono::steady_clock;

}  // namespace

Cache::Cache(const Store& store, std::unique_ptr<Reader> reader, const Options& options)
    : store_(store),
      reader_(std::move(reader)),
      options_(options),
      process_(getpid()),
      levels_(store.header().levels),
      experts_(store.header().num_experts),
      slot_of_layer_(store.header().num_layers, -1),
      scratch_(std::min(options.scratch_bytes, kScratchBytes)) {
  for (uint32_t l = 0; l < levels_; ++l) {
    plane_bytes_[l] = padded(static_cast<uint64_t>(store.extent_bytes(static_cast<int>(l))));
    minimum_ += plane_bytes_[l];
  }
  if (options.budget != nullptr) minimum_ = (minimum_ + kUnit - 1) / kUnit * kUnit;
  if (options.limit_bytes < minimum_) {
    fail(PYRT_EFULL, "limit_bytes is %" PRIu64 "; one expert of %s takes %" PRIu64 " at its widest",
         options.limit_bytes, store.path().c_str(), minimum_);
  }
  lay_out();
  base_ = static_cast<char*>(base::os::reserve(range_bytes_, kPage));
  if (base_ == nullptr || !base::os::commit(base_, range_bytes_)) {
    if (base_ != nullptr) base::os::unreserve(base_, range_bytes_);
    fail(PYRT_ENOMEM, "the system refuses %" PRIu64 " bytes of address space", range_bytes_);
  }
  try {
    join_budget();
    for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this] { loader(); });
  } catch (...) {
    stop_loaders();
    if (client_ != nullptr) options_.budget->remove(client_, true);
    base::os::unreserve(base_, range_bytes_);
    throw;
  }
}

// Gives every plane of the store its place.
void Cache::lay_out() {
  for (size_t l = 0; l < slot_of_layer_.size(); ++l) {
    if (store_.sparse(static_cast<int64_t>(l))) {
      slot_of_layer_[l] = static_cast<int32_t>(slots_++);
    }
  }
  const auto experts = static_cast<size_t>(slots_ * experts_);
  planes_.resize(experts * levels_);
  table_.resize(experts);
  layers_.resize(static_cast<size_t>(slots_));
  for (size_t l = 0; l < slot_of_layer_.size(); ++l) {
    const int64_t slot = slot_of_layer_[l];
    if (slot < 0) continue;
    Layer& layer = layers_[static_cast<size_t>(slot)];
    layer.planes.assign(static_cast<size_t>(experts_) * levels_, nullptr);
    layer.units.resize(static_cast<size_t>(experts_ * kMatrices));
    for (int64_t e = 0; e < experts_; ++e) {
      for (uint32_t level = 0; level < levels_; ++level) {
        Plane& p = plane(index(slot, e), static_cast<int>(level));
        p.uses = kNever;
        p.offset = range_bytes_;
        p.record = store_.find(static_cast<int64_t>(l), e, static_cast<int>(level));
        range_bytes_ += plane_bytes_[level];
      }
      std::copy_n(plane(index(slot, e), 0).record->unit, kMatrices,
                  layer.units.begin() + e * kMatrices);
    }
    for (int i = 0; i < kMatrices; ++i) layer.experts.shapes[i] = store_.shape(i);
    layer.experts.experts = experts_;
    layer.experts.levels = static_cast<int32_t>(levels_);
    layer.experts.planes = layer.planes.data();
    layer.experts.units = layer.units.data();
  }
}

void Cache::join_budget() {
  if (options_.budget == nullptr) {
    capacity_ = options_.limit_bytes;
    return;
  }
  client_ = options_.budget->add("expert cache", options_.priority, &Cache::on_reclaim, this);
  options_.budget->reserve(*client_, minimum_);
  std::scoped_lock lock(mutex_);
  capacity_ = minimum_;
}

void Cache::stop_loaders() {
  {
    std::scoped_lock lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  done_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Cache::~Cache() {
  if (getpid() != process_) {  // the loaders are the parent's, and so is what the budget counts
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  stop_loaders();
  if (client_ != nullptr) options_.budget->remove(client_, true);
  base::os::unreserve(base_, range_bytes_);
}

void Cache::require_this_process() const {
  if (getpid() != process_) fail(PYRT_ESTATE, "the cache belongs to the parent of this process");
}

int64_t Cache::slot_of(int64_t layer) const {
  const auto layers = static_cast<int64_t>(slot_of_layer_.size());
  if (layer < 0 || layer >= layers || slot_of_layer_[static_cast<size_t>(layer)] < 0) {
    fail(PYRT_EINVAL, "layer is %" PRId64 "; %s has no experts there", layer,
         store_.path().c_str());
  }
  return slot_of_layer_[static_cast<size_t>(layer)];
}

// Worth and eviction; the mutex is held.

double Cache::worth(uint32_t expert, int level) {
  const Plane& p = plane(expert, level);
  double worth = p.uses - std::log2(static_cast<double>(plane_bytes_[level]));
  if (!options_.worth_errors) return worth;
  double before = 0, after = 0, energy = 0;
  for (int i = 0; i < kMatrices; ++i) {
    before += static_cast<double>(level == 0 ? p.record->energy[i]
                                             : plane(expert, level - 1).record->error[i]);
    after += static_cast<double>(p.record->error[i]);
    energy += static_cast<double>(p.record->energy[i]);
  }
  return worth + std::log2(std::max((before - after) / std::max(energy, 1e-30), 1e-12));
}

void Cache::touch(Plane& p) {
  const double use = now() / kHalfLife;
  const double more = std::max(p.uses, use), less = std::min(p.uses, use);
  p.uses = more + std::log2(1 + std::exp2(less - more));
}

// Puts the expert where its worth belongs among the victims, or takes it out.
void Cache::list(uint32_t expert) {
  Expert& e = table_[expert];
  if (e.listed) victims_.erase({e.key, expert});
  e.listed = e.pins == 0 && e.resident > 0;
  if (!e.listed) return;
  e.key = worth(expert, e.resident - 1);
  victims_.insert({e.key, expert});
}

void Cache::pin(uint32_t expert) {
  ++table_[expert].pins;
  list(expert);
}

void Cache::unpin(uint32_t expert) {
  --table_[expert].pins;
  list(expert);
}

void Cache::release(uint32_t expert, int level) {
  Plane& p = plane(expert, level);
  base::os::discard(base_ + p.offset, plane_bytes_[level]);
  used_ -= plane_bytes_[level];
  p.state = State::kAbsent;
  if (p.prefetched) {
    p.prefetched = false;
    counters_.prefetch_wasted_bytes += plane_bytes_[level];
    window_wasted_ += plane_bytes_[level];
    judge_prefetch();
  }
}

void Cache::evict_top(uint32_t expert) {
  Expert& e = table_[expert];
  const int level = --e.resident;
  Layer& layer = layer_of(expert);
  layer.planes[(expert % experts_) * levels_ + static_cast<uint32_t>(level)] = nullptr;
  if (level == 0) --layer.base_planes;
  --counters_.resident[level];
  ++counters_.evictions;
  counters_.evicted_bytes += plane_bytes_[level];
  release(expert, level);
  list(expert);
}

bool Cache::grow() {
  if (client_ == nullptr || capacity_ + kUnit > options_.limit_bytes) return false;
  if (!options_.budget->try_reserve(*client_, kUnit)) return false;
  capacity_ += kUnit;
  return true;
}

// The expert to take a plane from: worth less than `below`, a base plane only where the layer has
// more than `floor`. -1: none.
int64_t Cache::victim(double below, int32_t floor, int32_t least_resident) {
  for (const auto& [key, expert] : victims_) {
    if (key >= below) break;
    const Expert& e = table_[expert];
    if (e.resident < least_resident) continue;
    if (e.resident > 1 || layer_of(expert).base_planes > floor) return expert;
  }
  return -1;
}

bool Cache::make_room(uint64_t bytes, double below) {
  const bool must = std::isinf(below);
  while (used_ + bytes > capacity_) {
    if (grow()) continue;
    int64_t expert = victim(below, options_.floor, 1);
    if (expert < 0 && must) expert = victim(below, 0, 1);  // floors are a wish
    if (expert < 0) return false;
    evict_top(static_cast<uint32_t>(expert));
  }
  return true;
}

uint64_t Cache::on_reclaim(void* self, uint64_t bytes) {
  return static_cast<Cache*>(self)->reclaim(bytes);
}

uint64_t Cache::reclaim(uint64_t bytes) {
  std::scoped_lock lock(mutex_);
  cancel_ahead(-1);
  const uint64_t most = capacity_ - minimum_;
  const uint64_t wanted = std::min((bytes + kUnit - 1) / kUnit * kUnit, most);
  while (capacity_ - used_ < wanted) {
    int64_t expert = victim(std::numeric_limits<double>::infinity(), 0, 2);
    if (expert < 0) expert = victim(std::numeric_limits<double>::infinity(), options_.floor, 1);
    if (expert < 0) break;
    evict_top(static_cast<uint32_t>(expert));
  }
  const uint64_t given = std::min(wanted, (capacity_ - used_) / kUnit * kUnit);
  capacity_ -= given;
  options_.budget->give_back(*client_, given);
  return given;
}

uint64_t Cache::shrink(uint64_t bytes) {
  require_this_process();
  std::scoped_lock lock(mutex_);
  cancel_ahead(-1);
  while (used_ > bytes && !victims_.empty()) evict_top(victims_.begin()->second);
  return used_;
}

// Loading; the mutex is held.

// Takes room for the planes 0..to that are not there, and marks them; the caller queues them.
bool Cache::admit(uint32_t expert, int to, double below) {
  uint64_t bytes = 0;
  pin(expert);  // not a victim for its own sake
  for (int l = 0; l <= to; ++l) {
    if (plane(expert, l).state == State::kAbsent) bytes += plane_bytes_[l];
  }
  const bool room = make_room(bytes, below);
  for (int l = 0; room && l <= to; ++l) {
    if (plane(expert, l).state != State::kAbsent) continue;
    plane(expert, l).state = State::kAdmitted;
    used_ += plane_bytes_[l];
    ++table_[expert].loads;
    pin(expert);
  }
  unpin(expert);
  return room;
}

// Planes above one that failed are of no use.
void Cache::discard_orphans(uint32_t expert) {
  const Expert& e = table_[expert];
  for (int l = e.resident; e.loads == 0 && l < static_cast<int>(levels_); ++l) {
    if (plane(expert, l).state == State::kResident) release(expert, l);
  }
}

// Forgets what was queued ahead for the layer of `slot`, or for all (-1).
void Cache::cancel_ahead(int64_t slot) {
  std::erase_if(ahead_, [&](uint32_t job) {
    const uint32_t expert = job / levels_;
    if (slot >= 0 && expert / experts_ != slot) return false;
    Plane& p = planes_[job];
    p.prefetched = false;  // it was never there
    p.state = State::kAbsent;
    used_ -= plane_bytes_[job % levels_];
    ++counters_.prefetch_cancelled;
    --table_[expert].loads;
    discard_orphans(expert);
    unpin(expert);
    return true;
  });
}

void Cache::judge_prefetch() {
  if (window_useful_ + window_wasted_ < kWindowBytes) return;
  if (window_useful_ < window_wasted_) {
    prefetch_paused_until_ = calls_ + kPauseCalls * static_cast<uint64_t>(slots_);
  }
  window_useful_ = window_wasted_ = 0;
}

int64_t Cache::check_wanted(int64_t layer, const int32_t* experts, int64_t count, int level) const {
  const int64_t slot = slot_of(layer);
  require_this_process();
  for (int64_t i = 0; i < count; ++i) {
    if (experts[i] < 0 || experts[i] >= static_cast<int64_t>(experts_)) {
      fail(PYRT_EINVAL, "experts has %d; experts are 0..%u", experts[i], experts_ - 1);
    }
  }
  if (level < 0 || level >= static_cast<int>(levels_)) {
    fail(PYRT_EINVAL, "level is %d; levels are 0..%u", level, levels_ - 1);
  }
  return slot;
}

void Cache::prefetch(int64_t layer, const int32_t* experts, int64_t count, int level) {
  const int64_t slot = check_wanted(layer, experts, count, level);
  std::scoped_lock lock(mutex_);
  if (calls_ < prefetch_paused_until_) return;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t expert = index(slot, experts[i]);
    const Expert& e = table_[expert];
    if (e.loads > 0 || e.resident > level) continue;
    if (quarantined_below(expert, level) >= 0) continue;
    Plane as_if = plane(expert, e.resident);
    touch(as_if);
    const double uses = plane(expert, e.resident).uses;
    if (!admit(expert, level, worth(expert, e.resident) + (as_if.uses - uses))) return;
    for (int l = e.resident; l <= level; ++l) {
      Plane& p = plane(expert, l);
      p.state = State::kQueued;
      p.prefetched = true;
      ahead_.push_back(expert * levels_ + static_cast<uint32_t>(l));
      counters_.prefetched_bytes += plane_bytes_[l];
    }
  }
  work_.notify_all();
}

uint64_t Cache::missing_bytes(int64_t layer, const int32_t* experts, int64_t count, int level) {
  const int64_t slot = check_wanted(layer, experts, count, level);
  std::scoped_lock lock(mutex_);
  uint64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (int l = table_[index(slot, experts[i])].resident; l <= level; ++l) {
      bytes += plane_bytes_[l];
    }
  }
  return bytes;
}

int Cache::quarantined_below(uint32_t expert, int level) {
  for (int l = 0; l <= level; ++l) {
    if (plane(expert, l).state == State::kBad) return l;
  }
  return -1;
}

pyrt_status Cache::read(const Plane& p, uint64_t bytes) {
  void* to = base_ + p.offset;
  bool again = false;
  for (int attempt = 1;; ++attempt) {
    try {
      if (base::os::populate(to, bytes) == ENOMEM) return PYRT_ENOMEM;
      reader_->read(*p.record, to, again);
      return PYRT_OK;
    } catch (const Error& error) {
      std::unique_lock lock(mutex_);
      const bool corrupt = error.status() == PYRT_ECORRUPT;
      ++(corrupt ? counters_.checksum_errors : counters_.read_errors);
      if ((corrupt && again) || attempt == kAttempts || stop_) return error.status();
      again = again || corrupt;
      done_.wait_for(lock, std::chrono::milliseconds(1 << (2 * attempt)), [&] { return stop_; });
    } catch (const std::exception&) {
      return PYRT_EIO;
    }
  }
}

void Cache::loader() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stop_ || !demand_.empty() || !ahead_.empty(); });
    if (stop_) return;
    auto& queue = demand_.empty() ? ahead_ : demand_;
    const uint32_t job = queue.front();
    queue.pop_front();
    Plane& p = planes_[job];
    const uint64_t bytes = plane_bytes_[job % levels_];
    p.state = State::kLoading;
    ++loading_;
    lock.unlock();
    const auto begin = Clock::now();
    const pyrt_status status = read(p, bytes);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    lock.lock();
    --loading_;
    load_seconds_per_byte_ += 0.1 * (seconds / static_cast<double>(bytes) - load_seconds_per_byte_);
    finish(job, status);
    done_.notify_all();
  }
}

// A load has ended.
void Cache::finish(uint32_t job, pyrt_status status) {
  const uint32_t expert = job / levels_;
  const int level = static_cast<int>(job % levels_);
  Plane& p = planes_[job];
  Expert& e = table_[expert];
  --e.loads;
  if (status == PYRT_OK) {
    p.state = State::kResident;
    counters_.bytes_read += plane_bytes_[level];
    Layer& layer = layer_of(expert);
    while (e.resident < static_cast<int>(levels_) &&
           plane(expert, e.resident).state == State::kResident) {
      Plane& top = plane(expert, e.resident);
      layer.planes[(expert % experts_) * levels_ + static_cast<uint32_t>(e.resident)] =
          reinterpret_cast<const uint8_t*>(base_ + top.offset);
      if (e.resident == 0) ++layer.base_planes;
      ++counters_.resident[e.resident++];
    }
  } else {
    p.prefetched = false;
    release(expert, level);
    p.error = static_cast<uint8_t>(status);
    if (status == PYRT_ECORRUPT) {
      p.state = State::kBad;
      ++counters_.quarantined;
    }
  }
  discard_orphans(expert);
  unpin(expert);
}

void Cache::drain() {
  require_this_process();
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return demand_.empty() && ahead_.empty() && loading_ == 0; });
}

CacheStatistics Cache::statistics() {
  require_this_process();
  std::scoped_lock lock(mutex_);
  CacheStatistics s = counters_;
  s.limit_bytes = options_.limit_bytes;
  s.capacity_bytes = capacity_;
  s.used_bytes = used_;
  s.calls = calls_;
  s.prefetching = calls_ >= prefetch_paused_until_;
  std::strncpy(s.backend, reader_->name(), sizeof s.backend - 1);
  return s;
}

void Cache::check() {
  std::scoped_lock lock(mutex_);
  uint64_t used = 0;
  const auto require = [](bool holds, const char* what) {
    if (!holds) fail(PYRT_ECORRUPT, "expert cache: %s", what);
  };
  for (uint32_t i = 0; i < table_.size(); ++i) {
    const Expert& e = table_[i];
    int32_t loads = 0;
    for (uint32_t l = 0; l < levels_; ++l) {
      const State state = plane(i, static_cast<int>(l)).state;
      const bool resident = static_cast<int32_t>(l) < e.resident;
      require(!resident || state == State::kResident, "a resident plane is not there");
      require(resident || state != State::kResident || e.loads > 0,
              "a plane without its lower one");
      const bool coming =
          state == State::kAdmitted || state == State::kQueued || state == State::kLoading;
      loads += coming ? 1 : 0;
      if (coming || state == State::kResident) used += plane_bytes_[l];
      const uint8_t* at = layer_of(i).planes[(i % experts_) * levels_ + l];
      require((at != nullptr) == resident, "an address does not match its plane");
    }
    require(loads == e.loads && e.pins >= e.loads, "loads are miscounted");
    require(e.listed == (e.pins == 0 && e.resident > 0), "a victim is not listed");
    require(!e.listed || victims_.contains({e.key, i}), "a victim is listed elsewhere");
  }
  require(used == used_, "used bytes are miscounted");
  require(used_ <= capacity_ && capacity_ <= std::max(options_.limit_bytes, minimum_),
          "more is used than there is");
}

}  // namespace pyruntime::moe
