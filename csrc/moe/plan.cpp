#include "moe/plan.hpp"

#include <algorithm>

namespace pyruntime::moe {
namespace {

class Expert {
 public:
  Expert(const Demand& demand, int64_t id) : demand_(demand), id_(id) {
    for (int32_t l = demand.levels - 1; l >= 0 && last_ < 0; --l) {
      if (count(l) > 0) last_ = l;
    }
    next_ = demand.resident[id];
  }
  bool done() const { return next_ > last_; }
  int32_t next() const { return next_; }
  int32_t id() const { return static_cast<int32_t>(id_); }
  void advance() { ++next_; }
  // Tokens that wait for the next plane, and the computing that it lets start.
  int64_t waiting() const {
    int64_t tokens = 0;
    for (int32_t l = next_; l <= last_; ++l) tokens += count(l);
    return tokens;
  }
  double computing() const {
    return static_cast<double>(count(next_)) * demand_.compute_seconds[next_];
  }
  double load_all() const {
    double seconds = 0;
    for (int32_t l = next_; l <= last_; ++l) seconds += demand_.load_seconds[l];
    return seconds;
  }
  double compute_all() const {
    double seconds = 0;
    for (int32_t l = next_; l <= last_; ++l) {
      seconds += static_cast<double>(count(l)) * demand_.compute_seconds[l];
    }
    return seconds;
  }

 private:
  int64_t count(int32_t level) const { return demand_.counts[id_ * demand_.levels + level]; }

  const Demand& demand_;
  int64_t id_;
  int32_t last_ = -1;
  int32_t next_ = 0;
};

// Jobs that load faster than they compute first, the fastest load leading; then the others, the
// longest computing leading.
bool johnson_before(const Expert& a, const Expert& b) {
  const bool a_early = a.load_all() < a.compute_all(), b_early = b.load_all() < b.compute_all();
  if (a_early != b_early) return a_early;
  return a_early ? a.load_all() < b.load_all() : a.compute_all() > b.compute_all();
}

bool hebf_before(const Expert& a, const Expert& b) {
  if (a.waiting() != b.waiting()) return a.waiting() > b.waiting();
  if (a.computing() != b.computing()) return a.computing() > b.computing();
  return a.id() < b.id();
}

}  // namespace

std::vector<PlaneId> plan(const Demand& demand, Order order) {
  std::vector<Expert> open;
  for (int64_t e = 0; e < demand.experts; ++e) {
    if (const Expert expert(demand, e); !expert.done()) open.push_back(expert);
  }
  std::vector<PlaneId> planes;
  if (order != Order::kHebf) {
    std::vector<const Expert*> sorted;
    for (const Expert& e : open) sorted.push_back(&e);
    if (order == Order::kJohnson) {
      std::stable_sort(sorted.begin(), sorted.end(),
                       [](const Expert* a, const Expert* b) { return johnson_before(*a, *b); });
    }
    for (const Expert* e : sorted) {
      for (Expert at = *e; !at.done(); at.advance()) planes.push_back({at.id(), at.next()});
    }
    return planes;
  }
  // A heap of experts by their next plane; only the popped one's key changes.
  std::vector<Expert*> heap;
  for (Expert& e : open) heap.push_back(&e);
  const auto later = [](const Expert* a, const Expert* b) { return hebf_before(*b, *a); };
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    Expert& e = *heap.back();
    planes.push_back({e.id(), e.next()});
    e.advance();
    if (e.done()) {
      heap.pop_back();
    } else {
      std::push_heap(heap.begin(), heap.end(), later);
    }
  }
  return planes;
}

double makespan(const Demand& demand, const std::vector<PlaneId>& order) {
  double loaded = 0, computed = 0;
  const auto compute = [&](int64_t expert, int32_t level) {
    const auto tokens = static_cast<double>(demand.counts[expert * demand.levels + level]);
    computed = std::max(computed, loaded) + tokens * demand.compute_seconds[level];
  };
  for (int64_t e = 0; e < demand.experts; ++e) {
    for (int32_t l = 0; l < demand.resident[e]; ++l) compute(e, l);
  }
  for (const PlaneId& plane : order) {
    loaded += demand.load_seconds[plane.level];
    if (demand.counts[plane.expert * demand.levels + plane.level] > 0) {
      compute(plane.expert, plane.level);
    }
  }
  return std::max(loaded, computed);
}

}  // namespace pyruntime::moe
