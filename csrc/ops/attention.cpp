#include <algorithm>
#include <cstring>
#include <limits>

#include "base/half.hpp"
#include "base/thread_pool.hpp"
#include "ops/kernels.hpp"
#include "ops/ops.hpp"

namespace pyruntime::ops {
namespace {

constexpr int64_t kTile = 256;  // slots per softmax tile; part of the reduction order

// Calls visit(block id, first slot in block, count, first slot in sequence) over [begin, end).
template <class Visit>
void for_each_run(const int32_t* table, int64_t block_size, int64_t begin, int64_t end,
                  Visit&& visit) {
  for (int64_t slot = begin; slot < end;) {
    const int64_t offset = slot % block_size;
    const int64_t count = std::min(block_size - offset, end - slot);
    const int32_t block = table[slot / block_size];
    if (block >= 0) visit(block, offset, count, slot);
    slot += count;
  }
}

auto dot_run(const Kernels& kernel, const float*) { return kernel.dot_run; }
auto dot_run(const Kernels& kernel, const uint16_t*) { return kernel.dot_run_half; }
auto weighted_run(const Kernels& kernel, const float*) { return kernel.weighted_run; }
auto weighted_run(const Kernels& kernel, const uint16_t*) { return kernel.weighted_run_half; }

void put(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
}
void put(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = base::to_half(from[i]);
}

template <class E>  // of the cache
struct Query {
  const pyrt_ops_kv_cache& cache;
  const pyrt_ops_attention& call;
  const Kernels& kernel;
  int64_t begin, end;  // attended slots
  const int32_t* table;
  int64_t kv_head;
  const float* q;
  float* out;
  uint8_t* above;

  const E* at(const void* base, int32_t block, int64_t offset) const {
    return static_cast<const E*>(base) + block * cache.block_stride + offset * cache.slot_stride +
           kv_head * cache.head_stride;
  }

  // Scores of one tile, holes left out; returns how many there are.
  int64_t scores_of(int64_t first, int64_t last, float* scores) const {
    int64_t filled = 0;
    for_each_run(table, cache.block_size, first, last,
                 [&](int32_t block, int64_t offset, int64_t count, int64_t) {
                   const E* keys = at(cache.k, block, offset);
                   dot_run(kernel, keys)(q, keys, cache.slot_stride, count, cache.head_dim,
                                         call.scale, scores + filled);
                   filled += count;
                 });
    return filled;
  }

  void run() const {
    const int64_t d = cache.head_dim;
    float scores[kTile];
    float highest = -std::numeric_limits<float>::infinity();
    float total = 0.0f;
    std::memset(out, 0, static_cast<size_t>(d) * sizeof *out);
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t last = std::min(first + kTile, end);
      const int64_t filled = scores_of(first, last, scores);
      if (filled == 0) continue;
      const float top = std::max(highest, kernel.max_of(scores, filled));
      if (top > highest) {
        float factor = highest;
        kernel.exp_scaled(&factor, 1, top, 1.0f);
        if (first > begin) kernel.scale_by(out, d, factor);
        total *= factor;
        highest = top;
      }
      total += kernel.exp_sum(scores, filled, highest);
      int64_t used = 0;
      for_each_run(table, cache.block_size, first, last,
                   [&](int32_t block, int64_t offset, int64_t count, int64_t) {
                     const E* values = at(cache.v, block, offset);
                     weighted_run(kernel, values)(scores + used, values, cache.slot_stride, count,
                                                  d, out);
                     used += count;
                   });
    }
    if (total > 0.0f) kernel.scale_by(out, d, 1.0f / total);
    if (above != nullptr && total > 0.0f) mark(highest, total);
  }

  // The weights are known once the last tile is; they are computed a second time, on request only.
  void mark(float highest, float total) const {
    float scores[kTile];
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t last = std::min(first + kTile, end);
      const int64_t filled = scores_of(first, last, scores);
      kernel.exp_sum(scores, filled, highest);
      int64_t used = 0;
      for_each_run(table, cache.block_size, first, last,
                   [&](int32_t, int64_t, int64_t count, int64_t slot) {
                     for (int64_t i = 0; i < count; ++i) {
                       if (scores[used + i] / total > call.alpha) above[slot + i] = 1;
                     }
                     used += count;
                   });
    }
  }
};

template <class E>
void write(const pyrt_ops_kv_cache& cache, const int64_t* slots, int64_t n, const float* k,
           const float* v) {
  const int64_t d = cache.head_dim;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, cache.kv_heads * d));
  base::ThreadPool::process().parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (slots[row] < 0) continue;
      const int64_t at = slots[row] / cache.block_size * cache.block_stride +
                         slots[row] % cache.block_size * cache.slot_stride;
      for (int64_t head = 0; head < cache.kv_heads; ++head) {
        const int64_t to = at + head * cache.head_stride;
        const int64_t from = (row * cache.kv_heads + head) * d;
        put(k + from, d, static_cast<E*>(cache.k) + to);
        put(v + from, d, static_cast<E*>(cache.v) + to);
      }
    }
  });
}

template <class E>
void attend(const pyrt_ops_kv_cache& cache, const pyrt_ops_attention& call) {
  const int64_t d = cache.head_dim;
  const int64_t group = call.heads / cache.kv_heads;
  const Kernels& kernel = kernels();
  if (call.above != nullptr) {
    std::memset(call.above, 0, static_cast<size_t>(call.n * call.above_stride));
  }
  int64_t slots = 0;
  for (int64_t row = 0; row < call.n; ++row) slots += call.visible[row];
  // A task is a row when the marks of all its heads go to the same bytes, else a row's KV head.
  const int64_t parts = call.above != nullptr ? 1 : cache.kv_heads;
  const int64_t work = (slots / std::max<int64_t>(1, call.n) + 1) * d * call.heads / parts * 2;
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, work));
  base::ThreadPool::process().parallel_for(call.n * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / parts;
      const int64_t visible = call.visible[row];
      const int64_t first = call.window > 0 ? std::max<int64_t>(0, visible - call.window) : 0;
      const int64_t head_begin = task % parts * (call.heads / parts);
      for (int64_t i = 0; i < call.heads / parts; ++i) {
        const int64_t head = head_begin + i;
        const int64_t at = (row * call.heads + head) * d;
        Query<E>{
            cache,         call,
            kernel,        first,
            visible,       call.tables + call.rows[row] * call.table_stride,
            head / group,  call.q + at,
            call.out + at, call.above == nullptr ? nullptr : call.above + row * call.above_stride}
            .run();
      }
    }
  });
}

}  // namespace

void kv_write(const pyrt_ops_kv_cache& cache, const int64_t* slots, int64_t n, const float* k,
              const float* v) {
  const auto run = cache.dtype == PYRT_KV_FLOAT16 ? write<uint16_t> : write<float>;
  run(cache, slots, n, k, v);
}

void paged_attention(const pyrt_ops_kv_cache& cache, const pyrt_ops_attention& call) {
  const auto run = cache.dtype == PYRT_KV_FLOAT16 ? attend<uint16_t> : attend<float>;
  run(cache, call);
}

}  // namespace pyruntime::ops
