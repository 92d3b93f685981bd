// Sixteen float lanes in two 256-bit registers; see kernels.hpp. Included inside the kernels'
// namespace, under the target pragma.

struct V {
  __m256 low, high;
};

inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256i mask8(int64_t count) {
  const int n = count < 0 ? 0 : count > 8 ? 8 : static_cast<int>(count);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load_part(const float* p, int64_t count) {
  return {_mm256_maskload_ps(p, mask8(count)), _mm256_maskload_ps(p + 8, mask8(count - 8))};
}
inline V load(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
inline V load_part(const uint16_t* p, int64_t count) {
  uint16_t whole[16] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}
inline void store(float* p, V v) {
  _mm256_storeu_ps(p, v.low);
  _mm256_storeu_ps(p + 8, v.high);
}
inline void store_part(float* p, int64_t count, V v) {
  _mm256_maskstore_ps(p, mask8(count), v.low);
  _mm256_maskstore_ps(p + 8, mask8(count - 8), v.high);
}
inline V add(V a, V b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline V fma(V a, V b, V c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline V max(V a, V b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline V round_even(V a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
inline V power2(V n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_add_epi32(_mm256_cvttps_epi32(n.low), bias);
  const __m256i high = _mm256_add_epi32(_mm256_cvttps_epi32(n.high), bias);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(low, 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(high, 23))};
}
inline float sum(V v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(V v) {
  const __m256 eight = _mm256_max_ps(v.low, v.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Rows and columns of the register block of `linear`.
constexpr int kRows = 2;
constexpr int kColumns = 2;
