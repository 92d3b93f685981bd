// A small store of real nested experts on disk, and readers that fail on demand.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/status.hpp"
#include "moe/cache.hpp"
#include "moe/ffn.hpp"
#include "moe/quantize.hpp"
#include "moe/reader.hpp"
#include "moe/store.hpp"

namespace pyruntime::moe {

inline std::vector<float> normal(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> draw(0.0f, 1.0f);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& v : out) v = draw(random);
  return out;
}

class SmallStore {
 public:
  static constexpr int64_t kHidden = 256, kFfn = 448, kExperts = 6, kLayers = 2;
  static constexpr int kLevels = 3;  // of 4, 6 and 8 bits

  SmallStore() {
    path_ = (std::filesystem::temp_directory_path() /
             ("pyrt-moe-" + std::to_string(getpid()) + "-" + std::to_string(++counter()) + ".mxs"))
                .string();
    StoreInfo info{};
    info.num_layers = kLayers;
    info.num_experts = kExperts;
    info.hidden = kHidden;
    info.ffn = kFfn;
    info.levels = kLevels;
    for (auto& bits : info.bits) std::memcpy(bits, "\4\6\10", 3);
    StoreWriter writer(path_, info);
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      for (int64_t e = 0; e < kExperts; ++e) add(writer, layer, e);
    }
    writer.commit();
    store_ = std::make_unique<Store>(path_);
    for (int64_t layer = 0; layer < kLayers; ++layer) load(layer);
  }
  ~SmallStore() { std::filesystem::remove(path_); }

  const Store& store() const { return *store_; }
  const std::string& path() const { return path_; }
  uint64_t expert_bytes() const {
    uint64_t bytes = 0;
    for (int l = 0; l < kLevels; ++l)
      bytes += padded(static_cast<uint64_t>(store_->extent_bytes(l)));
    return bytes;
  }

  // What a call gives when all is in memory.
  std::vector<float> expected(int64_t layer, const Routing& routing) const {
    LayerExperts experts{};
    for (int i = 0; i < kMatrices; ++i) experts.shapes[i] = store_->shape(i);
    experts.experts = kExperts;
    experts.levels = kLevels;
    experts.planes = planes_[static_cast<size_t>(layer)].data();
    experts.units = units_[static_cast<size_t>(layer)].data();
    std::vector<float> out(static_cast<size_t>(routing.n * kHidden));
    ffn(experts, routing, out.data());
    return out;
  }

 private:
  static int& counter() {
    static int count = 0;
    return count;
  }

  static void add(StoreWriter& writer, int64_t layer, int64_t e) {
    std::vector<std::vector<uint8_t>> extents(kLevels);
    Quality quality[kLevels] = {};
    for (int i = 0; i < kMatrices; ++i) {
      const Shape shape = expert_shape(writer.header(), i);
      const auto seed = static_cast<uint32_t>(1 + layer * 1000 + e * 10 + i);
      std::vector<float> weights = normal(shape.rows * shape.columns, seed);
      for (float& w : weights) w *= 0.05f;
      std::vector<std::vector<uint8_t>> planes(kLevels);
      uint8_t* at[kMaxLevels] = {};
      for (int l = 0; l < kLevels; ++l) {
        planes[static_cast<size_t>(l)].resize(static_cast<size_t>(plane_bytes(shape, l)));
        at[l] = planes[static_cast<size_t>(l)].data();
      }
      const Quantized q = quantize(weights.data(), shape.columns, shape, {nullptr, {}, 2}, at);
      for (int l = 0; l < kLevels; ++l) {
        auto& extent = extents[static_cast<size_t>(l)];
        extent.insert(extent.end(), planes[static_cast<size_t>(l)].begin(),
                      planes[static_cast<size_t>(l)].end());
        quality[l].unit[i] = q.unit;
        quality[l].error[i] = q.error[l];
        quality[l].energy[i] = q.energy;
      }
    }
    for (int l = 0; l < kLevels; ++l) {
      const auto& extent = extents[static_cast<size_t>(l)];
      writer.add_plane(layer, e, l, extent.data(), static_cast<int64_t>(extent.size()), quality[l]);
    }
  }

  void load(int64_t layer) {
    auto& planes = planes_.emplace_back();
    auto& units = units_.emplace_back();
    for (int64_t e = 0; e < kExperts; ++e) {
      for (int l = 0; l < kLevels; ++l) {
        const Record* r = store_->find(layer, e, l);
        auto& memory = memory_.emplace_back(padded(r->bytes) + 64);
        void* at = memory.data();
        size_t space = memory.size();
        std::align(64, r->bytes, at, space);
        store_->read(*r, at);
        planes.push_back(static_cast<const uint8_t*>(at));
        if (l == 0) units.insert(units.end(), r->unit, r->unit + kMatrices);
      }
    }
  }

  std::string path_;
  std::unique_ptr<Store> store_;
  std::vector<std::vector<uint8_t>> memory_;
  std::vector<std::vector<const uint8_t*>> planes_;
  std::vector<std::vector<float>> units_;
};

// Reads as the store does, unless `fault` throws.
class FaultyReader final : public Reader {
 public:
  using Fault = std::function<void(const Record&)>;
  FaultyReader(const Store& store, Fault fault) : file_(store, false), fault_(std::move(fault)) {}
  void read(const Record& record, void* out, bool again) override {
    fault_(record);
    file_.read(record, out, again);
  }
  const char* name() const noexcept override { return "faulty"; }

 private:
  FileReader file_;
  Fault fault_;
};

// Random tokens of one layer.
struct Tokens {
  Tokens(int64_t count, int64_t k, uint32_t seed)
      : n(count), top_k(k), x(normal(n * SmallStore::kHidden, seed)) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < n * top_k; ++i) {
      ids.push_back(static_cast<int32_t>(random() % SmallStore::kExperts));
      levels.push_back(static_cast<uint8_t>(random() % SmallStore::kLevels));
      weights.push_back(static_cast<float>(random() % 100) / 100.0f);
    }
    out.assign(static_cast<size_t>(n * SmallStore::kHidden), 7.0f);
    status.assign(static_cast<size_t>(n), 9);
  }
  Routing routing() const {
    return {x.data(), n, ids.data(), weights.data(), top_k, levels.data(), 0};
  }
  int64_t n, top_k;
  std::vector<float> x;
  std::vector<int32_t> ids;
  std::vector<uint8_t> levels;
  std::vector<float> weights;
  std::vector<float> out;
  std::vector<uint8_t> status;
};

}  // namespace pyruntime::moe
