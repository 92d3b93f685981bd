#include "kv/sha256.hpp"

#include <bit>
#include <cstring>

#include "simd/level.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace pyruntime::kv {
namespace {

alignas(64) constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t load_be(const uint8_t* at) noexcept {
  return uint32_t{at[0]} << 24u | uint32_t{at[1]} << 16u | uint32_t{at[2]} << 8u | at[3];
}

void compress_scalar(ShaState& state, const uint8_t* block) noexcept {
  uint32_t w[64];
  for (int t = 0; t < 16; ++t) w[t] = load_be(block + 4 * t);
  for (int t = 16; t < 64; ++t) {
    const uint32_t a = w[t - 15];
    const uint32_t b = w[t - 2];
    w[t] = w[t - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3u) + w[t - 7] +
           (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10u);
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (int t = 0; t < 64; ++t) {
    const uint32_t one = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                         ((e & f) ^ (~e & g)) + kRound[t] + w[t];
    const uint32_t two =
        (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + one;
    d = c;
    c = b;
    b = a;
    a = one + two;
  }
  const ShaState worked = {a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; ++i) state[i] += worked[i];
}

void compress_pair_scalar(ShaState& a, const uint8_t* block_a, ShaState& b,
                          const uint8_t* block_b) noexcept {
  compress_scalar(a, block_a);
  compress_scalar(b, block_b);
}

}  // namespace
}  // namespace pyruntime::kv

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("sha,sse4.1,ssse3")
namespace pyruntime::kv {
namespace {

// N chains in step. The instructions keep a state as ABEF and CDGH, highest word first.
template <int N>
[[gnu::always_inline]] inline void rounds(ShaState* const (&states)[N],
                                          const uint8_t* const (&blocks)[N]) noexcept {
  const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
  __m128i abef[N];
  __m128i cdgh[N];
  __m128i m[N][4];
  for (int i = 0; i < N; ++i) {
    const auto* words = reinterpret_cast<const __m128i*>(states[i]->data());
    const __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128(words), 0xb1);
    const __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128(words + 1), 0x1b);
    abef[i] = _mm_alignr_epi8(cdab, efgh, 8);
    cdgh[i] = _mm_blend_epi16(efgh, cdab, 0xf0);
  }
  __m128i abef_before[N];
  __m128i cdgh_before[N];
  for (int i = 0; i < N; ++i) {
    abef_before[i] = abef[i];
    cdgh_before[i] = cdgh[i];
  }
#pragma GCC unroll 16
  for (int g = 0; g < 16; ++g) {
    const __m128i k = _mm_load_si128(reinterpret_cast<const __m128i*>(kRound + 4 * g));
#pragma GCC unroll 2
    for (int i = 0; i < N; ++i) {
      __m128i& word = m[i][g & 3];
      if (g < 4) {
        word = _mm_shuffle_epi8(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(blocks[i] + 16 * g)), swap);
      } else {
        const __m128i last = m[i][(g + 3) & 3];
        const __m128i seven = _mm_alignr_epi8(last, m[i][(g + 2) & 3], 4);
        word = _mm_sha256msg2_epu32(
            _mm_add_epi32(_mm_sha256msg1_epu32(word, m[i][(g + 1) & 3]), seven), last);
      }
      const __m128i wk = _mm_add_epi32(word, k);
      cdgh[i] = _mm_sha256rnds2_epu32(cdgh[i], abef[i], wk);
      abef[i] = _mm_sha256rnds2_epu32(abef[i], cdgh[i], _mm_shuffle_epi32(wk, 0x0e));
    }
  }
  for (int i = 0; i < N; ++i) {
    const __m128i feba = _mm_shuffle_epi32(_mm_add_epi32(abef[i], abef_before[i]), 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(_mm_add_epi32(cdgh[i], cdgh_before[i]), 0xb1);
    auto* words = reinterpret_cast<__m128i*>(states[i]->data());
    _mm_storeu_si128(words, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(words + 1, _mm_alignr_epi8(dchg, feba, 8));
  }
}

void compress_ni(ShaState& state, const uint8_t* block) noexcept { rounds<1>({&state}, {block}); }

void compress_pair_ni(ShaState& a, const uint8_t* block_a, ShaState& b,
                      const uint8_t* block_b) noexcept {
  rounds<2>({&a, &b}, {block_a, block_b});
}

}  // namespace
}  // namespace pyruntime::kv
#pragma GCC pop_options
#endif

namespace pyruntime::kv {

const ShaKernels& sha_kernels_scalar() noexcept {
  static constexpr ShaKernels kernels = {"scalar", &compress_scalar, &compress_pair_scalar};
  return kernels;
}

const ShaKernels* sha_kernels_native() noexcept {
#if defined(__x86_64__)
  static constexpr ShaKernels kernels = {"sha_ni", &compress_ni, &compress_pair_ni};
  static const bool there = [] {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29u & 1u) != 0 &&
           __builtin_cpu_supports("sse4.1") != 0;
  }();
  return there ? &kernels : nullptr;
#else
  return nullptr;
#endif
}

const ShaKernels& sha_kernels() noexcept {
  static const ShaKernels& chosen =
      simd::level() == simd::Level::scalar || sha_kernels_native() == nullptr
          ? sha_kernels_scalar()
          : *sha_kernels_native();
  return chosen;
}

void store_digest(const ShaState& state, uint8_t* out) noexcept {
  ShaState words;
  for (size_t i = 0; i < words.size(); ++i) words[i] = __builtin_bswap32(state[i]);
  std::memcpy(out, words.data(), sizeof words);
}

void Sha256::update(const void* data, size_t bytes) noexcept {
  if (bytes == 0) return;
  const auto* at = static_cast<const uint8_t*>(data);
  size_t there = bytes_ % kShaBlock;
  bytes_ += bytes;
  if (there + bytes < kShaBlock) {
    std::memcpy(pending_ + there, at, bytes);
    return;
  }
  if (there != 0) {
    const size_t missing = kShaBlock - there;
    std::memcpy(pending_ + there, at, missing);
    kernels_->compress(state_, pending_);
    at += missing;
    bytes -= missing;
  }
  for (; bytes >= kShaBlock; at += kShaBlock, bytes -= kShaBlock) kernels_->compress(state_, at);
  std::memcpy(pending_, at, bytes);
}

Digest Sha256::digest() const noexcept {
  uint8_t tail[2 * kShaBlock] = {};
  const size_t there = bytes_ % kShaBlock;
  std::memcpy(tail, pending_, there);
  tail[there] = 0x80;
  const size_t end = there + 9 > kShaBlock ? 2 * kShaBlock : kShaBlock;
  for (size_t i = 0; i < 8; ++i) tail[end - 1 - i] = static_cast<uint8_t>(bytes_ * 8 >> 8 * i);
  ShaState state = state_;
  for (size_t at = 0; at < end; at += kShaBlock) kernels_->compress(state, tail + at);
  Digest out;
  store_digest(state, out.data());
  return out;
}

}  // namespace pyruntime::kv
