// Engine operators in float32: what a transformer step computes. Semantics are in pyruntime/ops.h.
//
// Layout: activations are row-major [rows, features]; weights are [out, in], so that an output is
// the dot product of two contiguous rows. A KV cache is addressed by base and strides.
//
// Reduction order (the contract behind batch invariance): a dot product runs along k in sixteen
// lanes with one fused multiply-add per element, then sums the lanes by one fixed tree. Attention
// walks its slots in tiles of 256 counted from the first attended slot, each with a running maximum
// and sum. An expert's rows are gathered, computed as any linear, and combined per token in the
// order of its slots. No order depends on the number of rows, the cutting into tasks, the threads
// or the SIMD level; tests compare bits, not tolerances.
//
// Concurrency: stateless. Large calls are cut into tasks for the process's pool; small ones stay on
// the caller's thread, because waking a worker costs more than they do.
//
// Failure: arguments are checked in capi/ops.cpp; here only scratch allocation can throw, before
// any output is written.
#pragma once

#include <cstdint>

#include "pyruntime/ops.h"

namespace pyruntime::ops {

void linear(const float* x, int64_t n, int64_t k, int64_t x_stride, const float* weight, int64_t m,
            int64_t weight_stride, const float* bias, float* out, int64_t out_stride);
void rms_norm(const float* x, int64_t n, int64_t d, const float* weight, float eps, float* out);
void silu_mul(const float* gate, const float* up, int64_t count, float* out);
void rope(float* x, int64_t n, int64_t heads, int64_t d, const int32_t* positions, const float* cos,
          const float* sin, int64_t half);
void kv_write(const pyrt_ops_kv_cache& cache, const int64_t* slots, int64_t n, const float* k,
              const float* v);
void paged_attention(const pyrt_ops_kv_cache& cache, const pyrt_ops_attention& attention);
void router(const float* logits, int64_t n, int64_t experts, int64_t top_k, bool sigmoid,
            bool normalise, int32_t* ids, float* weights);
void moe_ffn(const float* x, int64_t n, int64_t d, const int32_t* ids, const float* weights,
             int64_t top_k, const float* gate, const float* up, const float* down, int64_t experts,
             int64_t f, float* out);

struct SampleBatch {
  float* logits;
  int64_t n, vocab;
  const pyrt_ops_sampling* sampling;
  const int64_t* bias_offsets;
  const int32_t* bias_ids;
  const float* bias_values;
  const int64_t* token_offsets;
  const int32_t* token_ids;
  const int64_t* num_prompt;
  int32_t* tokens;
  float* logprobs;
  int32_t* top_ids;
  float* top_logprobs;
  uint8_t* status;
};
void sample(const SampleBatch& batch);

// The random number of (seed, position): in [0, 1), a multiple of 2^-53. Philox4x32-10.
double uniform(uint64_t seed, uint64_t position) noexcept;

}  // namespace pyruntime::ops
