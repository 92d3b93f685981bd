// The inner loops of the operators, one table per SIMD level.
//
// kernels.inc.hpp is compiled once per level by kernels_<level>.cpp, each time over another
// definition of V, sixteen float lanes: one 512-bit register, two of 256 bits, or an array. All
// three do the same IEEE operations in the same order (fused multiply-adds written out, one fixed
// tree for sums over lanes, our own exp), so the levels agree bit for bit.
#pragma once

#include <cstdint>

#include "simd/level.hpp"

namespace pyruntime::ops {

struct Kernels {
  // out[n, m] = x . w^T + bias; one accumulator of sixteen lanes per output, along k.
  void (*linear)(const float* x, int64_t x_stride, int64_t n, const float* w, int64_t w_stride,
                 int64_t m, int64_t k, const float* bias, float* out, int64_t out_stride);
  void (*rms_norm)(const float* x, int64_t d, const float* weight, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, int64_t count, float* out);
  // out[i] = sum_s weights[s] * rows[s][i], in the order of s; rows that are null are skipped.
  void (*combine)(const float* const* rows, const float* weights, int64_t count, int64_t d,
                  float* out);
  // scores[p] = scale * (q . k_p) for one run of `count` slots, `stride` elements apart.
  void (*dot_run)(const float* q, const float* k, int64_t stride, int64_t count, int64_t d,
                  float scale, float* scores);
  // The same on halves.
  void (*dot_run_half)(const float* q, const uint16_t* k, int64_t stride, int64_t count, int64_t d,
                       float scale, float* scores);
  // out[d] += sum_p weights[p] * v_p over one run of slots, in the order of p.
  void (*weighted_run)(const float* weights, const float* v, int64_t stride, int64_t count,
                       int64_t d, float* out);
  // The same on halves.
  void (*weighted_run_half)(const float* weights, const uint16_t* v, int64_t stride, int64_t count,
                            int64_t d, float* out);
  float (*max_of)(const float* x, int64_t count);
  // In place: x = exp(x - max). Returns the sum.
  float (*exp_sum)(float* x, int64_t count, float max);
  void (*scale_by)(float* x, int64_t count, float factor);
  // Sum of exp(x - max) in double precision by fixed lanes.
  double (*sum_exp)(const float* x, int64_t count, float max);
  // In place: x = exp((x - max) * scale).
  void (*exp_scaled)(float* x, int64_t count, float max, float scale);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The table for a level, or for the next lower one that has a table.
const Kernels& kernels(simd::Level level) noexcept;
// The table of the level in use.
const Kernels& kernels() noexcept;

}  // namespace pyruntime::ops
