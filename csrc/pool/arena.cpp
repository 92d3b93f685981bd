#include "pool/arena.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cinttypes>

#include "base/os_memory.hpp"
#include "base/status.hpp"

namespace pyruntime::pool {
namespace {

constexpr uint64_t kMaxRange = uint64_t{1} << 43;
constexpr int kReclaimRounds = 8;  // of the owner's callback, while it achieves something

uint64_t round_up(uint64_t value, uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

uint64_t checked_units(uint64_t bytes, uint64_t unit) {
  if (bytes < unit || bytes > kMaxRange) {
    fail(PYRT_EINVAL, "reserve_bytes is %" PRIu64 "; it must be in %" PRIu64 "..2^43", bytes, unit);
  }
  return bytes / unit;
}

}  // namespace

Arena::Arena(const Options& options)
    : options_([&] {
        Options own = options;
        for (uint64_t& bytes : own.class_bytes) {
          if (bytes < 1 || bytes > options.reserve_bytes) {
            fail(PYRT_EINVAL, "a class of %" PRIu64 " bytes; it must be in 1..reserve_bytes",
                 bytes);
          }
          bytes = round_up(bytes, kPage);
        }
        std::sort(own.class_bytes.begin(), own.class_bytes.end());
        return own;
      }()),
      process_(getpid()),
      num_units_(checked_units(options.reserve_bytes, kUnit)) {
  runs_.emplace(0, num_units_);
  base_ = static_cast<char*>(base::os::reserve(num_units_ * kUnit, kUnit));
  if (base_ == nullptr) {
    fail(PYRT_ENOMEM, "cannot reserve %" PRIu64 " bytes of address space", num_units_ * kUnit);
  }
  if (options_.budget == nullptr) return;
  try {
    client_ =
        options_.budget->add(options_.name.c_str(), options_.priority, &Arena::on_reclaim, this);
  } catch (...) {
    base::os::unreserve(base_, num_units_ * kUnit);
    throw;
  }
}

Arena::~Arena() {
  try {
    leave_budget();
  } catch (const Error&) {
    return;  // the budget still calls this range
  }
  base::os::unreserve(base_, num_units_ * kUnit);
}

void Arena::leave_budget() {
  if (client_ == nullptr) return;
  options_.budget->remove(client_, true);
  client_ = nullptr;
}

void Arena::require_this_process() const {
  if (getpid() != process_) fail(PYRT_ESTATE, "the arena belongs to the parent of this process");
}

uint64_t Arena::stride_for(uint64_t bytes) const {
  const auto& named = options_.class_bytes;
  const auto fits = std::lower_bound(named.begin(), named.end(), bytes);
  if (fits != named.end()) return *fits;
  const uint64_t step = std::clamp<uint64_t>(std::bit_floor(bytes - 1) / 4, kPage, kUnit);
  return round_up(bytes, step);
}

uint64_t Arena::slab_units(uint64_t stride) {
  const uint64_t least = (stride + kUnit - 1) / kUnit;
  uint64_t best = least;
  double best_waste = 1;
  for (uint64_t units = least; units < least + kMaxSlabUnits; ++units) {
    const double waste = double(units * kUnit % stride) / double(units * kUnit);
    if (waste < best_waste) {
      best = units;
      best_waste = waste;
    }
    if (best_waste <= 1.0 / 8) break;
  }
  return best;
}

void* Arena::acquire(uint64_t bytes) {
  require_this_process();
  if (bytes < 1 || bytes > num_units_ * kUnit) {
    fail(PYRT_EINVAL, "bytes is %" PRIu64 "; it must be in 1..%" PRIu64, bytes, num_units_ * kUnit);
  }
  const uint64_t stride = stride_for(bytes);
  const uint64_t units = slab_units(stride);
  {
    std::scoped_lock lock(mutex_);
    auto& open = open_[stride];
    if (!open.empty()) return pop(open, stride);
  }
  try {
    reserve(units * kUnit);
  } catch (const Error&) {
    std::scoped_lock lock(mutex_);
    auto& open = open_[stride];
    if (!open.empty()) return pop(open, stride);  // another thread released one meanwhile
    ++failures_;
    throw;
  }
  std::scoped_lock lock(mutex_);
  // The object is popped under the lock that made the slab: no other thread can take it away.
  if (add_slab(stride, units)) return pop(open_[stride], stride);
  ++failures_;
  fail(PYRT_EFULL, "no run of %" PRIu64 " bytes is free in the arena's %" PRIu64, units * kUnit,
       num_units_ * kUnit);
}

// No lock held: the budget may run callbacks, our own thread's arena included.
void Arena::reserve(uint64_t bytes) {
  if (client_ == nullptr || options_.budget->try_reserve(*client_, bytes)) return;
  trim();
  options_.budget->reserve(*client_, bytes);
}

// mutex_ held, the budget charged. False without a run; throws without memory. Either way the
// budget has its bytes back then.
bool Arena::add_slab(uint64_t stride, uint64_t units) {
  const auto undo = [&] {
    if (client_ != nullptr) options_.budget->give_back(*client_, units * kUnit);
  };
  uint64_t first = 0;
  try {
    if (!take_run(units, &first)) {
      trim_locked();  // empty slabs of other classes
      if (!take_run(units, &first)) {
        undo();
        return false;
      }
    }
  } catch (const std::bad_alloc&) {
    undo();
    throw;
  }
  try {
    auto slab = std::make_unique<Slab>();
    const auto count = static_cast<uint32_t>(units * kUnit / stride);
    slab->first_unit = first;
    slab->units = units;
    slab->stride = stride;
    slab->out.resize(count);
    slab->free.reserve(count);
    for (uint32_t slot = count; slot-- > 0;) slab->free.push_back(slot);
    auto& open = open_[stride];
    Slab* const made = slab.get();
    slabs_.emplace(first, std::move(slab));
    open.insert(made);
    if (!base::os::commit(address(first), units * kUnit)) {
      open.erase(made);
      slabs_.erase(first);
      fail(PYRT_ENOMEM, "cannot commit %" PRIu64 " bytes for the arena", units * kUnit);
    }
  } catch (...) {
    if (slabs_.count(first) != 0) slabs_.erase(first);
    return_run(first, units);
    undo();
    throw;
  }
  if (!base::os::advise_huge(address(first), units * kUnit, options_.huge)) ++fallbacks_;
  if (options_.node >= 0 &&
      base::os::prefer_node(address(first), units * kUnit, options_.node) != 0) {
    ++fallbacks_;
  }
  committed_units_ += units;
  return true;
}

bool Arena::take_run(uint64_t units, uint64_t* first) {
  for (auto run = runs_.begin(); run != runs_.end(); ++run) {
    if (run->second < units) continue;
    *first = run->first;
    if (run->second > units) runs_.emplace(run->first + units, run->second - units);
    runs_.erase(run);
    return true;
  }
  return false;
}

void Arena::return_run(uint64_t first, uint64_t units) {
  auto next = runs_.lower_bound(first);
  if (next != runs_.end() && next->first == first + units) {
    units += next->second;
    next = runs_.erase(next);
  }
  if (next != runs_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == first) {
      before->second += units;
      return;
    }
  }
  runs_.emplace(first, units);
}

void* Arena::pop(std::set<Slab*, ByAddress>& open, uint64_t stride) {
  Slab* const slab = *open.begin();
  const uint32_t slot = slab->free.back();
  slab->free.pop_back();
  slab->out[slot] = true;
  if (slab->free.empty()) open.erase(open.begin());
  ++objects_;
  ++acquires_;
  in_use_bytes_ += stride;
  return address(slab->first_unit) + slot * stride;
}

// mutex_ held. Throws unless `object` is out.
Arena::Place Arena::locate(const void* object) const {
  const auto offset = reinterpret_cast<uintptr_t>(object) - reinterpret_cast<uintptr_t>(base_);
  auto after = slabs_.upper_bound(offset / kUnit);
  if (offset < num_units_ * kUnit && after != slabs_.begin()) {
    Slab* const slab = std::prev(after)->second.get();
    const uint64_t within = offset - slab->first_unit * kUnit;
    const uint64_t slot = within / slab->stride;
    if (slot < slab->out.size() && within % slab->stride == 0) {
      if (slab->out[slot]) return {slab, static_cast<uint32_t>(slot)};
      fail(PYRT_ESTATE, "%p is not out: released twice, or never acquired", object);
    }
  }
  fail(PYRT_EINVAL, "%p is no object of the arena (or its slab was given back)", object);
}

void Arena::release(void* object) {
  require_this_process();
  std::scoped_lock lock(mutex_);
  const auto [slab, slot] = locate(object);
  if (slab->free.empty()) open_[slab->stride].insert(slab);
  slab->free.push_back(slot);  // reserved when the slab was made
  slab->out[slot] = false;
  --objects_;
  in_use_bytes_ -= slab->stride;
}

uint64_t Arena::size_of(const void* object) {
  require_this_process();
  std::scoped_lock lock(mutex_);
  return locate(object).slab->stride;
}

// mutex_ held; `slab` is empty.
void Arena::drop(Slab* slab) {
  const uint64_t first = slab->first_unit;
  const uint64_t units = slab->units;
  return_run(first, units);  // may lack memory: before anything else
  // Without NOHUGEPAGE the kernel's daemon could fill the range again.
  base::os::advise_huge(address(first), units * kUnit, false);
  base::os::discard(address(first), units * kUnit);
  base::os::protect_none(address(first), units * kUnit);
  open_[slab->stride].erase(slab);
  slabs_.erase(first);
  committed_units_ -= units;
  trimmed_units_ += units;
  if (client_ != nullptr) options_.budget->give_back(*client_, units * kUnit);
}

uint64_t Arena::trim_locked() {
  uint64_t bytes = 0;
  for (auto at = slabs_.begin(); at != slabs_.end();) {
    Slab* const slab = (at++)->second.get();
    if (!slab->empty()) continue;
    bytes += slab->units * kUnit;
    drop(slab);
  }
  return bytes;
}

uint64_t Arena::trim() {
  require_this_process();
  std::scoped_lock lock(mutex_);
  return trim_locked();
}

// The budget asks, on another client's thread.
uint64_t Arena::on_reclaim(void* self, uint64_t bytes) {
  auto& arena = *static_cast<Arena*>(self);
  const auto ask = arena.options_.reclaim;
  uint64_t freed = 0;
  try {
    freed = arena.trim();
    for (int round = 0; round < kReclaimRounds && freed < bytes && ask != nullptr; ++round) {
      if (ask(arena.options_.user, bytes - freed) == 0) break;
      freed += arena.trim();
    }
  } catch (const std::bad_alloc&) {
    // what could be given back was
  }
  return freed;
}

uint64_t Arena::objects_out() {
  require_this_process();
  std::scoped_lock lock(mutex_);
  return objects_;
}

pyrt_arena_statistics Arena::statistics() {
  require_this_process();
  std::scoped_lock lock(mutex_);
  pyrt_arena_statistics s{};
  s.struct_size = sizeof s;
  s.num_slabs = static_cast<uint32_t>(slabs_.size());
  s.objects = objects_;
  s.in_use_bytes = in_use_bytes_;
  s.committed_bytes = committed_units_ * kUnit;
  for (const auto& [first, slab] : slabs_) s.empty_bytes += slab->empty() * slab->units * kUnit;
  s.reserved_bytes = num_units_ * kUnit;
  s.acquires = acquires_;
  s.releases = acquires_ - objects_;
  s.failures = failures_;
  s.trimmed_bytes = trimmed_units_ * kUnit;
  s.fallbacks = fallbacks_;
  s.huge_bytes = base::os::huge_bytes(base_, num_units_ * kUnit);
  return s;
}

void Arena::check() {
  require_this_process();
  std::scoped_lock lock(mutex_);
  uint64_t units = 0;
  uint64_t objects = 0;
  uint64_t bytes = 0;
  uint64_t end = 0;
  for (const auto& [first, slab] : slabs_) {
    const uint64_t out =
        static_cast<uint64_t>(std::count(slab->out.begin(), slab->out.end(), true));
    const auto open = open_.find(slab->stride);
    const bool is_open = open != open_.end() && open->second.count(slab.get()) != 0;
    if (first < end || slab->first_unit != first || out + slab->free.size() != slab->out.size() ||
        is_open == slab->free.empty()) {
      fail(PYRT_ECORRUPT, "the slab at unit %" PRIu64 " is inconsistent", first);
    }
    end = first + slab->units;
    units += slab->units;
    objects += out;
    bytes += out * slab->stride;
  }
  uint64_t free_units = 0;
  for (const auto& [first, length] : runs_) free_units += length;
  if (units != committed_units_ || objects != objects_ || bytes != in_use_bytes_ ||
      units + free_units != num_units_) {
    fail(PYRT_ECORRUPT, "%" PRIu64 " units in slabs and %" PRIu64 " free of %" PRIu64, units,
         free_units, num_units_);
  }
}

}  // namespace pyruntime::pool
