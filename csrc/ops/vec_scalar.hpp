// Sixteen float lanes without SIMD; see kernels.hpp. Included inside the kernels' namespace.

struct V {
  float lane[16];
};

#define PYRT_LANES(expression)                         \
  V r;                                                 \
  for (int i = 0; i < 16; ++i) r.lane[i] = expression; \
  return r

inline V set1(float x) { PYRT_LANES(x); }
inline V load(const float* p) { PYRT_LANES(p[i]); }
inline V load_part(const float* p, int64_t count) { PYRT_LANES(i < count ? p[i] : 0.0f); }
inline V load(const uint16_t* p) { PYRT_LANES(base::from_half(p[i])); }
inline V load_part(const uint16_t* p, int64_t count) {
  PYRT_LANES(i < count ? base::from_half(p[i]) : 0.0f);
}
inline void store(float* p, V v) {
  for (int i = 0; i < 16; ++i) p[i] = v.lane[i];
}
inline void store_part(float* p, int64_t count, V v) {
  for (int64_t i = 0; i < count; ++i) p[i] = v.lane[i];
}
inline V add(V a, V b) { PYRT_LANES(a.lane[i] + b.lane[i]); }
inline V sub(V a, V b) { PYRT_LANES(a.lane[i] - b.lane[i]); }
inline V mul(V a, V b) { PYRT_LANES(a.lane[i] * b.lane[i]); }
inline V div(V a, V b) { PYRT_LANES(a.lane[i] / b.lane[i]); }
inline V fma(V a, V b, V c) { PYRT_LANES(__builtin_fmaf(a.lane[i], b.lane[i], c.lane[i])); }
// As the x86 instructions do: the second operand when either is NaN.
inline V max(V a, V b) { PYRT_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
inline V min(V a, V b) { PYRT_LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
inline V round_even(V a) { PYRT_LANES(__builtin_nearbyintf(a.lane[i])); }
// 2^n for integral n in -126..127.
inline V power2(V n) {
  V r;
  for (int i = 0; i < 16; ++i) {
    const int32_t bits = (static_cast<int32_t>(n.lane[i]) + 127) * (1 << 23);
    __builtin_memcpy(&r.lane[i], &bits, sizeof bits);
  }
  return r;
}
inline float sum(V v) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v.lane[i] = v.lane[i] + v.lane[i + half];
  }
  return v.lane[0];
}
inline float largest(V v) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      v.lane[i] = v.lane[i] > v.lane[i + half] ? v.lane[i] : v.lane[i + half];
    }
  }
  return v.lane[0];
}
#undef PYRT_LANES

// Rows and columns of the register block of `linear`.
constexpr int kRows = 2;
constexpr int kColumns = 2;
