#include "moe/ffn.hpp"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "base/status.hpp"
#include "base/thread_pool.hpp"

namespace pyruntime::moe {
namespace {

constexpr int64_t kRows = 256;                         // rows per task
constexpr int64_t kTaskWeights = int64_t{1} << 18;     // weights times rows of a task, about
constexpr int64_t kScratchBytes = int64_t{256} << 20;  // tokens are taken in groups that fit

// Memory that nobody has to zero.
struct Aligned {
  explicit Aligned(int64_t bytes)
      : at(static_cast<uint8_t*>(::operator new(static_cast<size_t>(std::max<int64_t>(bytes, 1)),
                                                std::align_val_t{64}))) {}
  ~Aligned() { ::operator delete(at, std::align_val_t{64}); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  uint8_t* at;
};

// Rows of one expert at one level, in the gathered order.
struct Bucket {
  int32_t expert;
  int32_t level;
  int64_t first, last;
};

struct Task {
  const Bucket* bucket;
  int64_t row, rows, tile, tiles;
};

std::vector<Task> cut(const std::vector<Bucket>& buckets, const Shape& shape) {
  std::vector<Task> tasks;
  for (const Bucket& bucket : buckets) {
    for (int64_t row = bucket.first; row < bucket.last; row += kRows) {
      const int64_t rows = std::min(kRows, bucket.last - row);
      const int64_t step =
          std::clamp<int64_t>(kTaskWeights / (shape.columns * kTileRows * rows), 1, 64);
      for (int64_t tile = 0; tile < num_tiles(shape); tile += step) {
        tasks.push_back({&bucket, row, rows, tile, std::min(step, num_tiles(shape) - tile)});
      }
    }
  }
  return tasks;
}

Nested matrix_of(const LayerExperts& layer, const Bucket& bucket, int matrix) {
  const uint8_t* planes[kMaxLevels];
  for (int l = 0; l <= bucket.level; ++l) {
    int64_t offset = 0;
    for (int i = 0; i < matrix; ++i) offset += plane_bytes(layer.shapes[i], l);
    planes[l] = layer.planes[bucket.expert * layer.levels + l] + offset;
  }
  return nested(layer.shapes[matrix], planes, bucket.level,
                layer.units[bucket.expert * 3 + matrix]);
}

void check(const LayerExperts& layer, int64_t slots, const int32_t* ids, const uint8_t* levels,
           int level) {
  for (int64_t s = 0; s < slots; ++s) {
    const int wanted = levels != nullptr ? levels[s] : level;
    if (ids[s] == -1 || wanted == kSkip) continue;
    if (ids[s] < 0 || ids[s] >= layer.experts) {
      fail(PYRT_EINVAL, "ids has %d; experts are 0..%lld", ids[s],
           static_cast<long long>(layer.experts - 1));
    }
    if (wanted < 0 || wanted >= layer.levels) {
      fail(PYRT_EINVAL, "level is %d; levels are 0..%d", wanted, layer.levels - 1);
    }
    for (int l = 0; l <= wanted; ++l) {
      if (layer.planes[ids[s] * layer.levels + l] == nullptr) {
        fail(PYRT_EINVAL, "plane %d of expert %d is not in memory", l, ids[s]);
      }
    }
  }
}

// One group of tokens.
void ffn_group(const LayerExperts& layer, const float* x, int64_t n, const int32_t* ids,
               const float* weights, int64_t top_k, const uint8_t* levels, int level, float* out) {
  const Kernels& kernel = kernels();
  base::ThreadPool& pool = base::ThreadPool::process();
  const int64_t d = layer.shapes[kGate].columns, f = layer.shapes[kGate].rows;
  const int64_t slots = n * top_k;
  const auto keys = static_cast<size_t>(layer.experts * layer.levels);
  std::vector<int64_t> starts(keys + 1, 0);
  const auto key_of = [&](int64_t s) -> int64_t {
    const int wanted = levels != nullptr ? levels[s] : level;
    return ids[s] < 0 || wanted == kSkip ? -1 : int64_t{ids[s]} * layer.levels + wanted;
  };
  for (int64_t s = 0; s < slots; ++s) {
    if (const int64_t key = key_of(s); key >= 0) ++starts[static_cast<size_t>(key) + 1];
  }
  std::vector<Bucket> buckets;
  for (size_t key = 0; key < keys; ++key) {
    starts[key + 1] += starts[key];
    if (starts[key + 1] > starts[key]) {
      buckets.push_back({static_cast<int32_t>(key / static_cast<size_t>(layer.levels)),
                         static_cast<int32_t>(key % static_cast<size_t>(layer.levels)), starts[key],
                         starts[key + 1]});
    }
  }
  const int64_t rows = starts.back();
  const int64_t x_bytes = row_bytes(d), h_bytes = row_bytes(f);
  const int64_t f_floats = (f + 15) / 16 * 16, d_floats = (d + 15) / 16 * 16;
  const Aligned coded(n * x_bytes), coded_hidden(rows * h_bytes);
  const Aligned floats(rows * (2 * f_floats + d_floats) * 4);
  auto* hidden = reinterpret_cast<float*>(floats.at);
  float* other = hidden + rows * f_floats;
  float* result = other + rows * f_floats;
  std::vector<int64_t> place(static_cast<size_t>(slots), -1);
  std::vector<Row> in(static_cast<size_t>(rows)), back(static_cast<size_t>(rows));
  std::vector<float*> to_hidden(in.size()), to_other(in.size()), to_result(in.size());
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t key = key_of(s);
    if (key < 0) continue;
    const int64_t row = starts[static_cast<size_t>(key)]++;
    place[static_cast<size_t>(s)] = row;
    in[static_cast<size_t>(row)] = row_at(coded.at + s / top_k * x_bytes, d);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const auto i = static_cast<size_t>(row);
    back[i] = row_at(coded_hidden.at + row * h_bytes, f);
    to_hidden[i] = hidden + row * f_floats;
    to_other[i] = other + row * f_floats;
    to_result[i] = result + row * d_floats;
  }
  pool.parallel_for(n, std::max<int64_t>(1, (1 << 15) / d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.quantize(x + i * d, d, coded.at + i * x_bytes);
  });
  const std::vector<Task> first = cut(buckets, layer.shapes[kGate]);
  pool.parallel_for(static_cast<int64_t>(first.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = first[static_cast<size_t>(i)];
      const Row* r = in.data() + t.row;
      const Nested gate = matrix_of(layer, *t.bucket, kGate), up = matrix_of(layer, *t.bucket, kUp);
      kernel.tiles(gate, t.tile, t.tile + t.tiles, r, t.rows, to_hidden.data() + t.row);
      kernel.tiles(up, t.tile, t.tile + t.tiles, r, t.rows, to_other.data() + t.row);
      const int64_t from = t.tile * kTileRows;
      const int64_t count = std::min(t.tiles * kTileRows, f - from);
      for (int64_t row = t.row; row < t.row + t.rows; ++row) {
        kernel.silu_mul(hidden + row * f_floats + from, other + row * f_floats + from, count);
      }
    }
  });
  pool.parallel_for(rows, std::max<int64_t>(1, (1 << 15) / f), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernel.quantize(hidden + row * f_floats, f, coded_hidden.at + row * h_bytes);
    }
  });
  const std::vector<Task> second = cut(buckets, layer.shapes[kDown]);
  pool.parallel_for(static_cast<int64_t>(second.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = second[static_cast<size_t>(i)];
      kernel.tiles(matrix_of(layer, *t.bucket, kDown), t.tile, t.tile + t.tiles,
                   back.data() + t.row, t.rows, to_result.data() + t.row);
    }
  });
  pool.parallel_for(n, std::max<int64_t>(1, (1 << 15) / (d * top_k)),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t token = begin; token < end; ++token) {
                        float* to = out + token * d;
                        std::fill_n(to, d, 0.0f);
                        for (int64_t s = token * top_k; s < (token + 1) * top_k; ++s) {
                          const int64_t row = place[static_cast<size_t>(s)];
                          if (row < 0) continue;
                          const float* from = result + row * d_floats;
                          const float share = weights[s];
                          for (int64_t i = 0; i < d; ++i) to[i] += share * from[i];
                        }
                      }
                    });
}

}  // namespace

void ffn(const LayerExperts& layer, const float* x, int64_t n, const int32_t* ids,
         const float* weights, int64_t top_k, const uint8_t* levels, int level, float* out) {
  if (n == 0) return;
  check(layer, n * top_k, ids, levels, level);
  const int64_t d = layer.shapes[kGate].columns, f = layer.shapes[kGate].rows;
  const int64_t per_token = row_bytes(d) + top_k * (row_bytes(f) + 8 * f + 4 * d + 256);
  const int64_t group = std::clamp<int64_t>(kScratchBytes / per_token, 1, n);
  for (int64_t first = 0; first < n; first += group) {
    const int64_t slot = first * top_k;
    ffn_group(layer, x + first * d, std::min(group, n - first), ids + slot, weights + slot, top_k,
              levels != nullptr ? levels + slot : nullptr, level, out + first * d);
  }
}

void linear(const Nested& w, const float* x, int64_t n, float* out) {
  if (n == 0) return;
  const Kernels& kernel = kernels();
  base::ThreadPool& pool = base::ThreadPool::process();
  const int64_t bytes = row_bytes(w.columns);
  const Aligned coded(n * bytes);
  std::vector<Row> rows(static_cast<size_t>(n));
  std::vector<float*> outs(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    rows[static_cast<size_t>(i)] = row_at(coded.at + i * bytes, w.columns);
    outs[static_cast<size_t>(i)] = out + i * w.rows;
  }
  pool.parallel_for(n, std::max<int64_t>(1, (1 << 15) / w.columns),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        kernel.quantize(x + i * w.columns, w.columns, coded.at + i * bytes);
                      }
                    });
  const int64_t tiles = ceil_div(w.rows, kTileRows);
  const int64_t grain =
      std::clamp<int64_t>(kTaskWeights / (w.columns * kTileRows * std::min(n, kRows)), 1, 64);
  pool.parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    kernel.tiles(w, begin, end, rows.data(), n, outs.data());
  });
}

}  // namespace pyruntime::moe
