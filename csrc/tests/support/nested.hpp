// Random nested matrices, quantized activations, and their products by a kernel table.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "moe/kernels.hpp"
#include "moe/quantize.hpp"

namespace pyruntime::moe {

inline std::vector<float> normal(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::vector<float> out(static_cast<size_t>(count));
  // Sums of uniforms: the same numbers with every standard library.
  for (float& v : out) {
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>(random() >> 8) * 0x1p-24f - 0.5f;
    v = sum * scale;
  }
  return out;
}

struct NestedCase {
  NestedCase(const Shape& s, uint32_t seed, float scale = 0.05f, const float* importance = nullptr)
      : shape(s), weights(normal(s.rows * s.columns, seed, scale)) {
    fill(importance);
  }
  NestedCase(const Shape& s, std::vector<float> w) : shape(s), weights(std::move(w)) {
    fill(nullptr);
  }
  void fill(const float* importance) {
    for (int l = 0; l < shape.levels; ++l) {
      data[l].resize(static_cast<size_t>(plane_bytes(shape, l)) + 64);
      const auto at = reinterpret_cast<uintptr_t>(data[l].data());
      planes[l] = data[l].data() + (64 - at % 64) % 64;
    }
    quantized = quantize(weights.data(), shape.columns, shape, {importance, {}, 1}, planes);
  }
  Nested at(int level) const { return nested(shape, planes, level, quantized.unit); }
  std::vector<float> back(int level) const {
    std::vector<float> out(weights.size());
    dequantize(shape, planes, level, quantized.unit, out.data());
    return out;
  }

  Shape shape;
  std::vector<float> weights;
  std::vector<uint8_t> data[kMaxLevels];
  uint8_t* planes[kMaxLevels];
  Quantized quantized;
};

struct Coded {
  Coded(const std::vector<float>& x, int64_t n, int64_t columns, const Kernels& kernel) {
    const int64_t bytes = row_bytes(columns);
    memory.resize(static_cast<size_t>(n * bytes + 64));
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    uint8_t* first = memory.data() + (64 - at % 64) % 64;
    for (int64_t i = 0; i < n; ++i) {
      kernel.quantize(x.data() + i * columns, columns, first + i * bytes);
      rows.push_back(row_at(first + i * bytes, columns));
    }
  }
  std::vector<uint8_t> memory;
  std::vector<Row> rows;
};

inline std::vector<float> multiply(const Kernels& kernel, const Nested& w, const Coded& x) {
  std::vector<float> out(x.rows.size() * static_cast<size_t>(w.rows), -7.0f);
  std::vector<float*> outs;
  for (size_t i = 0; i < x.rows.size(); ++i)
    outs.push_back(out.data() + i * static_cast<size_t>(w.rows));
  kernel.tiles(w, 0, ceil_div(w.rows, kTileRows), x.rows.data(),
               static_cast<int64_t>(x.rows.size()), outs.data());
  return out;
}

inline const std::vector<Shape> kShapes = {
    {1, 1, 4, {2, 4, 6, 8}},    {16, 32, 4, {2, 4, 6, 8}}, {17, 33, 4, {2, 4, 6, 8}},
    {40, 300, 4, {2, 4, 6, 8}}, {31, 511, 3, {4, 6, 8}},   {15, 257, 4, {4, 4, 6, 8}},
    {48, 256, 2, {4, 8}},       {20, 96, 1, {8}},          {33, 640, 3, {2, 4, 8}},
};

}  // namespace pyruntime::moe
