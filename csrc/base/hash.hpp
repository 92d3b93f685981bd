// Hashes that must give the same value on CPU and GPU, in a file and in ten years: XXH64 (the
// published algorithm by Y. Collet, checked against its reference values) and a bijective mixer.
// Compiles under g++ and nvcc: no standard containers, no exceptions.
#pragma once

#include "base/integers.hpp"

#if defined(__CUDACC__)
#define PYRT_HASH_FN __host__ __device__ __forceinline__
#else
#define PYRT_HASH_FN inline __attribute__((always_inline))
#endif

namespace pyruntime::base {

// Constant: S. Vigna's survey of 64-bit mixers.
inline constexpr uint64_t kMixFactor = 0xd6e8feb86659fd93ULL;

// Two multiply and xor-shift rounds; bijective.
PYRT_HASH_FN uint64_t mix64(uint64_t x) {
  x ^= x >> 32;
  x *= kMixFactor;
  x ^= x >> 32;
  x *= kMixFactor;
  x ^= x >> 32;
  return x;
}

namespace xxh64_detail {

inline constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87ULL;
inline constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4FULL;
inline constexpr uint64_t kPrime3 = 0x165667B19E3779F9ULL;
inline constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63ULL;
inline constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5ULL;

PYRT_HASH_FN uint64_t rotl(uint64_t x, int r) { return (x << r) | (x >> (64 - r)); }

// Byte by byte, so that device code and strict alignment are served; compilers merge the loads.
PYRT_HASH_FN uint64_t read64(const unsigned char* p) {
#if defined(__CUDA_ARCH__)
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | p[i];
  return value;
#else
  uint64_t value;
  __builtin_memcpy(&value, p, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
#endif
}

PYRT_HASH_FN uint32_t read32(const unsigned char* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 |
         static_cast<uint32_t>(p[2]) << 16 | static_cast<uint32_t>(p[3]) << 24;
}

PYRT_HASH_FN uint64_t round(uint64_t accumulator, uint64_t input) {
  return rotl(accumulator + input * kPrime2, 31) * kPrime1;
}

PYRT_HASH_FN uint64_t merge(uint64_t hash, uint64_t accumulator) {
  return (hash ^ round(0, accumulator)) * kPrime1 + kPrime4;
}

}  // namespace xxh64_detail

PYRT_HASH_FN uint64_t xxh64(const void* data, size_t bytes, uint64_t seed) {
  using namespace xxh64_detail;
  const auto* p = static_cast<const unsigned char*>(data);
  size_t left = bytes;
  uint64_t hash;
  if (left >= 32) {
    uint64_t a = seed + kPrime1 + kPrime2;
    uint64_t b = seed + kPrime2;
    uint64_t c = seed;
    uint64_t d = seed - kPrime1;
    for (; left >= 32; left -= 32, p += 32) {
      a = round(a, read64(p));
      b = round(b, read64(p + 8));
      c = round(c, read64(p + 16));
      d = round(d, read64(p + 24));
    }
    hash = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
    hash = merge(merge(merge(merge(hash, a), b), c), d);
  } else {
    hash = seed + kPrime5;
  }
  hash += bytes;
  for (; left >= 8; left -= 8, p += 8) {
    hash = rotl(hash ^ round(0, read64(p)), 27) * kPrime1 + kPrime4;
  }
  if (left >= 4) {
    hash = rotl(hash ^ read32(p) * kPrime1, 23) * kPrime2 + kPrime3;
    left -= 4;
    p += 4;
  }
  for (; left > 0; --left, ++p) hash = rotl(hash ^ *p * kPrime5, 11) * kPrime1;
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

}  // namespace pyruntime::base
