// SHA-256 (FIPS 180-4): a stream, and its compression function one or two blocks at a time.
//
// The SHA instructions of x86 have a latency of four cycles but start one every other cycle, so two
// independent compressions side by side take hardly longer than one; `compress_pair` is for those
// who have two. Chosen at run time; scalar elsewhere and under PYRUNTIME_SIMD=scalar.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace pyruntime::kv {

using ShaState = std::array<uint32_t, 8>;
using Digest = std::array<uint8_t, 32>;

inline constexpr size_t kShaBlock = 64;
inline constexpr ShaState kShaStart = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

struct ShaKernels {
  const char* name;
  void (*compress)(ShaState& state, const uint8_t* block) noexcept;
  // Two states and blocks that do not depend on each other.
  void (*compress_pair)(ShaState& a, const uint8_t* block_a, ShaState& b,
                        const uint8_t* block_b) noexcept;
};

const ShaKernels& sha_kernels() noexcept;         // in use
const ShaKernels& sha_kernels_scalar() noexcept;  // for tests
const ShaKernels* sha_kernels_native() noexcept;  // null where the CPU has none

// Writes the state as the bytes of a digest: big endian.
void store_digest(const ShaState& state, uint8_t* out) noexcept;

class Sha256 {
 public:
  explicit Sha256(const ShaKernels& kernels = sha_kernels()) noexcept : kernels_(&kernels) {}
  void update(const void* data, size_t bytes) noexcept;
  Digest digest() const noexcept;  // of what came so far; the stream may go on

 private:
  const ShaKernels* kernels_;
  ShaState state_ = kShaStart;
  uint64_t bytes_ = 0;
  uint8_t pending_[kShaBlock] = {};  // bytes_ % 64 of them
};

}  // namespace pyruntime::kv
