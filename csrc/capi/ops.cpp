#include "ops/ops.hpp"

#include <algorithm>
#include <cmath>

#include "capi/error.hpp"

using namespace pyruntime;

namespace {

void not_negative(int64_t value, const char* name) {
  if (value < 0) {
    fail(PYRT_EINVAL, "%s is %lld; it must not be negative", name, static_cast<long long>(value));
  }
}

void positive(int64_t value, const char* name) {
  if (value < 1) {
    fail(PYRT_EINVAL, "%s is %lld; it must be positive", name, static_cast<long long>(value));
  }
}

void stride_covers(int64_t stride, int64_t width, int64_t rows, const char* name) {
  if (rows > 1 && stride < width) {
    fail(PYRT_EINVAL, "%s is %lld; it must be at least %lld", name, static_cast<long long>(stride),
         static_cast<long long>(width));
  }
}

// Every value of `ids` is in [lowest, end).
template <class Id>
void in_range(const Id* ids, int64_t count, int64_t lowest, int64_t end, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < lowest || ids[i] >= end) {
      fail(PYRT_EINVAL, "%s[%lld] is %lld; it must be in %lld..%lld", name,
           static_cast<long long>(i), static_cast<long long>(ids[i]),
           static_cast<long long>(lowest), static_cast<long long>(end - 1));
    }
  }
}

void check_offsets(const int64_t* offsets, int64_t n, const char* name) {
  if (offsets[0] != 0) fail(PYRT_EINVAL, "%s[0] must be 0", name);
  for (int64_t i = 0; i < n; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      fail(PYRT_EINVAL, "%s falls at %lld; offsets must not fall", name, static_cast<long long>(i));
    }
  }
}

void check_cache(const pyrt_ops_kv_cache* cache) {
  capi::require(cache, "cache");
  if (cache->struct_size < sizeof *cache) {
    fail(PYRT_EINVAL, "cache.struct_size is %u; it must be %zu", cache->struct_size, sizeof *cache);
  }
  if (cache->dtype == PYRT_KV_FLOAT32) {
    capi::require_array(static_cast<const float*>(cache->k), "cache.k");
    capi::require_array(static_cast<const float*>(cache->v), "cache.v");
  } else if (cache->dtype == PYRT_KV_FLOAT16) {
    capi::require_array(static_cast<const uint16_t*>(cache->k), "cache.k");
    capi::require_array(static_cast<const uint16_t*>(cache->v), "cache.v");
  } else {
    fail(PYRT_EUNSUPPORTED, "cache.dtype is %u; PYRT_KV_FLOAT32 and PYRT_KV_FLOAT16 are supported",
         cache->dtype);
  }
  positive(cache->num_blocks, "cache.num_blocks");
  positive(cache->block_size, "cache.block_size");
  positive(cache->kv_heads, "cache.kv_heads");
  positive(cache->head_dim, "cache.head_dim");
  not_negative(cache->block_stride, "cache.block_stride");
  not_negative(cache->slot_stride, "cache.slot_stride");
  not_negative(cache->head_stride, "cache.head_stride");
  capi::require_extents({cache->num_blocks, cache->block_size, cache->kv_heads, cache->head_dim},
                        "cache");
  capi::require_extents({cache->num_blocks, cache->block_stride}, "cache");
  capi::require_extents({cache->block_size, cache->slot_stride}, "cache");
  capi::require_extents({cache->kv_heads, cache->head_stride}, "cache");
}

void check_sampling(const pyrt_ops_sampling& s, int64_t row) {
  const auto bad = [row](const char* name, double value, const char* range) {
    fail(PYRT_EINVAL, "%s of row %lld is %g; it must be %s", name, static_cast<long long>(row),
         value, range);
  };
  if (!(s.temperature >= 0.0f) || std::isinf(s.temperature)) {
    bad("temperature", s.temperature, "0 (greedy) or positive and finite");
  }
  if (!(s.top_p >= 0.0f)) bad("top_p", s.top_p, "in 0..1");
  if (!(s.min_p >= 0.0f && s.min_p <= 1.0f)) bad("min_p", s.min_p, "in 0..1");
  if (!(s.repetition_penalty >= 0.0f) || std::isinf(s.repetition_penalty)) {
    bad("repetition_penalty", s.repetition_penalty, "positive and finite");
  }
  if (!std::isfinite(s.presence_penalty)) bad("presence_penalty", s.presence_penalty, "finite");
  if (!std::isfinite(s.frequency_penalty)) bad("frequency_penalty", s.frequency_penalty, "finite");
  if (s.top_k < 0) bad("top_k", s.top_k, "0 (off) or positive");
  if (s.num_logprobs < -1 || s.num_logprobs > PYRT_MAX_LOGPROBS) {
    bad("num_logprobs", s.num_logprobs, "in -1..20");
  }
}

}  // namespace

extern "C" {

pyrt_status pyrt_ops_linear(const float* x, int64_t n, int64_t k, int64_t x_stride,
                            const float* weight, int64_t m, int64_t weight_stride,
                            const float* bias, float* out, int64_t out_stride) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    positive(k, "k");
    not_negative(m, "m");
    if (n == 0 || m == 0) return;
    capi::require_array(x, "x");
    capi::require_array(weight, "weight");
    capi::require_array(out, "out");
    stride_covers(x_stride, k, n, "x_stride");
    stride_covers(weight_stride, k, m, "weight_stride");
    stride_covers(out_stride, m, n, "out_stride");
    capi::require_extents({n, std::max(x_stride, k)}, "x");
    capi::require_extents({m, std::max(weight_stride, k)}, "weight");
    capi::require_extents({n, std::max(out_stride, m)}, "out");
    ops::linear(x, n, k, x_stride, weight, m, weight_stride, bias, out, out_stride);
  });
}

pyrt_status pyrt_ops_embedding(const int32_t* ids, int64_t n, const float* table, int64_t rows,
                               int64_t d, float* out) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    if (n == 0) return;
    capi::require_array(ids, "ids");
    capi::require_array(table, "table");
    capi::require_array(out, "out");
    positive(d, "d");
    not_negative(rows, "rows");
    capi::require_extents({rows, d}, "table");
    capi::require_extents({n, d}, "out");
    in_range(ids, n, 0, rows, "ids");
    for (int64_t i = 0; i < n; ++i) std::copy_n(table + ids[i] * d, d, out + i * d);
  });
}

pyrt_status pyrt_ops_rms_norm(const float* x, int64_t n, int64_t d, const float* weight, float eps,
                              float* out) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    if (n == 0) return;
    capi::require_array(x, "x");
    capi::require_array(weight, "weight");
    capi::require_array(out, "out");
    positive(d, "d");
    capi::require_extents({n, d}, "x");
    ops::rms_norm(x, n, d, weight, eps, out);
  });
}

pyrt_status pyrt_ops_add(float* x, const float* y, int64_t count) noexcept {
  return capi::guard([&] {
    not_negative(count, "count");
    if (count == 0) return;
    capi::require_array(x, "x");
    capi::require_array(y, "y");
    capi::require_extents({count}, "x");
    for (int64_t i = 0; i < count; ++i) x[i] += y[i];
  });
}

pyrt_status pyrt_ops_clamp(float* x, int64_t count, float limit) noexcept {
  return capi::guard([&] {
    not_negative(count, "count");
    if (!(limit > 0.0f)) fail(PYRT_EINVAL, "limit is %g; it must be positive", limit);
    if (count == 0) return;
    capi::require_array(x, "x");
    capi::require_extents({count}, "x");
    for (int64_t i = 0; i < count; ++i) {
      x[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
    }
  });
}

pyrt_status pyrt_ops_silu_mul(const float* gate, const float* up, int64_t count,
                              float* out) noexcept {
  return capi::guard([&] {
    not_negative(count, "count");
    if (count == 0) return;
    capi::require_array(gate, "gate");
    capi::require_array(up, "up");
    capi::require_array(out, "out");
    capi::require_extents({count}, "gate");
    ops::silu_mul(gate, up, count, out);
  });
}

pyrt_status pyrt_ops_rope(float* x, int64_t n, int64_t heads, int64_t d, const int32_t* positions,
                          const float* cos, const float* sin, int64_t rows, int64_t half) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    if (n == 0) return;
    capi::require_array(x, "x");
    capi::require_array(positions, "positions");
    capi::require_array(cos, "cos");
    capi::require_array(sin, "sin");
    positive(heads, "heads");
    positive(half, "half");
    if (half > d / 2) {
      fail(PYRT_EINVAL, "half is %lld; twice it must not exceed d = %lld",
           static_cast<long long>(half), static_cast<long long>(d));
    }
    not_negative(rows, "rows");
    capi::require_extents({n, heads, d}, "x");
    capi::require_extents({rows, half}, "cos");
    in_range(positions, n, 0, rows, "positions");
    ops::rope(x, n, heads, d, positions, cos, sin, half);
  });
}

pyrt_status pyrt_ops_kv_write(const pyrt_ops_kv_cache* cache, const int64_t* slots, int64_t n,
                              const float* k, const float* v) noexcept {
  return capi::guard([&] {
    check_cache(cache);
    not_negative(n, "n");
    if (n == 0) return;
    capi::require_array(slots, "slots");
    capi::require_array(k, "k");
    capi::require_array(v, "v");
    capi::require_extents({n, cache->kv_heads, cache->head_dim}, "k");
    in_range(slots, n, -1, cache->num_blocks * cache->block_size, "slots");
    ops::kv_write(*cache, slots, n, k, v);
  });
}

pyrt_status pyrt_ops_paged_attention(const pyrt_ops_kv_cache* cache,
                                     const pyrt_ops_attention* call) noexcept {
  return capi::guard([&] {
    check_cache(cache);
    capi::require(call, "attention");
    if (call->struct_size < sizeof *call) {
      fail(PYRT_EINVAL, "attention.struct_size is %u; it must be %zu", call->struct_size,
           sizeof *call);
    }
    not_negative(call->n, "n");
    if (call->n == 0) return;
    capi::require_array(call->q, "q");
    capi::require_array(call->tables, "tables");
    capi::require_array(call->rows, "rows");
    capi::require_array(call->visible, "visible");
    capi::require_array(call->out, "out");
    positive(call->heads, "heads");
    if (call->heads % cache->kv_heads != 0) {
      fail(PYRT_EINVAL, "heads is %d; it must be a multiple of kv_heads = %lld", call->heads,
           static_cast<long long>(cache->kv_heads));
    }
    not_negative(call->window, "window");
    positive(call->table_stride, "table_stride");
    not_negative(call->num_tables, "num_tables");
    capi::require_extents({call->n, call->heads, cache->head_dim}, "q");
    capi::require_extents({call->num_tables, call->table_stride}, "tables");
    capi::require_extents({call->table_stride, cache->block_size}, "a table");
    in_range(call->rows, call->n, 0, call->num_tables, "rows");
    in_range(call->visible, call->n, 0, call->table_stride * cache->block_size + 1, "visible");
    if (call->above != nullptr) {
      not_negative(call->above_stride, "above_stride");
      capi::require_extents({call->n, call->above_stride}, "above");
      in_range(call->visible, call->n, 0, call->above_stride + 1, "visible (above_stride)");
    }
    for (int64_t i = 0; i < call->n; ++i) {
      const int64_t used = (call->visible[i] + cache->block_size - 1) / cache->block_size;
      if (i > 0 && call->rows[i] == call->rows[i - 1] && call->visible[i] <= call->visible[i - 1]) {
        continue;  // covered by the check of the row before
      }
      in_range(call->tables + call->rows[i] * call->table_stride, used, -1, cache->num_blocks,
               "tables");
    }
    ops::paged_attention(*cache, *call);
  });
}

pyrt_status pyrt_ops_router(const float* logits, int64_t n, int64_t experts, int64_t top_k,
                            int32_t scoring, int32_t normalise, int32_t* ids,
                            float* weights) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    if (experts < 1 || experts > 4096) {
      fail(PYRT_EINVAL, "experts is %lld; it must be in 1..4096", static_cast<long long>(experts));
    }
    if (top_k < 1 || top_k > experts) {
      fail(PYRT_EINVAL, "top_k is %lld; it must be in 1..%lld", static_cast<long long>(top_k),
           static_cast<long long>(experts));
    }
    if (scoring != PYRT_ROUTER_SOFTMAX && scoring != PYRT_ROUTER_SIGMOID) {
      fail(PYRT_EINVAL, "scoring is %d; it must be PYRT_ROUTER_SOFTMAX or PYRT_ROUTER_SIGMOID",
           scoring);
    }
    if (n == 0) return;
    capi::require_array(logits, "logits");
    capi::require_array(ids, "ids");
    capi::require_array(weights, "weights");
    capi::require_extents({n, experts}, "logits");
    ops::router(logits, n, experts, top_k, scoring == PYRT_ROUTER_SIGMOID, normalise != 0, ids,
                weights);
  });
}

pyrt_status pyrt_ops_moe_ffn(const float* x, int64_t n, int64_t d, const int32_t* ids,
                             const float* weights, int64_t top_k, const float* gate,
                             const float* up, const float* down, int64_t experts, int64_t f,
                             float* out) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    positive(d, "d");
    positive(f, "f");
    positive(top_k, "top_k");
    positive(experts, "experts");
    if (n == 0) return;
    capi::require_array(x, "x");
    capi::require_array(ids, "ids");
    capi::require_array(weights, "weights");
    capi::require_array(gate, "gate");
    capi::require_array(up, "up");
    capi::require_array(down, "down");
    capi::require_array(out, "out");
    capi::require_extents({n, d}, "x");
    capi::require_extents({n, top_k}, "ids");
    capi::require_extents({experts, f, d}, "gate");
    in_range(ids, n * top_k, -1, experts, "ids");
    ops::moe_ffn(x, n, d, ids, weights, top_k, gate, up, down, experts, f, out);
  });
}

pyrt_status pyrt_ops_sample(float* logits, int64_t n, int64_t vocab,
                            const pyrt_ops_sampling* sampling, const int64_t* bias_offsets,
                            const int32_t* bias_ids, const float* bias_values,
                            const int64_t* token_offsets, const int32_t* token_ids,
                            const int64_t* num_prompt, int32_t* tokens, float* logprobs,
                            int32_t* top_ids, float* top_logprobs, uint8_t* status) noexcept {
  return capi::guard([&] {
    not_negative(n, "n");
    positive(vocab, "vocab");
    if (n == 0) return;
    capi::require_array(logits, "logits");
    capi::require_array(sampling, "sampling");
    capi::require_array(tokens, "tokens");
    capi::require_array(logprobs, "logprobs");
    capi::require(status, "status");
    capi::require_extents({n, vocab}, "logits");
    for (int64_t i = 0; i < n; ++i) {
      check_sampling(sampling[i], i);
      if (sampling[i].num_logprobs > 0) {
        capi::require_array(top_ids, "top_ids");
        capi::require_array(top_logprobs, "top_logprobs");
      }
    }
    if (bias_offsets != nullptr) {
      check_offsets(bias_offsets, n, "bias_offsets");
      if (bias_offsets[n] > 0) {
        capi::require_array(bias_ids, "bias_ids");
        capi::require_array(bias_values, "bias_values");
      }
      in_range(bias_ids, bias_offsets[n], 0, vocab, "bias_ids");
    }
    if (token_offsets != nullptr) {
      check_offsets(token_offsets, n, "token_offsets");
      capi::require_array(num_prompt, "num_prompt");
      if (token_offsets[n] > 0) capi::require_array(token_ids, "token_ids");
      in_range(token_ids, token_offsets[n], 0, vocab, "token_ids");
      for (int64_t i = 0; i < n; ++i) {
        in_range(num_prompt + i, 1, 0, token_offsets[i + 1] - token_offsets[i] + 1, "num_prompt");
      }
    }
    ops::sample({logits, n, vocab, sampling, bias_offsets, bias_ids, bias_values, token_offsets,
                 token_ids, num_prompt, tokens, logprobs, top_ids, top_logprobs, status});
  });
}

}  // extern "C"
