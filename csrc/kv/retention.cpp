#include "kv/retention.hpp"

#include <algorithm>
#include <cmath>

namespace pyruntime::kv {

void Durations::add(double seconds) {
  if (ring_.capacity() == 0) {
    ring_.reserve(kWindow);
    sorted_.reserve(kWindow + 1);
  }
  if (ring_.size() < kWindow) {
    ring_.push_back(seconds);
  } else {
    sorted_.erase(std::lower_bound(sorted_.begin(), sorted_.end(), ring_[next_]));
    ring_[next_] = seconds;
    next_ = (next_ + 1) % kWindow;
  }
  sorted_.insert(std::upper_bound(sorted_.begin(), sorted_.end(), seconds), seconds);
}

double Durations::mean() const noexcept {
  double sum = 0;
  for (const double each : sorted_) sum += each;
  return sorted_.empty() ? 0 : sum / static_cast<double>(sorted_.size());
}

double Durations::best(double benefit) const noexcept {
  const auto n = static_cast<double>(sorted_.size());
  double best = 0, most = 0;
  for (size_t i = 0; i < sorted_.size(); ++i) {
    const double worth = static_cast<double>(i + 1) / n * benefit - sorted_[i];
    if (worth > most) {
      most = worth;
      best = sorted_[i];
    }
  }
  return best;
}

void ToolTimes::observe(const std::string& tool, double seconds) {
  if (!(seconds >= 0) || std::isinf(seconds)) {
    fail(PYRT_EINVAL, "a tool took %g seconds; it must be finite and not negative", seconds);
  }
  all_.add(seconds);
  const auto found = tools_.find(tool);
  if (found != tools_.end()) {
    found->second.add(seconds);
  } else if (tools_.size() < kMaxTools) {
    tools_[tool].add(seconds);
  }
}

// Pairs (k, turns - k) for k = 0 .. turns - 1, in closed form.
void ToolTimes::ended(uint32_t turns) noexcept {
  const double n = turns;
  const double sum = n * (n - 1) / 2, squares = (n - 1) * n * (2 * n - 1) / 6;
  n_ += n;
  x_ += sum;
  y_ += n * n - sum;
  xx_ += squares;
  xy_ += n * sum - squares;
  yy_ += n * n * n - 2 * n * sum + squares;
}

double ToolTimes::memoryfulness() const noexcept {
  const double vx = n_ * xx_ - x_ * x_, vy = n_ * yy_ - y_ * y_;
  if (vx <= 0 || vy <= 0) return 1;
  return std::clamp(-(n_ * xy_ - x_ * y_) / std::sqrt(vx * vy), 0.0, 1.0);
}

double ToolTimes::suggest(const std::string& tool, double wait, double eta, double reload,
                          double unknown_mean) const {
  const double benefit = wait * eta + reload;
  const auto found = tools_.find(tool);
  if (found != tools_.end() && found->second.size() > Durations::kFew) {
    return found->second.best(benefit);
  }
  if (all_.size() > Durations::kFew) return all_.best(benefit);
  return benefit > unknown_mean ? unknown_mean * std::log(benefit / unknown_mean) : 0;
}

double ToolTimes::fixed_rule(const std::string& tool) const {
  const auto found = tools_.find(tool);
  return found != tools_.end() && found->second.mean() <= 2 ? 2 : 0;
}

Pins::Pins(BlockPool& pool) : pool_(pool), wheel_(kSlots) {}

uint32_t Pins::index_of(uint64_t pin) const noexcept {
  const auto index = static_cast<uint32_t>(pin) - 1;
  const bool live = static_cast<uint32_t>(pin) != 0 && index < pins_.size() &&
                    pins_[index].generation == pin >> 32 && pins_[index].generation % 2 == 1;
  return live ? index : kNone;
}

bool Pins::holds(uint64_t pin) const noexcept { return index_of(pin) != kNone; }

void Pins::set_cap(double share) {
  if (!(share >= 0 && share <= 1)) fail(PYRT_EINVAL, "the cap is %g; it must be in 0..1", share);
  share_ = share;
}

uint64_t Pins::pin(SeqHandle seq, int64_t deadline, uint64_t arrival) {
  // How many of the later programs' pins must go, if it is to be had that way at all.
  uint64_t all = 0;
  for (const GroupOptions& group : pool_.options().groups) all += group.num_blocks;
  const auto cap = static_cast<uint64_t>(share_ * static_cast<double>(all));
  const uint64_t mine = uint64_t{pool_.published(seq)} * pool_.num_groups();
  uint64_t left = blocks_;
  size_t later = 0;
  for (auto at = order_.rbegin(); left + mine > cap; ++at, ++later) {
    if (at == order_.rend() || at->first <= arrival) {
      stats.refused.add(1);
      return 0;
    }
    left -= pins_[at->second].blocks;
  }
  if (free_ == 0) {
    pins_.push_back({});
    free_ = static_cast<uint32_t>(pins_.size());
  }
  const uint32_t index = free_ - 1;
  const auto place = order_.insert({arrival, index}).first;
  SeqHandle fork;
  try {
    fork = pool_.fork(seq, true);
  } catch (...) {
    order_.erase(place);
    throw;
  }
  // Nothing fails from here on.
  Pin& made = pins_[index];
  free_ = made.next;
  made.seq = fork;
  made.deadline = deadline;
  made.arrival = arrival;
  made.blocks = static_cast<uint32_t>(mine);
  ++made.generation;
  // What is over already hangs where the next tick looks.
  made.slot = slot_of(std::max(deadline, now_));
  uint32_t& head = wheel_[made.slot];
  made.prev = 0;
  made.next = head;
  if (head != 0) pins_[head - 1].prev = index + 1;
  head = index + 1;
  blocks_ += mine;
  stats.made.add(1);
  for (; later > 0; --later) {
    auto last = std::prev(order_.end());
    if (last->second == index) --last;
    stats.pressed.add(1);
    end(last->second);
  }
  return uint64_t{made.generation} << 32 | (index + 1);
}

void Pins::forget(uint32_t index) noexcept {
  Pin& pin = pins_[index];
  if (pin.next != 0) pins_[pin.next - 1].prev = pin.prev;
  if (pin.prev != 0) {
    pins_[pin.prev - 1].next = pin.next;
  } else {
    wheel_[pin.slot] = pin.next;
  }
  order_.erase({pin.arrival, index});
  blocks_ -= pin.blocks;
  ++pin.generation;
  pin.next = free_;
  free_ = index + 1;
}

void Pins::end(uint32_t index) noexcept {
  const SeqHandle seq = pins_[index].seq;
  forget(index);
  if (pool_.alive(seq)) pool_.free({&seq, 1});  // nobody else knows its handle
}

void Pins::unpin(uint64_t pin) {
  const uint32_t index = index_of(pin);
  if (index == kNone) fail(PYRT_ESTATE, "the pin is over, or was never one");
  stats.ended.add(1);
  end(index);
}

uint32_t Pins::tick(int64_t now) noexcept {
  if (now < now_) return 0;
  const auto step = [](int64_t at) { return static_cast<int64_t>(at) >> kTickBits; };
  const int64_t first = now_ == INT64_MIN ? step(now) - kSlots : step(now_);
  const auto slots = static_cast<uint32_t>(std::min<int64_t>(step(now) - first + 1, kSlots));
  uint32_t ended = 0;
  for (uint32_t i = 0; i < slots && !order_.empty(); ++i) {
    uint32_t at = wheel_[static_cast<uint64_t>(step(now) - i) % kSlots];
    while (at != 0) {
      const uint32_t index = at - 1;
      at = pins_[index].next;
      if (pins_[index].deadline > now) continue;  // of a later round
      end(index);
      ++ended;
    }
  }
  now_ = now;
  stats.expired.add(ended);
  return ended;
}

std::span<const SeqHandle> Pins::with_latest(std::span<const SeqHandle> frees, size_t n) {
  frees_.assign(frees.begin(), frees.end());
  for (auto at = order_.rbegin(); n > 0; ++at, --n) frees_.push_back(pins_[at->second].seq);
  return frees_;
}

void Pins::forget_latest(size_t n) noexcept {
  for (; n > 0; --n) {
    stats.pressed.add(1);
    forget(std::prev(order_.end())->second);
  }
}

bool Pins::step(const StepOps& ops, StepResult& result, bool dry) {
  if (order_.empty()) return pool_.step(ops, result, dry);
  StepOps tried = ops;
  if (ops.pins_end) {
    tried.frees = with_latest(ops.frees, order_.size());
    return pool_.step(tried, result, true);
  }
  // How far the step comes without the `n` latest pins; it only ever comes further with more.
  const auto reach = [&](size_t n) -> uint64_t {
    tried.frees = with_latest(ops.frees, n);
    const bool all = pool_.step(tried, result, true);
    if (!ops.prefix) return all;
    return uint64_t{result.num_grown} + result.num_admitted;
  };
  if (!dry && !ops.prefix) {
    tried.attempt = true;
    if (pool_.step(tried, result, false)) return true;
    if (result.never_fits) return pool_.step(ops, result, false);
    tried.attempt = false;
  }
  const uint64_t without = dry || ops.prefix ? reach(0) : 0;
  const uint64_t most = ops.prefix ? ops.grows.size() + ops.admissions.size() : uint64_t{1};
  if (without == most) return pool_.step(ops, result, dry);
  const uint64_t wanted = reach(order_.size());
  size_t low = 0, high = order_.size();  // reach(low) < wanted == reach(high)
  if (wanted == without) high = 0;
  for (size_t step = 1; low + 1 < high; step *= 2) {  // few pins are likely to do
    const size_t middle = low + step < high ? low + step : low + (high - low) / 2;
    if (reach(middle) == wanted) {
      high = middle;
      step = 1;
    } else {
      low = middle;
    }
  }
  tried.frees = with_latest(ops.frees, high);
  const bool fitted = pool_.step(tried, result, dry);
  if (!dry && (fitted || ops.prefix)) forget_latest(high);
  return fitted;
}

size_t Pins::pins_for(const int64_t* need, StepResult& result) {
  StepOps ops;
  const auto enough = [&](size_t n) {
    ops.frees = with_latest({}, n);
    pool_.step(ops, result, true);
    bool fits = true;
    for (uint32_t g = 0; g < pool_.num_groups(); ++g) fits &= result.left[g] >= need[g];
    return fits;
  };
  size_t n = 1;
  while (n < order_.size() && !enough(n)) n *= 2;
  n = std::min(n, order_.size());
  return enough(n) ? n : order_.size() + 1;
}

void Pins::unpark(SeqHandle seq, StepResult& result, std::vector<Eviction>* evicted) {
  int64_t need[kMaxGroups];
  bool lacking = false;
  for (uint32_t g = 0; g < pool_.num_groups(); ++g) {
    need[g] = pool_.parked_blocks(seq, g);
    lacking |= pool_.available(g) < need[g];
  }
  if (lacking && !order_.empty()) {
    const size_t n = pins_for(need, result);
    if (n <= order_.size()) {
      pool_.free(with_latest({}, n));
      forget_latest(n);
    }
  }
  pool_.unpark(seq, evicted);
}

bool Pins::advance(Batch& batch, const int32_t* tokens, StepResult& result) {
  if (order_.empty()) return batch.advance(tokens, result);
  if (batch.advance(tokens, result, true)) return true;
  const auto refuse = [&] {
    pool_.stats().failed_steps.add(1);
    return false;
  };
  if (result.never_fits) return refuse();
  int64_t need[kMaxGroups];
  for (uint32_t g = 0; g < pool_.num_groups(); ++g) {
    need[g] = pool_.available(g) - result.left[g];
  }
  const StepResult refused = result;
  size_t n = pins_for(need, result);
  if (n > order_.size()) {
    result = refused;
    return refuse();
  }
  // Content that the batch writes a second time may be among what is unpinned: then it holds it
  // again, so that more must go.
  for (;; n = 1) {
    pool_.free(with_latest({}, n));
    forget_latest(n);
    if (batch.advance(tokens, result, true)) return true;
    if (order_.empty()) return refuse();
  }
}

void Pins::check() const {
  size_t live = 0;
  uint64_t blocks = 0;
  const auto broken = [](const char* what) { fail(PYRT_ECORRUPT, "the pins: %s", what); };
  for (uint32_t index = 0; index < pins_.size(); ++index) {
    const Pin& pin = pins_[index];
    if (pin.generation % 2 == 0) continue;
    ++live;
    blocks += pin.blocks;
    if (!pool_.alive(pin.seq)) broken("a pin has lost its sequence");
    if (!order_.contains({pin.arrival, index})) broken("a pin is not in the order");
  }
  if (live != order_.size() || blocks != blocks_) broken("they are counted wrongly");
  size_t hanging = 0;
  for (const uint32_t head : wheel_) {
    uint32_t before = 0;
    for (uint32_t at = head; at != 0; at = pins_[at - 1].next) {
      if (pins_[at - 1].prev != before || ++hanging > live) broken("the wheel");
      before = at;
    }
  }
  if (hanging != live) broken("one does not hang in the wheel");
}

uint64_t Pins::hash() const noexcept {
  uint64_t hash = 0x9e3779b97f4a7c15ull + blocks_;
  const auto add = [&](uint64_t value) { hash = (hash ^ value) * 0x100000001b3ull + (hash >> 29); };
  for (const auto& [arrival, index] : order_) {
    add(arrival);
    add(pins_[index].seq);
    add(static_cast<uint64_t>(pins_[index].deadline));
    add(pins_[index].generation);
  }
  return hash;
}

}  // namespace pyruntime::kv
