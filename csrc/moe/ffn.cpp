#include "moe/ffn.hpp"

#include <algorithm>
#include <new>
#include <vector>

#include "base/status.hpp"
#include "base/thread_pool.hpp"

namespace pyruntime::moe {
namespace {

constexpr int64_t kRows = 256;  // rows per task

// Tiles per task of a matrix on `rows` rows: long ones read memory faster, but each thread needs
// several.
int64_t tiles_per_task(int64_t height, int64_t columns, int64_t rows, int64_t all_rows) {
  const int64_t threads = base::ThreadPool::process().size();
  const int64_t weights =
      std::clamp<int64_t>(height * columns * all_rows / (8 * threads), 1 << 18, 1 << 19);
  return std::clamp<int64_t>(weights / (columns * kTileRows * rows), 1, 64);
}

struct Task {
  const Ffn::Bucket* bucket;
  int64_t row, rows, tile, tiles;
};

std::vector<Task> cut(std::span<const Ffn::Bucket> buckets, const Shape& shape) {
  std::vector<Task> tasks;
  int64_t all_rows = 0;
  for (const Ffn::Bucket& bucket : buckets) all_rows += bucket.last - bucket.first;
  for (const Ffn::Bucket& bucket : buckets) {
    for (int64_t row = bucket.first; row < bucket.last; row += kRows) {
      const int64_t rows = std::min(kRows, bucket.last - row);
      const int64_t step = tiles_per_task(shape.rows, shape.columns, rows, all_rows);
      for (int64_t tile = 0; tile < num_tiles(shape); tile += step) {
        tasks.push_back({&bucket, row, rows, tile, std::min(step, num_tiles(shape) - tile)});
      }
    }
  }
  return tasks;
}

Nested matrix_of(const LayerExperts& layer, const Ffn::Bucket& bucket, int matrix) {
  const uint8_t* planes[kMaxLevels];
  for (int l = 0; l <= bucket.level; ++l) {
    int64_t offset = 0;
    for (int i = 0; i < matrix; ++i) offset += plane_bytes(layer.shapes[i], l);
    planes[l] = layer.planes[bucket.expert * layer.levels + l] + offset;
  }
  return nested(layer.shapes[matrix], planes, bucket.level,
                layer.units[bucket.expert * 3 + matrix]);
}

constexpr size_t kLine = 64;

int64_t whole_vectors(int64_t floats) { return (floats + 15) / 16 * 16; }

int64_t num_rows(const Routing& routing) {
  int64_t rows = 0;
  for (int64_t s = 0; s < routing.n * routing.top_k; ++s) rows += routing.skipped(s) ? 0 : 1;
  return rows;
}

}  // namespace

Scratch::Scratch(int64_t size)
    : bytes(std::max<int64_t>(size, 1)),
      at(static_cast<uint8_t*>(
          ::operator new(static_cast<size_t>(bytes), std::align_val_t{kLine}))) {}
Scratch::~Scratch() { ::operator delete(at, std::align_val_t{kLine}); }

Routing Routing::part(int64_t first, int64_t count, int64_t hidden) const noexcept {
  Routing some = *this;
  const int64_t slot = first * top_k;
  some.x += first * hidden;
  some.n = count;
  some.ids += slot;
  some.weights += slot;
  if (levels != nullptr) some.levels += slot;
  return some;
}

Ffn::Ffn(const LayerExperts& layer, const Routing& routing, const Scratch* kept)
    : layer_(layer),
      routing_(routing),
      rows_(num_rows(routing)),
      inner_floats_(whole_vectors(inner())),
      hidden_floats_(whole_vectors(hidden())),
      places_(static_cast<size_t>(routing.n * routing.top_k), -1),
      marks_(static_cast<size_t>(rows_), 0),
      in_(static_cast<size_t>(rows_)),
      back_(in_.size()),
      to_gate_(in_.size()),
      to_up_(in_.size()),
      to_result_(in_.size()) {
  const int64_t d = hidden(), f = inner();
  const int64_t coded = routing.n * row_bytes(d) + rows_ * row_bytes(f);
  const int64_t bytes = coded + rows_ * (2 * inner_floats_ + hidden_floats_) * 4;
  if (kept == nullptr || kept->bytes < bytes) kept = &own_.emplace(bytes);
  coded_ = kept->at;
  coded_inner_ = coded_ + routing.n * row_bytes(d);
  gate_ = reinterpret_cast<float*>(coded_ + coded);
  up_ = gate_ + rows_ * inner_floats_;
  result_ = up_ + rows_ * inner_floats_;
  const auto keys = static_cast<size_t>(layer.experts * layer.levels);
  std::vector<int64_t> starts(keys + 1, 0);
  const auto key_of = [&](int64_t s) {
    return static_cast<size_t>(int64_t{routing.ids[s]} * layer.levels + routing.level_of(s));
  };
  const int64_t slots = routing.n * routing.top_k;
  for (int64_t s = 0; s < slots; ++s) {
    if (!routing.skipped(s)) ++starts[key_of(s) + 1];
  }
  for (size_t key = 0; key < keys; ++key) {
    starts[key + 1] += starts[key];
    if (starts[key + 1] == starts[key]) continue;
    const auto levels = static_cast<size_t>(layer.levels);
    buckets_.push_back({static_cast<int32_t>(key / levels), static_cast<int32_t>(key % levels),
                        starts[key], starts[key + 1]});
  }
  for (int64_t s = 0; s < slots; ++s) {
    if (routing.skipped(s)) continue;
    const int64_t row = starts[key_of(s)]++;
    places_[static_cast<size_t>(s)] = row;
    in_[static_cast<size_t>(row)] = row_at(coded_ + s / routing.top_k * row_bytes(d), d);
  }
  for (int64_t row = 0; row < rows_; ++row) {
    const auto i = static_cast<size_t>(row);
    back_[i] = row_at(coded_inner_ + row * row_bytes(f), f);
    to_gate_[i] = gate_ + row * inner_floats_;
    to_up_[i] = up_ + row * inner_floats_;
    to_result_[i] = result_ + row * hidden_floats_;
  }
  base::ThreadPool::process().parallel_for(
      routing.n, std::max<int64_t>(1, (1 << 15) / d), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          kernels().quantize(routing.x + i * d, d, coded_ + i * row_bytes(d));
        }
      });
}

void Ffn::compute(std::span<const Bucket> buckets) {
  const Kernels& kernel = kernels();
  base::ThreadPool& pool = base::ThreadPool::process();
  const int64_t f = inner();
  const std::vector<Task> first = cut(buckets, layer_.shapes[kGate]);
  pool.parallel_for(static_cast<int64_t>(first.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = first[static_cast<size_t>(i)];
      const Row* r = in_.data() + t.row;
      kernel.tiles(matrix_of(layer_, *t.bucket, kGate), t.tile, t.tile + t.tiles, r, t.rows,
                   to_gate_.data() + t.row);
      kernel.tiles(matrix_of(layer_, *t.bucket, kUp), t.tile, t.tile + t.tiles, r, t.rows,
                   to_up_.data() + t.row);
      const int64_t from = t.tile * kTileRows;
      const int64_t count = std::min(t.tiles * kTileRows, f - from);
      for (int64_t row = t.row; row < t.row + t.rows; ++row) {
        kernel.silu_mul(gate_ + row * inner_floats_ + from, up_ + row * inner_floats_ + from,
                        count);
      }
    }
  });
  std::vector<int64_t> rows;
  for (const Bucket& bucket : buckets) {
    for (int64_t row = bucket.first; row < bucket.last; ++row) rows.push_back(row);
  }
  pool.parallel_for(static_cast<int64_t>(rows.size()), std::max<int64_t>(1, (1 << 15) / f),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t i = begin; i < end; ++i) {
                        const int64_t row = rows[static_cast<size_t>(i)];
                        kernel.quantize(gate_ + row * inner_floats_, f,
                                        coded_inner_ + row * row_bytes(f));
                      }
                    });
  const std::vector<Task> second = cut(buckets, layer_.shapes[kDown]);
  pool.parallel_for(static_cast<int64_t>(second.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = second[static_cast<size_t>(i)];
      kernel.tiles(matrix_of(layer_, *t.bucket, kDown), t.tile, t.tile + t.tiles,
                   back_.data() + t.row, t.rows, to_result_.data() + t.row);
    }
  });
}

void Ffn::mark(const Bucket& bucket, uint8_t status) {
  std::fill(marks_.begin() + bucket.first, marks_.begin() + bucket.last, status);
}

void Ffn::finish(float* out, uint8_t* status) {
  const int64_t d = hidden(), top_k = routing_.top_k;
  const auto sum = [&](int64_t token) {
    float* to = out + token * d;
    std::fill_n(to, d, 0.0f);
    uint8_t mark = 0;
    for (int64_t s = token * top_k; s < (token + 1) * top_k; ++s) {
      const int64_t row = places_[static_cast<size_t>(s)];
      if (row < 0) continue;
      const uint8_t here = marks_[static_cast<size_t>(row)];
      if (here == 1) {
        std::fill_n(to, d, 0.0f);
        mark = 1;
        break;
      }
      mark = std::max(mark, here);
      const float* from = result_ + row * hidden_floats_;
      const float share = routing_.weights[s];
      for (int64_t i = 0; i < d; ++i) to[i] += share * from[i];
    }
    if (status != nullptr) status[token] = mark;
  };
  base::ThreadPool::process().parallel_for(
      routing_.n, std::max<int64_t>(1, (1 << 15) / (d * top_k)), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) sum(token);
      });
}

int64_t Ffn::tokens_in(const LayerExperts& layer, int64_t top_k, int64_t scratch) {
  const int64_t d = layer.shapes[kGate].columns, f = layer.shapes[kGate].rows;
  const int64_t per_token = row_bytes(d) + top_k * (row_bytes(f) + 8 * f + 4 * d + 256);
  return std::max<int64_t>(scratch / per_token, 1);
}

void check_routing(const Routing& routing, int64_t experts, int32_t levels) {
  for (int64_t s = 0; s < routing.n * routing.top_k; ++s) {
    if (routing.skipped(s)) continue;
    if (routing.ids[s] < 0 || routing.ids[s] >= experts) {
      fail(PYRT_EINVAL, "ids has %d; experts are 0..%lld", routing.ids[s],
           static_cast<long long>(experts - 1));
    }
    if (const int wanted = routing.level_of(s); wanted < 0 || wanted >= levels) {
      fail(PYRT_EINVAL, "level is %d; levels are 0..%d", wanted, levels - 1);
    }
  }
}

void ffn(const LayerExperts& layer, const Routing& routing, float* out) {
  check_routing(routing, layer.experts, layer.levels);
  for (int64_t s = 0; s < routing.n * routing.top_k; ++s) {
    if (routing.skipped(s)) continue;
    for (int l = 0; l <= routing.level_of(s); ++l) {
      if (layer.planes[routing.ids[s] * layer.levels + l] == nullptr) {
        fail(PYRT_EINVAL, "plane %d of expert %d is not in memory", l, routing.ids[s]);
      }
    }
  }
  const int64_t hidden = layer.shapes[kGate].columns;
  const int64_t group = Ffn::tokens_in(layer, routing.top_k, kScratchBytes);
  for (int64_t first = 0; first < routing.n; first += group) {
    Ffn run(layer, routing.part(first, std::min(group, routing.n - first), hidden));
    run.compute(run.buckets());
    run.finish(out + first * hidden, nullptr);
  }
}

void linear(const Nested& w, const float* x, int64_t n, float* out) {
  if (n == 0) return;
  const Kernels& kernel = kernels();
  base::ThreadPool& pool = base::ThreadPool::process();
  const int64_t bytes = row_bytes(w.columns);
  const Scratch coded(n * bytes);
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
  const int64_t grain = tiles_per_task(w.rows, w.columns, std::min(n, kRows), n);
  pool.parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    kernel.tiles(w, begin, end, rows.data(), n, outs.data());
  });
}

}  // namespace pyruntime::moe
