/* Engine operators: the dense and sparse arithmetic of a transformer step, in float32.
 *
 * Conventions
 *   - Arrays are row-major; a `stride` counts elements between rows. Every pointer is host memory.
 *     Outputs must not overlap inputs unless a function says "in place".
 *   - Batch invariance: the bits of a result row depend on that row's inputs alone, never on the
 *     number of rows in the call, on the other rows, on the thread pool's size, or on the SIMD
 *     level. That is what makes greedy output independent of scheduling.
 *   - Every function is thread-safe, holds no state, and uses the process's thread pool.
 *   - Status: PYRT_EINVAL for a null pointer, a negative size, or an index out of range; outputs
 *     are then unchanged. No function allocates per row; PYRT_ENOMEM can come from scratch space.
 */
#ifndef PYRUNTIME_OPS_H
#define PYRUNTIME_OPS_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out[n, m] = x[n, k] . weight[m, k]^T (+ bias[m] if not NULL). */
PYRT_API pyrt_status pyrt_ops_linear(const float* x, int64_t n, int64_t k, int64_t x_stride,
                                     const float* weight, int64_t m, int64_t weight_stride,
                                     const float* bias, float* out,
                                     int64_t out_stride) PYRT_NOEXCEPT;

/* out[n, d] = table[ids[n], d]; PYRT_EINVAL if an id is outside 0..rows-1. */
PYRT_API pyrt_status pyrt_ops_embedding(const int32_t* ids, int64_t n, const float* table,
                                        int64_t rows, int64_t d, float* out) PYRT_NOEXCEPT;

/* out[n, d] = x / sqrt(mean(x^2) + eps) * weight[d]; `out` may be `x`. */
PYRT_API pyrt_status pyrt_ops_rms_norm(const float* x, int64_t n, int64_t d, const float* weight,
                                       float eps, float* out) PYRT_NOEXCEPT;

/* x[count] += y[count], in place. */
PYRT_API pyrt_status pyrt_ops_add(float* x, const float* y, int64_t count) PYRT_NOEXCEPT;

/* x[count] = min(max(x, -limit), limit), in place; limit > 0. */
PYRT_API pyrt_status pyrt_ops_clamp(float* x, int64_t count, float limit) PYRT_NOEXCEPT;

/* out[n, f] = gate / (1 + exp(-gate)) * up; `out` may be `gate` or `up`. */
PYRT_API pyrt_status pyrt_ops_silu_mul(const float* gate, const float* up, int64_t count,
                                       float* out) PYRT_NOEXCEPT;

/* Rotary embedding of x[n, heads, d], in place: the first 2 * half dimensions of each head are
 * rotated in pairs (i, i + half) by row positions[n] of cos[rows, half] and sin[rows, half].
 * PYRT_EINVAL if a position is outside 0..rows-1 or 2 * half > d. */
PYRT_API pyrt_status pyrt_ops_rope(float* x, int64_t n, int64_t heads, int64_t d,
                                   const int32_t* positions, const float* cos, const float* sin,
                                   int64_t rows, int64_t half) PYRT_NOEXCEPT;

/* Element type of a KV cache. IEEE binary16 is rounded to nearest even when written, what is too
 * large to its largest finite value; all arithmetic is in float32. */
enum { PYRT_KV_FLOAT32 = 0, PYRT_KV_FLOAT16 = 1 };

/* The K and V of one layer in blocks. Element (block, slot, head, i) of K is at
 * k + block * block_stride + slot * slot_stride + head * head_stride + i, likewise V. */
typedef struct pyrt_ops_kv_cache {
  uint32_t struct_size;
  uint32_t dtype; /* PYRT_KV_FLOAT32 or PYRT_KV_FLOAT16 */
  void* k;
  void* v;
  int64_t num_blocks;
  int64_t block_size; /* slots per block */
  int64_t kv_heads;
  int64_t head_dim;
  int64_t block_stride; /* in elements */
  int64_t slot_stride;
  int64_t head_stride;
} pyrt_ops_kv_cache;

/* Store k[n, kv_heads, d] and v[n, kv_heads, d] at slots[n] (block * block_size + slot); a slot of
 * -1 skips its row. PYRT_EINVAL if a slot is outside the cache. */
PYRT_API pyrt_status pyrt_ops_kv_write(const pyrt_ops_kv_cache* cache, const int64_t* slots,
                                       int64_t n, const float* k, const float* v) PYRT_NOEXCEPT;

typedef struct pyrt_ops_attention {
  uint32_t struct_size;
  int32_t heads;  /* query heads, a multiple of the cache's kv_heads */
  const float* q; /* [n, heads, head_dim] */
  int64_t n;
  const int32_t* tables; /* [num_tables, table_stride]: block ids; -1 is a hole and is skipped */
  int64_t num_tables;
  int64_t table_stride;
  const int32_t* rows;    /* [n]: the table of each query */
  const int32_t* visible; /* [n]: slots 0..visible-1 of the table are attended */
  float scale;            /* of q . k */
  int32_t window;         /* 0, or only the last `window` of the visible slots */
  float alpha;            /* threshold of `above` */
  uint32_t reserved;
  uint8_t* above;       /* NULL, or [n, above_stride]: 1 where any head's weight exceeds alpha */
  int64_t above_stride; /* at least the largest `visible` */
  float* out;           /* [n, heads, head_dim] */
} pyrt_ops_attention;

/* Softmax attention of n independent queries over block tables, grouped-query: query head h reads
 * KV head h / (heads / kv_heads). A query with no attended slot gives zeros. */
PYRT_API pyrt_status pyrt_ops_paged_attention(const pyrt_ops_kv_cache* cache,
                                              const pyrt_ops_attention* attention) PYRT_NOEXCEPT;

enum { PYRT_ROUTER_SOFTMAX = 0, PYRT_ROUTER_SIGMOID = 1 };

/* Scores of logits[n, experts], the `top_k` largest per row (ties: lower id first) in falling
 * order, as ids[n, top_k] and weights[n, top_k]; `normalise` divides the weights by their sum.
 * A row with a NaN gets ids 0..top_k-1 and NaN weights. 1 <= top_k <= experts <= 4096. */
PYRT_API pyrt_status pyrt_ops_router(const float* logits, int64_t n, int64_t experts, int64_t top_k,
                                     int32_t scoring, int32_t normalise, int32_t* ids,
                                     float* weights) PYRT_NOEXCEPT;

/* Dense float32 experts: out[n, d] = sum over slots s, in slot order, of
 * weights[n, s] * down[e] . (silu(gate[e] . x[n]) * (up[e] . x[n])) with e = ids[n, s].
 * gate and up are [experts, f, d], down is [experts, d, f]; an id of -1 skips its slot. */
PYRT_API pyrt_status pyrt_ops_moe_ffn(const float* x, int64_t n, int64_t d, const int32_t* ids,
                                      const float* weights, int64_t top_k, const float* gate,
                                      const float* up, const float* down, int64_t experts,
                                      int64_t f, float* out) PYRT_NOEXCEPT;

/* What to do with one row of logits. All zero is greedy decoding without penalties. */
typedef struct pyrt_ops_sampling {
  float temperature;        /* 0: greedy */
  float top_p;              /* 0 or >= 1: off */
  float min_p;              /* 0: off; relative to the most likely token */
  float repetition_penalty; /* 0 or 1: off; > 0; over prompt and output */
  float presence_penalty;   /* over output */
  float frequency_penalty;  /* over output, per occurrence */
  int32_t top_k;            /* 0: off */
  int32_t num_logprobs;     /* -1: none; else 0..20 most likely tokens besides the sampled one */
  uint64_t seed;
  int64_t position; /* of the token being sampled; with `seed` the counter of the randomness */
} pyrt_ops_sampling;

enum {
  PYRT_SAMPLE_OK = 0,
  PYRT_SAMPLE_NOT_FINITE = 1 /* a NaN, or no finite logit: token is -1 */
};

enum { PYRT_MAX_LOGPROBS = 20 };

/* Sample one token per row of logits[n, vocab]. Row i is biased by bias_ids/bias_values in
 * [bias_offsets[i], bias_offsets[i+1]), and penalised over the tokens in
 * [token_offsets[i], token_offsets[i+1]), of which the first num_prompt[i] are the prompt; the
 * offset arrays may be NULL when no row uses them. Randomness is Philox4x32-10 (Salmon et al.,
 * SC 2011) keyed by seed and counted by position: it depends on nothing else.
 * Order: bias, penalties, temperature, top_k, top_p, min_p. Log-probabilities are those of the
 * logits as given, before any of it.
 * tokens[n], logprobs[n] (NaN if not asked), top_ids and top_logprobs [n, PYRT_MAX_LOGPROBS]
 * (unwritten beyond num_logprobs; may be NULL if no row asks), status[n] of PYRT_SAMPLE_*.
 * `logits` is overwritten. */
PYRT_API pyrt_status pyrt_ops_sample(float* logits, int64_t n, int64_t vocab,
                                     const pyrt_ops_sampling* sampling, const int64_t* bias_offsets,
                                     const int32_t* bias_ids, const float* bias_values,
                                     const int64_t* token_offsets, const int32_t* token_ids,
                                     const int64_t* num_prompt, int32_t* tokens, float* logprobs,
                                     int32_t* top_ids, float* top_logprobs,
                                     uint8_t* status) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
