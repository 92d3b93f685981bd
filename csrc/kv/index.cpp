#include "kv/index.hpp"

#include <random>

namespace pyruntime::kv {
namespace {

uint64_t fold(uint64_t a, uint64_t b) noexcept {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t next_random(uint64_t& state) noexcept {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

uint64_t load64(const int32_t* p) noexcept {
  uint64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

uint64_t hash16(const int32_t* t, const uint64_t* s) noexcept {
  return fold(load64(t) ^ s[0], load64(t + 2) ^ s[1]) ^
         fold(load64(t + 4) ^ s[2], load64(t + 6) ^ s[3]) ^
         fold(load64(t + 8) ^ s[4], load64(t + 10) ^ s[5]) ^
         fold(load64(t + 12) ^ s[6], load64(t + 14) ^ s[7]);
}

uint64_t hash_any(const int32_t* t, uint32_t n, const uint64_t* s) noexcept {
  uint64_t h = n;
  uint32_t i = 0;
  for (; i + 16 <= n; i += 16) h = fold(h ^ s[i / 16 % 8], hash16(t + i, s) ^ s[8]);
  if (i < n) {
    int32_t rest[16] = {};
    std::memcpy(rest, t + i, size_t{n - i} * 4);
    h = fold(h ^ s[i / 16 % 8], hash16(rest, s) ^ s[8]);
  }
  return h;
}

}  // namespace

Index::Index(uint32_t max_nodes, uint64_t seed) {
  size_t capacity = 16;
  while (capacity < 2 * size_t{max_nodes}) capacity *= 2;
  if (capacity > (size_t{1} << 32)) fail(PYRT_EINVAL, "%u content nodes are too many", max_nodes);
  slots_ = Array<Slot>(capacity, true);
  mask_ = capacity - 1;
  if (seed == 0) {
    std::random_device device;
    seed = uint64_t{device()} << 32 | device();
  }
  for (uint64_t& s : secret_) s = next_random(seed);
}

uint64_t Index::root_key(const void* salt, size_t bytes) const noexcept {
  uint64_t key = fold(secret_[7] ^ bytes, secret_[8]);
  const auto* at = static_cast<const unsigned char*>(salt);
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t part = 0;
    std::memcpy(&part, at + i, bytes - i < 8 ? bytes - i : 8);
    key = fold(key ^ part, secret_[i / 8 % 8]);
  }
  return collide_ ? 1 : key;
}

void Index::keys(uint64_t parent, const int32_t* tokens, uint32_t block_size, uint32_t n,
                 uint64_t* out) const noexcept {
  if (block_size == 16) {
    for (uint32_t i = 0; i < n; ++i) out[i] = hash16(tokens + size_t{i} * 16, secret_);
  } else {
    for (uint32_t i = 0; i < n; ++i) {
      out[i] = hash_any(tokens + size_t{i} * block_size, block_size, secret_);
    }
  }
  uint64_t key = parent;
  for (uint32_t i = 0; i < n; ++i) out[i] = key = collide_ ? 1 : fold(key ^ secret_[8], out[i]);
}

void Index::erase(uint64_t key, NodeId node) noexcept {
  size_t hole = home(key);
  while (slots_[hole].node != node) hole = (hole + 1) & mask_;
  for (size_t at = hole;;) {
    at = (at + 1) & mask_;
    const Slot slot = slots_[at];
    if (slot.node == kNoNode) break;
    // Whoever's way from home leads over the hole may fill it.
    if (((at - (slot.tag & mask_)) & mask_) >= ((at - hole) & mask_)) {
      slots_[hole] = slot;
      hole = at;
    }
  }
  slots_[hole] = {kNoNode, 0};
  --size_;
}

}  // namespace pyruntime::kv
