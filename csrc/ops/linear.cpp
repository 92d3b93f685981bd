#include <algorithm>

#include "base/thread_pool.hpp"
#include "ops/kernels.hpp"
#include "ops/ops.hpp"

namespace pyruntime::ops {
namespace {

constexpr int64_t kTaskRows = 64;
constexpr int64_t kTaskColumns = 64;
// Multiply-adds below which a call stays on its thread: about 15 us of one core.
constexpr int64_t kSmall = 1 << 18;
constexpr int64_t kSmallElements = 1 << 15;

}  // namespace

void linear(const float* x, int64_t n, int64_t k, int64_t x_stride, const float* weight, int64_t m,
            int64_t weight_stride, const float* bias, float* out, int64_t out_stride) {
  const Kernels& kernel = kernels();
  if (n * m * k <= kSmall) {
    kernel.linear(x, x_stride, n, weight, weight_stride, m, k, bias, out, out_stride);
    return;
  }
  const int64_t row_tasks = (n + kTaskRows - 1) / kTaskRows;
  const int64_t column_tasks = (m + kTaskColumns - 1) / kTaskColumns;
  const int64_t task_work = std::min(n, kTaskRows) * kTaskColumns * k;
  const int64_t grain = std::max<int64_t>(1, kSmall / 2 / std::max<int64_t>(1, task_work));
  base::ThreadPool::process().parallel_for(
      row_tasks * column_tasks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / column_tasks * kTaskRows;
          const int64_t column = task % column_tasks * kTaskColumns;
          kernel.linear(x + row * x_stride, x_stride, std::min(kTaskRows, n - row),
                        weight + column * weight_stride, weight_stride,
                        std::min(kTaskColumns, m - column), k,
                        bias == nullptr ? nullptr : bias + column, out + row * out_stride + column,
                        out_stride);
        }
      });
}

void rms_norm(const float* x, int64_t n, int64_t d, const float* weight, float eps, float* out) {
  const Kernels& kernel = kernels();
  const int64_t grain = std::max<int64_t>(1, kSmallElements / std::max<int64_t>(1, d));
  base::ThreadPool::process().parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernel.rms_norm(x + row * d, d, weight, eps, out + row * d);
    }
  });
}

void silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  const Kernels& kernel = kernels();
  base::ThreadPool::process().parallel_for(count, kSmallElements, [&](int64_t begin, int64_t end) {
    kernel.silu_mul(gate + begin, up + begin, end - begin, out + begin);
  });
}

void rope(float* x, int64_t n, int64_t heads, int64_t d, const int32_t* positions, const float* cos,
          const float* sin, int64_t half) {
  const int64_t grain = std::max<int64_t>(1, kSmallElements / std::max<int64_t>(1, heads * d));
  base::ThreadPool::process().parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* c = cos + positions[row] * half;
      const float* s = sin + positions[row] * half;
      for (int64_t head = 0; head < heads; ++head) {
        float* low = x + (row * heads + head) * d;
        float* high = low + half;
        for (int64_t i = 0; i < half; ++i) {
          const float a = low[i];
          const float b = high[i];
          low[i] = a * c[i] - b * s[i];
          high[i] = b * c[i] + a * s[i];
        }
      }
    }
  });
}

}  // namespace pyruntime::ops
