// Experts and dense matrices on nested planes, over the process's thread pool.
//
// Batch invariance as in the operators: a row's bits depend on that row's activations, its experts,
// their levels and weights alone; not on the other rows, the pool's size, the instruction set, or
// the order in which experts are computed (each slot has a row of its own until the last sum).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moe/kernels.hpp"
#include "moe/layout.hpp"

namespace pyruntime::moe {

inline constexpr uint8_t kSkip = 255;  // a level: the slot is skipped
inline constexpr int64_t kScratchBytes = int64_t{256} << 20;

// The experts of one layer, as far as they are in memory.
struct LayerExperts {
  Shape shapes[kMatrices];
  int64_t experts;
  int32_t levels;
  const uint8_t* const* planes;  // [experts, levels]: an extent's data, or nullptr
  const float* units;            // [experts, 3]
};

// The tokens of a call, and the experts they chose at which level.
struct Routing {
  const float* x;  // [n, hidden]
  int64_t n;
  const int32_t* ids;    // [n, top_k]; -1: no expert
  const float* weights;  // [n, top_k]
  int64_t top_k;
  const uint8_t* levels;  // [n, top_k], or nullptr: `level` for all
  int level;

  int level_of(int64_t slot) const noexcept { return levels != nullptr ? levels[slot] : level; }
  bool skipped(int64_t slot) const noexcept { return ids[slot] == -1 || level_of(slot) == kSkip; }
  // Tokens [first, first + count).
  Routing part(int64_t first, int64_t count, int64_t hidden) const noexcept;
};

// Memory that nobody has to zero.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const int64_t bytes;
  uint8_t* const at;
};

// One call's work, expert by expert: whoever loads experts computes each when it is there.
class Ffn {
 public:
  // Rows of one expert at one level, in an order gathered by expert.
  struct Bucket {
    int32_t expert;
    int32_t level;
    int64_t first, last;
  };

  // Quantizes x. Ids and levels were checked. Uses `kept` if it is large enough: whoever calls
  // again and again then has the same memory each time, not holes of all sizes.
  Ffn(const LayerExperts& layer, const Routing& routing, const Scratch* kept = nullptr);

  const std::vector<Bucket>& buckets() const noexcept { return buckets_; }
  // Computes buckets whose planes are in memory; a bucket's level may be lower than it was.
  void compute(std::span<const Bucket> buckets);
  // The bucket's slots count as `status` of their tokens; 1: their part of the sum is missing.
  void mark(const Bucket& bucket, uint8_t status);
  // out[n, hidden] = the sums, in slot order; a token with a missing part is zero. status[n] (may
  // be null) is the highest mark of each token's slots, but 1 is above all.
  void finish(float* out, uint8_t* status);

  // Tokens of a call that fit into `scratch` bytes, at least 1.
  static int64_t tokens_in(const LayerExperts& layer, int64_t top_k, int64_t scratch);

 private:
  int64_t hidden() const noexcept { return layer_.shapes[kGate].columns; }
  int64_t inner() const noexcept { return layer_.shapes[kGate].rows; }

  const LayerExperts& layer_;
  const Routing routing_;
  std::vector<Bucket> buckets_;
  int64_t rows_ = 0;
  int64_t inner_floats_, hidden_floats_;
  std::optional<Scratch> own_;
  uint8_t *coded_, *coded_inner_;
  float *gate_, *up_, *result_;
  std::vector<int64_t> places_;  // slot -> row, or -1
  std::vector<uint8_t> marks_;   // of rows
  std::vector<Row> in_, back_;
  std::vector<float*> to_gate_, to_up_, to_result_;
};

// Throws PYRT_EINVAL for an id or level outside the layer.
void check_routing(const Routing& routing, int64_t experts, int32_t levels);

// out[n, d] = sum over slots s, in slot order, of
//   weights[n, s] * down . (silu(gate . x) * (up . x))
// with expert ids[n, s] at its level. A slot with id -1 or level kSkip is skipped. Throws
// PYRT_EINVAL for an id or level outside the layer, or one whose planes are not all in memory.
void ffn(const LayerExperts& layer, const Routing& routing, float* out);

// out[n, rows] = x[n, columns] . w^T
void linear(const Nested& w, const float* x, int64_t n, float* out);

}  // namespace pyruntime::moe
