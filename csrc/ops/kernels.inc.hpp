// The kernels over V; included by kernels_<level>.cpp inside its namespace. No function of the
// standard library is called here: an inline one compiled for AVX-512 could be the copy the linker
// keeps.

template <class E>  // float, or uint16_t: a half
inline V load_at_most(const E* p, int64_t left) {
  return left >= 16 ? load(p) : load_part(p, left);
}
inline void store_at_most(float* p, int64_t left, V v) {
  if (left >= 16) {
    store(p, v);
  } else {
    store_part(p, left, v);
  }
}

// exp(x) within 2 ulp: argument reduction by ln 2 in two parts, then a polynomial of degree 6.
// Below -87.3 the result is 0 or the smallest normal numbers; above 88.3 it saturates.
inline V exp_lanes(V x) {
  const V clamped = min(max(x, set1(-87.33654f)), set1(88.37626f));
  const V n = round_even(mul(clamped, set1(1.44269504f)));
  V r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return mul(p, power2(n));
}

template <int R, int C>
inline void linear_block(const float* x, int64_t x_stride, const float* w, int64_t w_stride,
                         int64_t k, const float* bias, float* out, int64_t out_stride) {
  V total[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) total[r][c] = set1(0.0f);
  }
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    V column[C];
    for (int c = 0; c < C; ++c) column[c] = load(w + c * w_stride + i);
    for (int r = 0; r < R; ++r) {
      const V row = load(x + r * x_stride + i);
      for (int c = 0; c < C; ++c) total[r][c] = fma(row, column[c], total[r][c]);
    }
  }
  if (i < k) {
    V column[C];
    for (int c = 0; c < C; ++c) column[c] = load_part(w + c * w_stride + i, k - i);
    for (int r = 0; r < R; ++r) {
      const V row = load_part(x + r * x_stride + i, k - i);
      for (int c = 0; c < C; ++c) total[r][c] = fma(row, column[c], total[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      const float value = sum(total[r][c]);
      out[r * out_stride + c] = bias == nullptr ? value : value + bias[c];
    }
  }
}

template <int C>
inline void linear_columns(const float* x, int64_t x_stride, int64_t n, const float* w,
                           int64_t w_stride, int64_t k, const float* bias, float* out,
                           int64_t out_stride) {
  int64_t row = 0;
  for (; row + kRows <= n; row += kRows) {
    linear_block<kRows, C>(x + row * x_stride, x_stride, w, w_stride, k, bias,
                           out + row * out_stride, out_stride);
  }
  for (; row < n; ++row) {
    linear_block<1, C>(x + row * x_stride, x_stride, w, w_stride, k, bias, out + row * out_stride,
                       out_stride);
  }
}

void linear(const float* x, int64_t x_stride, int64_t n, const float* w, int64_t w_stride,
            int64_t m, int64_t k, const float* bias, float* out, int64_t out_stride) {
  constexpr int kWide = 2 * kColumns;  // a single row has registers to spare
  int64_t column = 0;
  const auto at = [bias](int64_t c) { return bias == nullptr ? nullptr : bias + c; };
  if (n < kRows) {
    for (; column + kWide <= m; column += kWide) {
      linear_columns<kWide>(x, x_stride, n, w + column * w_stride, w_stride, k, at(column),
                            out + column, out_stride);
    }
  }
  for (; column + kColumns <= m; column += kColumns) {
    linear_columns<kColumns>(x, x_stride, n, w + column * w_stride, w_stride, k, at(column),
                             out + column, out_stride);
  }
  for (; column < m; ++column) {
    linear_columns<1>(x, x_stride, n, w + column * w_stride, w_stride, k, at(column), out + column,
                      out_stride);
  }
}

void rms_norm(const float* x, int64_t d, const float* weight, float eps, float* out) {
  V squares = set1(0.0f);
  for (int64_t i = 0; i < d; i += 16) {
    const V v = load_at_most(x + i, d - i);
    squares = fma(v, v, squares);
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(d) + eps);
  for (int64_t i = 0; i < d; i += 16) {
    const V v = mul(load_at_most(x + i, d - i), set1(scale));
    store_at_most(out + i, d - i, mul(v, load_at_most(weight + i, d - i)));
  }
}

void silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += 16) {
    const V g = load_at_most(gate + i, count - i);
    const V denominator = add(set1(1.0f), exp_lanes(sub(set1(0.0f), g)));
    const V silu = div(g, denominator);
    store_at_most(out + i, count - i, mul(silu, load_at_most(up + i, count - i)));
  }
}

void combine(const float* const* rows, const float* weights, int64_t count, int64_t d, float* out) {
  for (int64_t i = 0; i < d; i += 16) {
    V total = set1(0.0f);
    for (int64_t s = 0; s < count; ++s) {
      if (rows[s] == nullptr) continue;
      total = fma(set1(weights[s]), load_at_most(rows[s] + i, d - i), total);
    }
    store_at_most(out + i, d - i, total);
  }
}

template <class E>
void dot_run(const float* q, const E* k, int64_t stride, int64_t count, int64_t d, float scale,
             float* scores) {
  int64_t p = 0;
  for (; p + 4 <= count; p += 4) {
    const E* row = k + p * stride;
    V total[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    for (int64_t i = 0; i < d; i += 16) {
      const V query = load_at_most(q + i, d - i);
      for (int j = 0; j < 4; ++j) {
        total[j] = fma(query, load_at_most(row + j * stride + i, d - i), total[j]);
      }
    }
    for (int j = 0; j < 4; ++j) scores[p + j] = sum(total[j]) * scale;
  }
  for (; p < count; ++p) {
    V total = set1(0.0f);
    for (int64_t i = 0; i < d; i += 16) {
      total = fma(load_at_most(q + i, d - i), load_at_most(k + p * stride + i, d - i), total);
    }
    scores[p] = sum(total) * scale;
  }
}

template <class E>
void weighted_run(const float* weights, const E* v, int64_t stride, int64_t count, int64_t d,
                  float* out) {
  int64_t i = 0;
  for (; i + 64 <= d; i += 64) {
    V total[4];
    for (int j = 0; j < 4; ++j) total[j] = load(out + i + 16 * j);
    for (int64_t p = 0; p < count; ++p) {
      const V weight = set1(weights[p]);
      const E* row = v + p * stride + i;
      for (int j = 0; j < 4; ++j) total[j] = fma(weight, load(row + 16 * j), total[j]);
    }
    for (int j = 0; j < 4; ++j) store(out + i + 16 * j, total[j]);
  }
  for (; i < d; i += 16) {
    V total = load_at_most(out + i, d - i);
    for (int64_t p = 0; p < count; ++p) {
      total = fma(set1(weights[p]), load_at_most(v + p * stride + i, d - i), total);
    }
    store_at_most(out + i, d - i, total);
  }
}

void exp_scaled(float* x, int64_t count, float max_value, float scale) {
  for (int64_t i = 0; i < count; i += 16) {
    const V v = sub(load_at_most(x + i, count - i), set1(max_value));
    store_at_most(x + i, count - i, exp_lanes(mul(v, set1(scale))));
  }
}

float max_of(const float* x, int64_t count) {
  V highest = set1(-__builtin_inff());
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) highest = max(highest, load(x + i));
  float top = largest(highest);
  for (; i < count; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

float exp_sum(float* x, int64_t count, float max_value) {
  exp_scaled(x, count, max_value, 1.0f);
  V total = set1(0.0f);
  for (int64_t i = 0; i < count; i += 16) total = add(total, load_at_most(x + i, count - i));
  return sum(total);
}

void scale_by(float* x, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += 16) {
    store_at_most(x + i, count - i, mul(load_at_most(x + i, count - i), set1(factor)));
  }
}

double sum_exp(const float* x, int64_t count, float max_value) {
  // Blocks of 4096 are summed in float, the blocks in double: a vocabulary has 10^5 entries.
  double total = 0.0;
  for (int64_t first = 0; first < count; first += 4096) {
    const int64_t last = first + 4096 < count ? first + 4096 : count;
    V block = set1(0.0f);
    for (int64_t i = first; i < last; i += 16) {
      const V e = exp_lanes(sub(load_at_most(x + i, last - i), set1(max_value)));
      if (last - i >= 16) {
        block = add(block, e);
      } else {
        float lanes[16];
        store(lanes, e);
        block = add(block, load_part(lanes, last - i));
      }
    }
    total += static_cast<double>(sum(block));
  }
  return total;
}

constexpr Kernels kTable = {linear,
                            rms_norm,
                            silu_mul,
                            combine,
                            dot_run<float>,
                            dot_run<uint16_t>,
                            weighted_run<float>,
                            weighted_run<uint16_t>,
                            max_of,
                            exp_sum,
                            scale_by,
                            sum_exp,
                            exp_scaled};
