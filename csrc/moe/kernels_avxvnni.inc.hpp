// `plane` of kernels_avx2.inc.hpp with AVX-VNNI; apart from its file so that tests can compile it
// over an emulated instruction.

// The instruction multiplies and adds four neighbours into 32 bits; fields stay where
// they are in the byte and carry their factor until the end.
template <int Bits, int T, int L>
inline void plane(const uint8_t* const* codes, int64_t at, const int8_t* const* a, __m256i* h) {
  constexpr int N = T * L * 2;
  constexpr int fields = 8 / Bits;
  __m256i sums[fields][N];
  for (int f = 0; f < fields; ++f) {
    for (int i = 0; i < N; ++i) sums[f][i] = _mm256_setzero_si256();
  }
  for (int v = 0; v < Bits; ++v) {
    for (int j = 0; j < 2 * L; ++j) {
      const __m256i bytes = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(codes[j / 2] + at + v * 64 + j % 2 * 32));
      for (int f = 0; f < fields; ++f) {
        const int mask = ((1 << Bits) - 1) << (f * Bits);
        const __m256i field = _mm256_and_si256(bytes, _mm256_set1_epi8(static_cast<char>(mask)));
        for (int i = 0; i < T; ++i) {
          __m256i& sum = sums[f][i * L * 2 + j];
          sum = _mm256_dpbusd_avx_epi32(sum, field, broadcast(a[i] + (v * fields + f) * 4));
        }
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    h[i] = sums[0][i];
    for (int f = 1; f < fields; ++f) {
      h[i] = _mm256_add_epi32(h[i], _mm256_srai_epi32(sums[f][i], f * Bits));
    }
  }
}
