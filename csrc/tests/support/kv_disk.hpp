// Content for the disk tier that tells whose it is, and a disk that forgets what was not synced.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "base/hash.hpp"
#include "base/status.hpp"
#include "kv/disk.hpp"

namespace pyruntime::kv::test {

// Key and payload of content number `i`.
inline DiskKey key_of(uint64_t i) {
  DiskKey key{};
  for (uint64_t word = 0; word < 4; ++word) {
    const uint64_t value = base::mix64(4 * i + word + 1);
    std::memcpy(key.data() + 8 * word, &value, 8);
  }
  return key;
}

inline std::vector<uint8_t> payload_of(uint64_t i, uint64_t bytes) {
  std::vector<uint8_t> data(bytes);
  for (uint64_t at = 0; at < bytes; at += 8) {
    const uint64_t value = base::mix64((i + 1) << 20u | at);
    std::memcpy(data.data() + at, &value, std::min<uint64_t>(8, bytes - at));
  }
  return data;
}

struct Items {
  explicit Items(const std::vector<uint64_t>& numbers, uint64_t bytes) {
    for (const uint64_t i : numbers) {
      const DiskKey key = key_of(i);
      keys.insert(keys.end(), key.begin(), key.end());
      const std::vector<uint8_t> payload = payload_of(i, bytes);
      data.insert(data.end(), payload.begin(), payload.end());
    }
  }
  std::vector<uint8_t> keys, data;
};

// What a disk holds: `durable` survives a crash, of `pending` any part may.
struct Medium {
  struct Write {
    uint64_t offset;
    std::vector<char> data;
  };
  std::vector<char> content, durable;
  std::vector<Write> pending;
  int64_t writes_and_syncs = 0;

  // What a crash leaves: of each sector written since the last sync, any of its versions.
  std::vector<char> after_crash(uint64_t seed) const {
    std::mt19937_64 random(seed);
    std::vector<char> left = durable;
    if (random() % 8 == 0) return left;
    for (const Write& write : pending) {
      for (size_t at = 0; at < write.data.size();) {
        const uint64_t offset = write.offset + at;
        const size_t some = std::min<size_t>(512 - offset % 512, write.data.size() - at);
        if (random() % 2 == 0) {
          if (offset + some > left.size()) left.resize(offset + some);
          std::memcpy(left.data() + offset, write.data.data() + at, some);
        }
        at += some;
      }
    }
    return left;
  }
};

class SimulatedFile final : public DiskFile {
 public:
  // From the `stop_at`-th write or sync on (0: none) everything fails; that one is lost.
  explicit SimulatedFile(std::shared_ptr<Medium> medium, int64_t stop_at = 0)
      : medium_(std::move(medium)), stop_at_(stop_at) {}

  uint64_t size() override { return medium_->content.size(); }
  void resize(uint64_t bytes) override {
    medium_->content.resize(bytes);
    medium_->durable.resize(bytes);
  }
  bool read(uint64_t offset, void* out, uint64_t bytes) override {
    if (bytes == 0) return true;
    if (offset + bytes > size()) return false;
    std::memcpy(out, medium_->content.data() + offset, bytes);
    return true;
  }
  void write(uint64_t offset, const void* data, uint64_t bytes) override {
    const auto* from = static_cast<const char*>(data);
    medium_->pending.push_back({offset, {from, from + bytes}});  // a part may arrive in any case
    step();
    if (offset + bytes > size()) medium_->content.resize(offset + bytes);
    std::memcpy(medium_->content.data() + offset, data, bytes);
  }
  void sync() override {
    step();
    medium_->durable = medium_->content;
    medium_->pending.clear();
  }

 private:
  void step() {
    ++medium_->writes_and_syncs;
    if (stop_at_ != 0 && medium_->writes_and_syncs >= stop_at_) fail(PYRT_EIO, "crashed");
  }
  std::shared_ptr<Medium> medium_;
  int64_t stop_at_;
};

}  // namespace pyruntime::kv::test
