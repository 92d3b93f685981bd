// Included by each kernels_<isa>.cpp inside its target region and an unnamed namespace: loops that
// the compiler may vectorise. No fused operation appears, so every level gives the same bits.

// exp for x <= 0 or small: |error| < 2 ulp, below -87 clamped.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const auto power = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &power, 4);
  return p * scale;
}

void silu_mul(float* __restrict gate, const float* __restrict up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float g = gate[i];
    gate[i] = g / (1.0f + exp_of(-g)) * up[i];
  }
}

// Rounds half to even for |x| < 2^22, by the float's own precision.
inline int32_t round_of(float x) {
  const float shifted = x + 12582912.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

void quantize_group(const float* x, int64_t count, int8_t* codes, float* scale, float* sum,
                    int32_t* offset) {
  float padded[32];
  if (count < 32) {
    for (int i = 0; i < 32; ++i) padded[i] = i < count ? x[i] : 0.0f;
    x = padded;
  }
  int32_t largest = 0;  // the order of magnitudes is that of their bits
  for (int i = 0; i < 32; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  __builtin_memcpy(&magnitude, &largest, 4);
  const bool finite = largest < 0x7f800000;
  const float inverse = finite && magnitude > 1e-30f ? 127.0f / magnitude : 0.0f;
  int32_t total = 0;
  if (finite) {
    for (int i = 0; i < 32; ++i) {
      const int32_t code = round_of(x[i] * inverse);
      codes[i] = static_cast<int8_t>(code);
      total += code;
    }
  } else {
    for (int i = 0; i < 32; ++i) codes[i] = 0;
  }
  *scale = finite ? magnitude * (1.0f / 127.0f) : __builtin_nanf("");
  *sum = *scale * static_cast<float>(total);
  *offset = 32 * total;
}

void quantize(const float* x, int64_t columns, uint8_t* to) {
  const int64_t groups = ceil_div(columns, kGroup);
  auto* codes = reinterpret_cast<int8_t*>(to);
  auto* scales = reinterpret_cast<float*>(to + groups * 32);
  auto* sums = reinterpret_cast<float*>(to + groups * 36);
  auto* offsets = reinterpret_cast<int32_t*>(to + groups * 40);
  for (int64_t g = 0; g < groups; ++g) {
    quantize_group(x + g * 32, columns - g * 32, codes + g * 32, scales + g, sums + g, offsets + g);
  }
}

// Bytes of a plane's tile, and of its super-block with `groups` groups.
inline int64_t record_bytes(bool base, int bits, int64_t groups) {
  return kPairBytes + (base ? kMetaBytes : 0) + groups * 64 * bits;
}

inline int64_t nested_tile_bytes(const Nested& w, int plane) {
  return ceil_div(w.columns, kSuper) * record_bytes(plane == 0, 0, 0) +
         ceil_div(w.columns, kGroup) * 64 * w.bits[plane];
}
