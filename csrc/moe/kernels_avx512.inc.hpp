// Tiles by 512-bit vectors of 16 rows. Apart from its file so that tests can compile it over
// vectors that every CPU has (tests/support/emulated.hpp).

constexpr int64_t kAhead = 3072;  // bytes of each plane that are asked for before they are needed

inline __m512i broadcast(const int8_t* a) {
  int32_t word;
  __builtin_memcpy(&word, a, 4);
  return _mm512_set1_epi32(word);
}

inline __m512 bytes_to_float(const uint8_t* at) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
}

inline void store_rows(const Nested& w, int64_t index, __m512 p, __m512 r, float* out) {
  const __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_mul_ps(p, _mm512_set1_ps(1.0f / 64)), r),
                                 _mm512_set1_ps(w.unit));
  const int64_t rows = w.rows - index * kTileRows;
  const __mmask16 mask = rows >= kTileRows ? 0xffff : static_cast<__mmask16>((1u << rows) - 1);
  _mm512_mask_storeu_ps(out + index * kTileRows, mask, y);
}

// 64 times the dot products of a group's codes of one plane.
template <int T>
inline void plane2(const uint8_t* codes, const int8_t* const* a, __m512i* h) {
  const __m512i m0 = _mm512_set1_epi8(0x03), m1 = _mm512_set1_epi8(0x0c),
                m2 = _mm512_set1_epi8(0x30), m3 = _mm512_set1_epi8(static_cast<char>(0xc0));
  __m512i s0[T], s1[T], s2[T];
  {
    const __m512i v = _mm512_loadu_si512(codes);
    const __m512i f0 = _mm512_and_si512(v, m0), f1 = _mm512_and_si512(v, m1),
                  f2 = _mm512_and_si512(v, m2), f3 = _mm512_and_si512(v, m3);
    for (int i = 0; i < T; ++i) {
      const __m512i zero = _mm512_setzero_si512();
      s0[i] = _mm512_dpbusd_epi32(zero, f0, broadcast(a[i]));
      s1[i] = _mm512_dpbusd_epi32(zero, f1, broadcast(a[i] + 4));
      s2[i] = _mm512_dpbusd_epi32(zero, f2, broadcast(a[i] + 8));
      h[i] = _mm512_dpbusd_epi32(zero, f3, broadcast(a[i] + 12));
    }
  }
  const __m512i v = _mm512_loadu_si512(codes + 64);
  const __m512i f0 = _mm512_and_si512(v, m0), f1 = _mm512_and_si512(v, m1),
                f2 = _mm512_and_si512(v, m2), f3 = _mm512_and_si512(v, m3);
  for (int i = 0; i < T; ++i) {
    s0[i] = _mm512_dpbusd_epi32(s0[i], f0, broadcast(a[i] + 16));
    s1[i] = _mm512_dpbusd_epi32(s1[i], f1, broadcast(a[i] + 20));
    s2[i] = _mm512_dpbusd_epi32(s2[i], f2, broadcast(a[i] + 24));
    h[i] = _mm512_dpbusd_epi32(h[i], f3, broadcast(a[i] + 28));
    s1[i] = _mm512_add_epi32(s1[i], _mm512_slli_epi32(s0[i], 2));
    h[i] = _mm512_add_epi32(h[i], _mm512_slli_epi32(s2[i], 2));
    h[i] = _mm512_add_epi32(h[i], _mm512_slli_epi32(s1[i], 4));
  }
}

template <int T>
inline void plane4(const uint8_t* codes, const int8_t* const* a, __m512i* h) {
  const __m512i m0 = _mm512_set1_epi8(0x0f), m1 = _mm512_set1_epi8(static_cast<char>(0xf0));
  __m512i s0[T];
  for (int i = 0; i < T; ++i) s0[i] = h[i] = _mm512_setzero_si512();
  for (int v = 0; v < 4; ++v) {
    const __m512i bytes = _mm512_loadu_si512(codes + v * 64);
    const __m512i f0 = _mm512_and_si512(bytes, m0), f1 = _mm512_and_si512(bytes, m1);
    for (int i = 0; i < T; ++i) {
      s0[i] = _mm512_dpbusd_epi32(s0[i], f0, broadcast(a[i] + v * 8));
      h[i] = _mm512_dpbusd_epi32(h[i], f1, broadcast(a[i] + v * 8 + 4));
    }
  }
  for (int i = 0; i < T; ++i) {
    h[i] = _mm512_add_epi32(_mm512_slli_epi32(h[i], 2), _mm512_slli_epi32(s0[i], 6));
  }
}

template <int T>
inline void plane8(const uint8_t* codes, const int8_t* const* a, __m512i* h) {
  __m512i s0[T];
  for (int i = 0; i < T; ++i) s0[i] = h[i] = _mm512_setzero_si512();
  for (int v = 0; v < 8; v += 2) {
    const __m512i even = _mm512_loadu_si512(codes + v * 64);
    const __m512i odd = _mm512_loadu_si512(codes + v * 64 + 64);
    for (int i = 0; i < T; ++i) {
      s0[i] = _mm512_dpbusd_epi32(s0[i], even, broadcast(a[i] + v * 4));
      h[i] = _mm512_dpbusd_epi32(h[i], odd, broadcast(a[i] + v * 4 + 4));
    }
  }
  for (int i = 0; i < T; ++i) h[i] = _mm512_slli_epi32(_mm512_add_epi32(h[i], s0[i]), 6);
}

template <int T>
inline void plane(int bits, const uint8_t* codes, const int8_t* const* a, __m512i* h) {
  if (bits == 2) {
    plane2<T>(codes, a, h);
  } else if (bits == 4) {
    plane4<T>(codes, a, h);
  } else {
    plane8<T>(codes, a, h);
  }
}

// A tile for T tokens, codes unpacked in registers.
template <int T>
void tile(const Nested& w, int64_t index, const Row* x, float* const* outs) {
  const uint8_t* at[kMaxLevels];
  for (int i = 0; i < w.planes; ++i) at[i] = w.data[i] + index * nested_tile_bytes(w, i);
  __m512 p[T], r[T];
  for (int i = 0; i < T; ++i) p[i] = r[i] = _mm512_setzero_ps();
  const int64_t groups = ceil_div(w.columns, kGroup);
  for (int64_t first = 0; first < groups; first += kSuperGroups) {
    const int64_t count = groups - first < kSuperGroups ? groups - first : kSuperGroups;
    const uint8_t* meta = at[0];
    for (int64_t line = 0; line < kMetaBytes; line += 64)
      _mm_prefetch(meta + kAhead + line, _MM_HINT_T0);
    at[0] += kMetaBytes;
    const uint8_t* pair = at[w.planes - 1];
    for (int i = 0; i < w.planes; ++i) {
      _mm_prefetch(at[i] + kAhead, _MM_HINT_T0);
      at[i] += kPairBytes;
    }
    __m512 big_p[T], big_r[T];
    for (int i = 0; i < T; ++i) big_p[i] = big_r[i] = _mm512_setzero_ps();
    for (int64_t g = 0; g < count; ++g) {
      const int8_t* a[T];
      for (int i = 0; i < T; ++i) a[i] = x[i].codes + (first + g) * kGroup;
      __m512i total[T];
      plane<T>(w.bits[0], at[0], a, total);
      for (int line = 0; line < w.bits[0]; ++line)
        _mm_prefetch(at[0] + kAhead + line * 64, _MM_HINT_T0);
      at[0] += 64 * w.bits[0];
      for (int k = 1; k < w.planes; ++k) {
        __m512i h[T];
        plane<T>(w.bits[k], at[k], a, h);
        for (int line = 0; line < w.bits[k]; ++line)
          _mm_prefetch(at[k] + kAhead + line * 64, _MM_HINT_T0);
        at[k] += 64 * w.bits[k];
        for (int i = 0; i < T; ++i) {
          total[i] =
              _mm512_add_epi32(_mm512_sll_epi32(total[i], _mm_cvtsi32_si128(w.bits[k])), h[i]);
        }
      }
      const __m512 scale = bytes_to_float(meta + g * 32), min = bytes_to_float(meta + g * 32 + 16);
      for (int i = 0; i < T; ++i) {
        const __m512 value = _mm512_cvtepi32_ps(
            _mm512_add_epi32(total[i], _mm512_set1_epi32(x[i].offsets[first + g])));
        big_p[i] = _mm512_fmadd_ps(
            value, _mm512_mul_ps(scale, _mm512_set1_ps(x[i].scales[first + g])), big_p[i]);
        big_r[i] = _mm512_fmadd_ps(min, _mm512_set1_ps(x[i].sums[first + g]), big_r[i]);
      }
    }
    const __m512 d = halves_to_float(pair), m = halves_to_float(pair + 32);
    for (int i = 0; i < T; ++i) {
      p[i] = _mm512_fmadd_ps(d, big_p[i], p[i]);
      r[i] = _mm512_fmadd_ps(m, big_r[i], r[i]);
    }
  }
  for (int i = 0; i < T; ++i) store_rows(w, index, p[i], r[i], outs[i]);
}

// The codes of a group at the width in use, 8 vectors of 16 rows x 4 columns.
inline void unpack(const Nested& w, const uint8_t* const* at, __m512i* codes) {
  for (int k = 0; k < w.planes; ++k) {
    const int bits = w.bits[k];
    const int fields = 8 / bits;
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    for (int v = 0; v < bits; ++v) {
      __m512i bytes = _mm512_loadu_si512(at[k] + v * 64);
      for (int f = 0; f < fields; ++f) {
        const __m512i field = _mm512_and_si512(bytes, mask);
        __m512i& code = codes[v * fields + f];
        code = k == 0 ? field
                      : _mm512_or_si512(_mm512_sll_epi16(code, _mm_cvtsi32_si128(bits)), field);
        bytes = _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(bits));
      }
    }
  }
}

struct Sums {
  __m512 p, r;
};

// T tokens of a super-block whose codes are unpacked.
template <int T>
void unpacked(const __m512i* codes, const uint8_t* meta, __m512 d, __m512 m, int64_t first,
              int64_t count, const Row* x, Sums* sums) {
  __m512 big_p[T], big_r[T];
  for (int i = 0; i < T; ++i) big_p[i] = big_r[i] = _mm512_setzero_ps();
  for (int64_t g = 0; g < count; ++g) {
    const __m512 scale = bytes_to_float(meta + g * 32), min = bytes_to_float(meta + g * 32 + 16);
    __m512i total[T];
    for (int i = 0; i < T; ++i) total[i] = _mm512_setzero_si512();
    for (int v = 0; v < 8; ++v) {
      const __m512i code = codes[g * 8 + v];
      for (int i = 0; i < T; ++i) {
        total[i] = _mm512_dpbusd_epi32(total[i], code,
                                       broadcast(x[i].codes + (first + g) * kGroup + v * 4));
      }
    }
    for (int i = 0; i < T; ++i) {
      const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(
          _mm512_slli_epi32(total[i], 6), _mm512_set1_epi32(x[i].offsets[first + g])));
      big_p[i] = _mm512_fmadd_ps(
          value, _mm512_mul_ps(scale, _mm512_set1_ps(x[i].scales[first + g])), big_p[i]);
      big_r[i] = _mm512_fmadd_ps(min, _mm512_set1_ps(x[i].sums[first + g]), big_r[i]);
    }
  }
  for (int i = 0; i < T; ++i) {
    sums[i].p = _mm512_fmadd_ps(d, big_p[i], sums[i].p);
    sums[i].r = _mm512_fmadd_ps(m, big_r[i], sums[i].r);
  }
}

constexpr int64_t kMany = 256;  // tokens whose sums are kept at a time

// A tile for many tokens: codes are unpacked once per super-block, for all of them.
void tile_of_many(const Nested& w, int64_t index, const Row* x, int64_t n, float* const* outs) {
  const uint8_t* at[kMaxLevels];
  for (int i = 0; i < w.planes; ++i) at[i] = w.data[i] + index * nested_tile_bytes(w, i);
  Sums sums[kMany];
  for (int64_t i = 0; i < n; ++i) sums[i].p = sums[i].r = _mm512_setzero_ps();
  const int64_t groups = ceil_div(w.columns, kGroup);
  for (int64_t first = 0; first < groups; first += kSuperGroups) {
    const int64_t count = groups - first < kSuperGroups ? groups - first : kSuperGroups;
    const uint8_t* meta = at[0];
    at[0] += kMetaBytes;
    const uint8_t* pair = at[w.planes - 1];
    for (int i = 0; i < w.planes; ++i) at[i] += kPairBytes;
    __m512i codes[8 * kSuperGroups];
    for (int64_t g = 0; g < count; ++g) {
      unpack(w, at, codes + g * 8);
      for (int i = 0; i < w.planes; ++i) at[i] += 64 * w.bits[i];
    }
    const __m512 d = halves_to_float(pair), m = halves_to_float(pair + 32);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) unpacked<8>(codes, meta, d, m, first, count, x + i, sums + i);
    for (; i + 2 <= n; i += 2) unpacked<2>(codes, meta, d, m, first, count, x + i, sums + i);
    for (; i < n; ++i) unpacked<1>(codes, meta, d, m, first, count, x + i, sums + i);
  }
  for (int64_t i = 0; i < n; ++i) store_rows(w, index, sums[i].p, sums[i].r, outs[i]);
}

void tiles(const Nested& w, int64_t first, int64_t last, const Row* rows, int64_t n,
           float* const* outs) {
  for (int64_t done = 0; done < n; done += kMany) {
    const int64_t count = n - done < kMany ? n - done : kMany;
    for (int64_t index = first; index < last; ++index) {
      if (count > 6) {
        tile_of_many(w, index, rows + done, count, outs + done);
        continue;
      }
      int64_t i = done;
      for (; i + 4 <= done + count; i += 4) tile<4>(w, index, rows + i, outs + i);
      for (; i + 2 <= done + count; i += 2) tile<2>(w, index, rows + i, outs + i);
      for (; i < done + count; ++i) tile<1>(w, index, rows + i, outs + i);
    }
  }
}
