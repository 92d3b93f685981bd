// The order in which an expert layer's planes are loaded, so that computing waits little.
//
// Two machines: one loads planes, one after another; one computes, an expert's tokens of a width
// once the planes of that width are in. Loading sets the pace, so the order matters: planes that
// many tokens wait for go first. Pure functions, O(planes * experts).
//
// Sources: HEBF, "highest expert-bit first" (D2MoE, arXiv 2504.15299, section 5); Johnson's rule
// for two machines (Johnson 1954), over whole experts.
#pragma once

#include <cstdint>
#include <vector>

namespace pyruntime::moe {

enum class Order : int32_t { kHebf = 0, kJohnson = 1, kById = 2 };

struct PlaneId {
  int32_t expert;
  int32_t level;
  bool operator==(const PlaneId&) const = default;
};

// What a layer's call needs. counts[e, l]: tokens that want expert e at exactly level l;
// resident[e]: levels of e in memory (0: none).
struct Demand {
  int64_t experts;
  int32_t levels;
  const int64_t* counts;
  const int32_t* resident;
  const double* load_seconds;     // [levels]: to load a plane of that level
  const double* compute_seconds;  // [levels]: to compute one token at that level
};

// The planes that are missing, in the order to load them; a plane never before a lower one of its
// expert. HEBF: the plane that most tokens wait for, then the longest computing behind it, then the
// lowest expert.
std::vector<PlaneId> plan(const Demand& demand, Order order);

// Seconds until all is computed if planes are loaded in `order` and tokens are computed as they
// become computable, those in memory first.
double makespan(const Demand& demand, const std::vector<PlaneId>& order);

}  // namespace pyruntime::moe
