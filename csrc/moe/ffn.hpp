// Experts and dense matrices on nested planes, over the process's thread pool.
//
// Batch invariance as in the operators: a row's bits depend on that row's activations, its experts,
// their levels and weights alone; not on the other rows, the pool's size or the instruction set.
#pragma once

#include <cstdint>

#include "moe/kernels.hpp"
#include "moe/layout.hpp"

namespace pyruntime::moe {

inline constexpr uint8_t kSkip = 255;  // a level: the slot is skipped

// The experts of one layer, as far as they are in memory.
struct LayerExperts {
  Shape shapes[kMatrices];
  int64_t experts;
  int32_t levels;
  const uint8_t* const* planes;  // [experts, levels]: an extent's data, or nullptr
  const float* units;            // [experts, 3]
};

// out[n, d] = sum over slots s, in slot order, of
//   weights[n, s] * down . (silu(gate . x) * (up . x))
// with expert ids[n, s] at level levels[n, s] (or `level` for all if levels is nullptr). A slot
// with id -1 or level kSkip is skipped. Throws PYRT_EINVAL for an id or level outside the layer, or
// one whose planes 0..level are not all in memory.
void ffn(const LayerExperts& layer, const float* x, int64_t n, const int32_t* ids,
         const float* weights, int64_t top_k, const uint8_t* levels, int level, float* out);

// out[n, rows] = x[n, columns] . w^T
void linear(const Nested& w, const float* x, int64_t n, float* out);

}  // namespace pyruntime::moe
