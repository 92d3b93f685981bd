#if defined(__x86_64__)
#include <immintrin.h>

#include "moe/kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace pyruntime::moe {
namespace {
#include "moe/kernels.inc.hpp"
//
#include "moe/kernels_avx2.inc.hpp"

// The instruction adds two products in 16 bits. Of 2-bit codes, fields at bits 0 and 2 are used in
// place (factors 1 and 4), those at 4 and 6 after one shift of the vector: each of the two sums
// takes four steps, at most 4 * 12 * 127 * 2. Of 4-bit codes one sum takes all eight steps of a
// group, at most 8 * 15 * 127 * 2. Codes of 8 bits are two nibbles.
template <int Bits, int T, int L>
inline void plane(const uint8_t* const* codes, int64_t at, const int8_t* const* a, __m256i* h) {
  constexpr int N = T * L * 2;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i s0[N], s1[N];
  for (int i = 0; i < N; ++i) s0[i] = s1[i] = _mm256_setzero_si256();
  const auto add = [](__m256i& sum, __m256i field, __m256i x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(field, x));
    // Left alone, the compiler gathers all products before it adds them, and spills most of them.
    asm("" : "+x"(sum));
  };
  const __m256i low = _mm256_set1_epi8(Bits == 2 ? 0x03 : 0x0f);
  const __m256i next = _mm256_set1_epi8(0x0c);
#pragma GCC unroll 8
  for (int v = 0; v < Bits; ++v) {
    for (int j = 0; j < 2 * L; ++j) {
      const __m256i bytes = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(codes[j / 2] + at + v * 64 + j % 2 * 32));
      const __m256i top = _mm256_srli_epi16(bytes, 4);
      const __m256i f0 = _mm256_and_si256(bytes, low), f2 = _mm256_and_si256(top, low);
      if constexpr (Bits == 2) {
        const __m256i f1 = _mm256_and_si256(bytes, next), f3 = _mm256_and_si256(top, next);
        for (int i = 0; i < T; ++i) {
          add(s0[i * L * 2 + j], f0, broadcast(a[i] + v * 16));
          add(s1[i * L * 2 + j], f1, broadcast(a[i] + v * 16 + 4));
          add(s0[i * L * 2 + j], f2, broadcast(a[i] + v * 16 + 8));
          add(s1[i * L * 2 + j], f3, broadcast(a[i] + v * 16 + 12));
        }
      } else if constexpr (Bits == 4) {
        for (int i = 0; i < T; ++i) {
          add(s0[i * L * 2 + j], f0, broadcast(a[i] + v * 8));
          add(s0[i * L * 2 + j], f2, broadcast(a[i] + v * 8 + 4));
        }
      } else {
        for (int i = 0; i < T; ++i) {
          const __m256i x = broadcast(a[i] + v * 4);
          add(s0[i * L * 2 + j], f0, x);
          add(s1[i * L * 2 + j], f2, x);
        }
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    if constexpr (Bits == 2) {
      h[i] = _mm256_madd_epi16(_mm256_add_epi16(s0[i], _mm256_srai_epi16(s1[i], 2)), ones);
    } else if constexpr (Bits == 4) {
      h[i] = _mm256_madd_epi16(s0[i], ones);
    } else {
      h[i] = _mm256_add_epi32(_mm256_madd_epi16(s0[i], ones),
                              _mm256_slli_epi32(_mm256_madd_epi16(s1[i], ones), 4));
    }
  }
}
}  // namespace

const Kernels kAvx2Kernels = {quantize, tiles, silu_mul};

}  // namespace pyruntime::moe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
