#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "base/thread_pool.hpp"
#include "ops/kernels.hpp"
#include "ops/ops.hpp"

namespace pyruntime::ops {
namespace {

constexpr int64_t kColumns = 64;             // output features per task
constexpr int64_t kRows = 64;                // gathered rows per task
constexpr int64_t kScratchFloats = 1 << 24;  // tokens are taken in groups whose scratch fits

struct Task {
  int32_t expert;
  int64_t row, rows, column, columns;
};

// Tasks over the rows of each expert ([starts[e], starts[e+1]) of the gathered order) and `m`
// output columns, experts apart so that one expert's weights are read by neighbouring tasks.
std::vector<Task> cut(const std::vector<int64_t>& starts, int64_t m) {
  std::vector<Task> tasks;
  for (size_t e = 0; e + 1 < starts.size(); ++e) {
    for (int64_t row = starts[e]; row < starts[e + 1]; row += kRows) {
      for (int64_t column = 0; column < m; column += kColumns) {
        tasks.push_back({static_cast<int32_t>(e), row, std::min(kRows, starts[e + 1] - row), column,
                         std::min(kColumns, m - column)});
      }
    }
  }
  return tasks;
}

}  // namespace

void moe_ffn(const float* x, int64_t n, int64_t d, const int32_t* ids, const float* weights,
             int64_t top_k, const float* gate, const float* up, const float* down, int64_t experts,
             int64_t f, float* out) {
  const Kernels& kernel = kernels();
  base::ThreadPool& pool = base::ThreadPool::process();
  const int64_t per_token = top_k * (2 * d + 2 * f);
  const int64_t group = std::clamp<int64_t>(kScratchFloats / std::max<int64_t>(1, per_token), 1, n);
  std::vector<float> scratch(static_cast<size_t>(group * per_token));
  std::vector<int64_t> place(static_cast<size_t>(group * top_k));  // gathered row of each slot
  std::vector<int64_t> source(place.size());                       // token of each gathered row
  for (int64_t first = 0; first < n; first += group) {
    const int64_t tokens = std::min(group, n - first);
    const int32_t* id = ids + first * top_k;
    std::vector<int64_t> starts(static_cast<size_t>(experts) + 1, 0);
    for (int64_t s = 0; s < tokens * top_k; ++s) {
      if (id[s] >= 0) ++starts[static_cast<size_t>(id[s]) + 1];
    }
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t s = 0; s < tokens * top_k; ++s) {
      if (id[s] < 0) {
        place[static_cast<size_t>(s)] = -1;
        continue;
      }
      const int64_t row = next[static_cast<size_t>(id[s])]++;
      place[static_cast<size_t>(s)] = row;
      source[static_cast<size_t>(row)] = first + s / top_k;
    }
    const int64_t rows = starts.back();
    float* gathered = scratch.data();
    float* hidden = gathered + rows * d;
    float* other = hidden + rows * f;
    float* result = other + rows * f;
    pool.parallel_for(rows, std::max<int64_t>(1, (1 << 14) / d), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        std::copy_n(x + source[static_cast<size_t>(row)] * d, d, gathered + row * d);
      }
    });
    const std::vector<Task> in = cut(starts, f);
    const int64_t grain = std::max<int64_t>(
        1, (1 << 17) / (kColumns * d * std::clamp<int64_t>(rows / experts, 1, kRows)));
    pool.parallel_for(static_cast<int64_t>(in.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Task& t = in[static_cast<size_t>(i)];
        const int64_t weight = (t.expert * f + t.column) * d;
        const int64_t at = t.row * f + t.column;
        kernel.linear(gathered + t.row * d, d, t.rows, gate + weight, d, t.columns, d, nullptr,
                      hidden + at, f);
        kernel.linear(gathered + t.row * d, d, t.rows, up + weight, d, t.columns, d, nullptr,
                      other + at, f);
        for (int64_t r = 0; r < t.rows; ++r) {
          kernel.silu_mul(hidden + at + r * f, other + at + r * f, t.columns, hidden + at + r * f);
        }
      }
    });
    const std::vector<Task> back = cut(starts, d);
    pool.parallel_for(static_cast<int64_t>(back.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Task& t = back[static_cast<size_t>(i)];
        kernel.linear(hidden + t.row * f, f, t.rows, down + (t.expert * d + t.column) * f, f,
                      t.columns, f, nullptr, result + t.row * d + t.column, d);
      }
    });
    pool.parallel_for(tokens, std::max<int64_t>(1, (1 << 14) / d), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        // In groups of 16 slots, each continuing where the last one stopped.
        const float* pieces[17];
        float factors[17];
        float* to = out + (first + token) * d;
        for (int64_t slot = 0; slot < top_k; slot += 16) {
          int64_t count = 0;
          if (slot > 0) {
            pieces[count] = to;
            factors[count++] = 1.0f;
          }
          for (int64_t s = slot; s < std::min(slot + 16, top_k); ++s) {
            const int64_t row = place[static_cast<size_t>(token * top_k + s)];
            pieces[count] = row < 0 ? nullptr : result + row * d;
            factors[count++] = weights[(first + token) * top_k + s];
          }
          kernel.combine(pieces, factors, count, d, to);
        }
      }
    });
  }
}

void router(const float* logits, int64_t n, int64_t experts, int64_t top_k, bool sigmoid,
            bool normalise, int32_t* ids, float* weights) {
  const Kernels& kernel = kernels();
  const int64_t grain = std::max<int64_t>(1, (1 << 13) / experts);
  base::ThreadPool::process().parallel_for(n, grain, [&](int64_t begin, int64_t end) {
    float scores[4096];
    for (int64_t row = begin; row < end; ++row) {
      const float* x = logits + row * experts;
      int32_t* chosen = ids + row * top_k;
      float* weight = weights + row * top_k;
      if (std::any_of(x, x + experts, [](float v) { return std::isnan(v); })) {
        std::iota(chosen, chosen + top_k, 0);
        std::fill_n(weight, top_k, std::numeric_limits<float>::quiet_NaN());
        continue;
      }
      std::copy_n(x, experts, scores);
      if (sigmoid) {
        for (int64_t i = 0; i < experts; ++i) scores[i] = -scores[i];
        kernel.exp_scaled(scores, experts, 0.0f, 1.0f);
        for (int64_t i = 0; i < experts; ++i) scores[i] = 1.0f / (1.0f + scores[i]);
      } else {
        const float total = kernel.exp_sum(scores, experts, kernel.max_of(x, experts));
        kernel.scale_by(scores, experts, 1.0f / total);
      }
      // Choosing by logit keeps the order where scores have rounded to the same number.
      uint64_t taken[4096 / 64] = {};
      float sum = 0.0f;
      for (int64_t s = 0; s < top_k; ++s) {
        int64_t best = -1;
        for (int64_t i = 0; i < experts; ++i) {
          if ((taken[i / 64] >> (i % 64)) & 1u) continue;
          if (best < 0 || x[i] > x[best]) best = i;
        }
        taken[best / 64] |= uint64_t{1} << (best % 64);
        chosen[s] = static_cast<int32_t>(best);
        weight[s] = scores[best];
        sum += scores[best];
      }
      if (normalise) {
        for (int64_t s = 0; s < top_k; ++s) weight[s] /= sum;
      }
    }
  });
}

}  // namespace pyruntime::ops
