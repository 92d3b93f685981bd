// Tiles by 256-bit vectors of 8 rows. The file that includes this defines, after it,
//   plane<Bits, T, H>(codes, a, h)
// which sets h[i * H + j] to the dot products of a group's codes of one plane, for token i of T and
// half j of H of the rows.

inline __m256i broadcast(const int8_t* a) {
  int32_t word;
  __builtin_memcpy(&word, a, 4);
  return _mm256_set1_epi32(word);
}

inline __m256 bytes_to_float(const uint8_t* at) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
}

inline __m256 halves_to_float(const uint8_t* at) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

template <int Bits, int T, int H>
void plane(const uint8_t* codes, const int8_t* const* a, __m256i* h);

template <int T, int H>
inline void plane_of(int bits, const uint8_t* codes, const int8_t* const* a, __m256i* h) {
  if (bits == 2) {
    plane<2, T, H>(codes, a, h);
  } else if (bits == 4) {
    plane<4, T, H>(codes, a, h);
  } else {
    plane<8, T, H>(codes, a, h);
  }
}

// H halves of the rows of a tile, from `half` on, for T tokens.
template <int T, int H>
void part(const Nested& w, int64_t index, int half, const Row* x, float* const* outs) {
  constexpr int64_t ahead = 2048;  // bytes of a plane that are asked for before they are needed
  const uint8_t* at[kMaxLevels];
  for (int i = 0; i < w.planes; ++i) at[i] = w.data[i] + index * nested_tile_bytes(w, i);
  __m256 p[T * H], r[T * H];
  for (int i = 0; i < T * H; ++i) p[i] = r[i] = _mm256_setzero_ps();
  const int64_t groups = ceil_div(w.columns, kGroup);
  for (int64_t first = 0; first < groups; first += kSuperGroups) {
    const int64_t count = groups - first < kSuperGroups ? groups - first : kSuperGroups;
    const uint8_t* meta = at[0] + half * 8;
    at[0] += kMetaBytes;
    const uint8_t* pair = at[w.planes - 1] + half * 16;
    for (int i = 0; i < w.planes; ++i) at[i] += kPairBytes;
    __m256 big_p[T * H], big_r[T * H];
    for (int i = 0; i < T * H; ++i) big_p[i] = big_r[i] = _mm256_setzero_ps();
    for (int64_t g = 0; g < count; ++g) {
      const int8_t* a[T];
      for (int i = 0; i < T; ++i) a[i] = x[i].codes + (first + g) * kGroup;
      __m256i total[T * H];
      plane_of<T, H>(w.bits[0], at[0] + half * 32, a, total);
      for (int line = 0; line < w.bits[0]; ++line) {
        _mm_prefetch(at[0] + ahead + line * 64, _MM_HINT_T0);
      }
      at[0] += 64 * w.bits[0];
      for (int k = 1; k < w.planes; ++k) {
        __m256i h[T * H];
        plane_of<T, H>(w.bits[k], at[k] + half * 32, a, h);
        for (int line = 0; line < w.bits[k]; ++line) {
          _mm_prefetch(at[k] + ahead + line * 64, _MM_HINT_T0);
        }
        at[k] += 64 * w.bits[k];
        const __m128i shift = _mm_cvtsi32_si128(w.bits[k]);
        for (int i = 0; i < T * H; ++i) {
          total[i] = _mm256_add_epi32(_mm256_sll_epi32(total[i], shift), h[i]);
        }
      }
      for (int j = 0; j < H; ++j) {
        const __m256 scale = bytes_to_float(meta + g * 32 + j * 8);
        const __m256 min = bytes_to_float(meta + g * 32 + 16 + j * 8);
        for (int i = 0; i < T; ++i) {
          const int at_i = i * H + j;
          const __m256 value = _mm256_cvtepi32_ps(_mm256_add_epi32(
              _mm256_slli_epi32(total[at_i], 6), _mm256_set1_epi32(x[i].offsets[first + g])));
          big_p[at_i] = _mm256_fmadd_ps(
              value, _mm256_mul_ps(scale, _mm256_set1_ps(x[i].scales[first + g])), big_p[at_i]);
          big_r[at_i] = _mm256_fmadd_ps(min, _mm256_set1_ps(x[i].sums[first + g]), big_r[at_i]);
        }
      }
    }
    for (int j = 0; j < H; ++j) {
      const __m256 d = halves_to_float(pair + j * 16), m = halves_to_float(pair + 32 + j * 16);
      for (int i = 0; i < T; ++i) {
        p[i * H + j] = _mm256_fmadd_ps(d, big_p[i * H + j], p[i * H + j]);
        r[i * H + j] = _mm256_fmadd_ps(m, big_r[i * H + j], r[i * H + j]);
      }
    }
  }
  for (int i = 0; i < T; ++i) {
    for (int j = 0; j < H; ++j) {
      alignas(32) float y[8];
      const __m256 scaled = _mm256_mul_ps(p[i * H + j], _mm256_set1_ps(1.0f / 64));
      _mm256_store_ps(y,
                      _mm256_mul_ps(_mm256_sub_ps(scaled, r[i * H + j]), _mm256_set1_ps(w.unit)));
      const int64_t from = index * kTileRows + (half + j) * 8;
      for (int64_t row = 0; row < 8 && from + row < w.rows; ++row) outs[i][from + row] = y[row];
    }
  }
}

void tiles(const Nested& w, int64_t first, int64_t last, const Row* rows, int64_t n,
           float* const* outs) {
  for (int64_t index = first; index < last; ++index) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
      part<2, 2>(w, index, 0, rows + i, outs + i);
      part<2, 2>(w, index, 0, rows + i + 2, outs + i + 2);
    }
    for (; i < n; ++i) part<1, 2>(w, index, 0, rows + i, outs + i);
  }
}
