// Tiles by 256-bit vectors of 8 rows. The file that includes this defines, after it,
//   plane<Bits, T, L>(codes, at, a, h)
// which sets h[(i * L + l) * 2 + j] to the dot products of a group's codes of one plane, those at
// codes[l] + at, for token i of T, tile l of L and half j of its rows.
//
// One token is bound by memory, which gives more to two streams side by side than to one, and more
// when lines are asked for early: two tiles are read in lockstep, each from its half of the range.

constexpr int64_t kLanes = 2;
constexpr int64_t kAhead = 1024;  // bytes of a plane that are asked for before they are needed

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

inline void prefetch(const uint8_t* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(at + kAhead + line, _MM_HINT_T0);
}

template <int Bits, int T, int L>
void plane(const uint8_t* const* codes, int64_t at, const int8_t* const* a, __m256i* h);

// The tiles index, index + stride, ..., L of them, for T tokens. Bits are those of the base plane;
// More: refinements follow.
template <int Bits, bool More, int T, int L>
void part(const Nested& w, int64_t index, int64_t stride, const Row* x, float* const* outs) {
  constexpr int N = T * L * 2;
  const int planes = More ? w.planes : 1;
  const uint8_t *base[L], *more[kMaxLevels][L];  // the base plane stays in registers
  int64_t at_base = 0, at[kMaxLevels] = {};
  for (int l = 0; l < L; ++l) {
    const int64_t tile = index + l * stride;
    base[l] = w.data[0] + tile * nested_tile_bytes(w, 0);
    for (int k = 1; k < planes; ++k) more[k][l] = w.data[k] + tile * nested_tile_bytes(w, k);
  }
  const auto pass = [](const uint8_t* const* from, int64_t& at, int64_t bytes) {
    for (int l = 0; l < L; ++l) prefetch(from[l] + at, bytes);
    at += bytes;
  };
  __m256 p[N], r[N];
  for (int i = 0; i < N; ++i) p[i] = r[i] = _mm256_setzero_ps();
  const int64_t groups = ceil_div(w.columns, kGroup);
  for (int64_t first = 0; first < groups; first += kSuperGroups) {
    const int64_t count = groups - first < kSuperGroups ? groups - first : kSuperGroups;
    int64_t meta = at_base;
    const int64_t pair = planes == 1 ? at_base + kMetaBytes : at[planes - 1];
    pass(base, at_base, kMetaBytes + kPairBytes);
    for (int k = 1; k < planes; ++k) pass(more[k], at[k], kPairBytes);
    __m256 big_p[N], big_r[N];
    for (int i = 0; i < N; ++i) big_p[i] = big_r[i] = _mm256_setzero_ps();
    for (int64_t g = first; g < first + count; ++g) {
      const int8_t* a[T];
      for (int i = 0; i < T; ++i) a[i] = x[i].codes + g * kGroup;
      __m256i total[N];
      plane<Bits, T, L>(base, at_base, a, total);
      pass(base, at_base, 64 * Bits);
      for (int k = 1; k < planes; ++k) {
        __m256i h[N];
        if (w.bits[k] == 2) {
          plane<2, T, L>(more[k], at[k], a, h);
        } else {
          plane<4, T, L>(more[k], at[k], a, h);
        }
        pass(more[k], at[k], 64 * w.bits[k]);
        const __m128i shift = _mm_cvtsi32_si128(w.bits[k]);
        for (int i = 0; i < N; ++i) {
          total[i] = _mm256_add_epi32(_mm256_sll_epi32(total[i], shift), h[i]);
        }
      }
      for (int j = 0; j < 2 * L; ++j) {
        const uint8_t* bytes = base[j / 2] + meta + j % 2 * 8;
        const __m256 scale = bytes_to_float(bytes), min = bytes_to_float(bytes + 16);
        for (int i = 0; i < T; ++i) {
          const int ij = i * L * 2 + j;
          const __m256 value = _mm256_cvtepi32_ps(_mm256_add_epi32(
              _mm256_slli_epi32(total[ij], 6), _mm256_set1_epi32(x[i].offsets[g])));
          big_p[ij] = _mm256_fmadd_ps(value, _mm256_mul_ps(scale, _mm256_set1_ps(x[i].scales[g])),
                                      big_p[ij]);
          big_r[ij] = _mm256_fmadd_ps(min, _mm256_set1_ps(x[i].sums[g]), big_r[ij]);
        }
      }
      meta += 32;
    }
    const uint8_t* const* last = planes == 1 ? base : more[planes - 1];
    for (int j = 0; j < 2 * L; ++j) {
      const uint8_t* bytes = last[j / 2] + pair + j % 2 * 16;
      const __m256 d = halves_to_float(bytes), m = halves_to_float(bytes + 32);
      for (int i = 0; i < T; ++i) {
        const int ij = i * L * 2 + j;
        p[ij] = _mm256_fmadd_ps(d, big_p[ij], p[ij]);
        r[ij] = _mm256_fmadd_ps(m, big_r[ij], r[ij]);
      }
    }
  }
  for (int i = 0; i < T; ++i) {
    for (int j = 0; j < 2 * L; ++j) {
      const int ij = i * L * 2 + j;
      alignas(32) float y[8];
      const __m256 scaled = _mm256_mul_ps(p[ij], _mm256_set1_ps(1.0f / 64));
      _mm256_store_ps(y, _mm256_mul_ps(_mm256_sub_ps(scaled, r[ij]), _mm256_set1_ps(w.unit)));
      const int64_t top = (index + j / 2 * stride) * kTileRows + j % 2 * 8;
      for (int64_t row = 0; row < 8 && top + row < w.rows; ++row) outs[i][top + row] = y[row];
    }
  }
}

template <int Bits, bool More>
void tiles_of(const Nested& w, int64_t first, int64_t last, const Row* rows, int64_t n,
              float* const* outs) {
  if (n == 1) {
    const int64_t stride = (last - first) / kLanes;
    for (int64_t index = first; index < first + stride; ++index) {
      part<Bits, More, 1, kLanes>(w, index, stride, rows, outs);
    }
    first += stride * kLanes;
  }
  for (int64_t index = first; index < last; ++index) {
    int64_t i = 0;
    for (; i + 2 <= n; i += 2) part<Bits, More, 2, 1>(w, index, 0, rows + i, outs + i);
    if (i < n) part<Bits, More, 1, 1>(w, index, 0, rows + i, outs + i);
  }
}

void tiles(const Nested& w, int64_t first, int64_t last, const Row* rows, int64_t n,
           float* const* outs) {
  const auto run = w.bits[0] == 8   ? tiles_of<8, false>
                   : w.bits[0] == 4 ? (w.planes > 1 ? tiles_of<4, true> : tiles_of<4, false>)
                                    : (w.planes > 1 ? tiles_of<2, true> : tiles_of<2, false>);
  run(w, first, last, rows, n, outs);
}
