#include "kv/export_key.hpp"

#include <bit>
#include <cstring>

#include "base/status.hpp"

namespace pyruntime::kv {
namespace {

static_assert(std::endian::native == std::endian::little, "tokens are hashed as they lie");

constexpr char kDomain[] = "pyruntime-kv-1";  // with its 0

// The last 64 bytes of a message of `bytes` bytes, a multiple of 64.
struct Padding {
  uint8_t block[kShaBlock] = {0x80};
  void set(uint64_t bytes) noexcept {
    const uint64_t bits = __builtin_bswap64(bytes * 8);
    std::memcpy(block + kShaBlock - 8, &bits, 8);
  }
};

void update_framed(Sha256& stream, const void* data, uint64_t bytes) {
  stream.update(&bytes, sizeof bytes);
  stream.update(data, bytes);
}

}  // namespace

KeyChain::KeyChain(const void* secret, size_t secret_bytes, const void* space, size_t space_bytes,
                   uint32_t block_size, const ShaKernels& kernels)
    : kernels_(&kernels),
      block_size_(block_size),
      aligned_(block_size * sizeof(int32_t) % kShaBlock == 0),
      state_(kShaStart),
      stream_(kernels) {
  if (block_size < 1 || block_size > 1u << 20u) {
    fail(PYRT_EINVAL, "block_size is %u; it must be in 1..2^20", block_size);
  }
  Sha256 names(kernels);
  names.update(kDomain, sizeof kDomain);
  update_framed(names, secret, secret_bytes);
  update_framed(names, space, space_bytes);
  const Digest named = names.digest();
  uint8_t head[kShaBlock] = {};
  std::memcpy(head, named.data(), named.size());
  const uint64_t size = block_size;
  std::memcpy(head + named.size(), &size, sizeof size);
  if (aligned_) {
    kernels.compress(state_, head);
  } else {
    stream_.update(head, sizeof head);
  }
}

void KeyChain::extend(const int32_t* tokens, uint64_t n, uint8_t* keys) noexcept {
  const auto* data = reinterpret_cast<const uint8_t*>(tokens);
  const size_t block_bytes = block_size_ * sizeof(int32_t);
  if (aligned_) {
    extend_aligned(data, n, keys);
  } else {
    for (uint64_t i = 0; i < n; ++i) {
      stream_.update(data + i * block_bytes, block_bytes);
      const Digest key = stream_.digest();
      std::memcpy(keys + i * key.size(), key.data(), key.size());
    }
  }
  blocks_ += n;
}

void KeyChain::extend_aligned(const uint8_t* data, uint64_t n, uint8_t* keys) noexcept {
  if (n == 0) return;
  const uint64_t parts = block_size_ * sizeof(int32_t) / kShaBlock;  // compressions per block
  uint64_t bytes = kShaBlock * (1 + blocks_ * parts);                // hashed so far
  Padding padding;
  for (uint64_t part = 0; part < parts; ++part, data += kShaBlock) {
    kernels_->compress(state_, data);
  }
  for (uint64_t i = 1; i < n; ++i) {
    bytes += kShaBlock * parts;
    padding.set(bytes);
    ShaState closed = state_;
    kernels_->compress_pair(state_, data, closed, padding.block);
    data += kShaBlock;
    for (uint64_t part = 1; part < parts; ++part, data += kShaBlock) {
      kernels_->compress(state_, data);
    }
    store_digest(closed, keys);
    keys += sizeof(Digest);
  }
  padding.set(bytes + kShaBlock * parts);
  ShaState closed = state_;
  kernels_->compress(closed, padding.block);
  store_digest(closed, keys);
}

}  // namespace pyruntime::kv
