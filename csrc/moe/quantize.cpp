#include "moe/quantize.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/half.hpp"
#include "base/status.hpp"
#include "base/thread_pool.hpp"

namespace pyruntime::moe {
namespace {

using base::from_half;
using base::to_half;

// Importance of the errors of a width in the search for a group's range, over that width's usual
// error: MSE falls by 4 per bit.
double width_weight(int bits) { return bits == 4 ? 4.0 : bits == 2 ? 2.0 : 1.0; }

struct Pair {
  float d, m;
};

// One row of a super-block: normalised weights, their importance, and what becomes of them.
struct Block {
  int64_t count;  // columns
  float w[kSuper];
  float h[kSuper];
  uint8_t scale[kSuperGroups];
  uint8_t min[kSuperGroups];
  uint8_t code[kSuper];
};

float through_half(double value) { return from_half(to_half(static_cast<float>(value))); }

// Sum of weighted squared errors of the block at a width.
double error_of(const Block& b, int bits, const Pair& pair) {
  double sum = 0.0;
  for (int64_t i = 0; i < b.count; ++i) {
    const auto g = static_cast<size_t>(i / kGroup);
    const float level = static_cast<float>(b.code[i] >> (8 - bits)) + 0.5f;
    const float value =
        pair.d * static_cast<float>(b.scale[g]) * level - pair.m * static_cast<float>(b.min[g]);
    const double e = b.w[i] - value;
    sum += e * e * b.h[i];
  }
  return sum;
}

// A group's range in search of the least cost: the sum over levels of squared errors, each over the
// square of that level's cell in the whole range.
class RangeSearch {
 public:
  RangeSearch(const float* w, const float* h, int64_t count, const Shape& shape)
      : w_(w), h_(h), count_(count), shape_(shape) {
    for (int64_t i = 0; i < count; ++i) {
      low_ = std::min(low_, w[i]);
      high_ = std::max(high_, w[i]);
    }
    from = low_;
    to = high_;
  }

  // Tries `search` places for the lower end, then for the upper one, then twice the least squares
  // fit of both to the codes they gave.
  void run(int search) {
    if (search == 1 || !(high_ > low_)) return;
    best_ = cost(from, to);
    const float step = kSpan / static_cast<float>(search);
    for (int s = 0; s < search; ++s) attempt(low_ * (kFirst - step * static_cast<float>(s)), to);
    const float lower = from;
    for (int s = 0; s < search; ++s)
      attempt(lower, high_ * (kFirst - step * static_cast<float>(s)));
    for (int i = 0; i < 2; ++i) fit();
  }

  float from = 0.0f, to = 0.0f;

 private:
  static constexpr float kSpan = 0.32f, kFirst = 1.06f;  // of the whole range's ends

  void attempt(float lower, float upper) {
    if (!(upper > lower) || lower > 0.0f) return;  // mins are not negative
    const float here = cost(lower, upper);
    if (here >= best_) return;
    best_ = here;
    from = lower;
    to = upper;
  }

  float weight_of(int bits) const {
    const float cell = (high_ - low_) / static_cast<float>(1 << bits);
    return static_cast<float>(width_weight(bits)) / (cell * cell);
  }

  // Codes of 8 bits in the range lower..upper; weights beyond the group count nothing.
  void codes(float lower, float upper, float* out) const {
    const float inverse = 256.0f / (upper - lower);
    for (int64_t i = 0; i < kGroup; ++i) {
      const float u = std::min(std::max((w_[i] - lower) * inverse, 0.0f), 255.0f);
      out[i] = static_cast<float>(static_cast<int>(u));
    }
  }

  float cost(float lower, float upper) const {
    float code[kGroup], error[kGroup];
    codes(lower, upper, code);
    float sum = 0.0f;
    for (int level = 0; level < shape_.levels; ++level) {
      const int bits = shape_.bits[level];
      const float shrink = 1.0f / static_cast<float>(1 << (8 - bits));
      const float cell = (upper - lower) / static_cast<float>(1 << bits);
      for (int64_t i = 0; i < kGroup; ++i) {
        const auto u = static_cast<float>(static_cast<int>(code[i] * shrink));
        const float e = lower + (u + 0.5f) * cell - w_[i];
        error[i] = e * e * h_[i];
      }
      float part[4] = {};
      for (int64_t i = 0; i < kGroup; i += 4) {
        for (int k = 0; k < 4; ++k) part[k] += error[i + k];
      }
      sum += weight_of(bits) * (part[0] + part[1] + part[2] + part[3]);
    }
    return sum;
  }

  // The ends for which lower + x * (upper - lower) / 256 is nearest to the weights over all levels,
  // x being the middles of the codes' cells.
  void fit() {
    float code[kGroup];
    codes(from, to, code);
    double one = 0, x1 = 0, x2 = 0, w1 = 0, xw = 0;
    for (int level = 0; level < shape_.levels; ++level) {
      const int bits = shape_.bits[level], left = 8 - bits;
      const double k = weight_of(bits);
      for (int64_t i = 0; i < count_; ++i) {
        const double h = k * h_[i], w = w_[i];
        const double x = ((static_cast<int>(code[i]) >> left) + 0.5) * (1 << left);
        one += h;
        x1 += h * x;
        x2 += h * x * x;
        w1 += h * w;
        xw += h * x * w;
      }
    }
    const double determinant = one * x2 - x1 * x1;
    if (!(determinant > 1e-9 * one * x2)) return;
    const double step = (one * xw - x1 * w1) / determinant;
    const double lower = (w1 - step * x1) / one;
    attempt(static_cast<float>(lower), static_cast<float>(lower + 256.0 * step));
  }

  const float* w_;
  const float* h_;
  int64_t count_;
  const Shape& shape_;
  float low_ = 0.0f, high_ = 0.0f, best_ = 0.0f;
};

// Picks scales, mins and codes; returns the pair of the code's full 8 bits.
Pair choose_codes(Block& b, const Shape& shape, int search) {
  double step[kSuperGroups] = {}, low[kSuperGroups] = {};
  const int64_t groups = ceil_div(b.count, kGroup);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * kGroup;
    RangeSearch range(b.w + begin, b.h + begin, std::min(b.count - begin, kGroup), shape);
    range.run(search);
    step[g] = (static_cast<double>(range.to) - range.from) / 256.0;
    low[g] = range.from;
  }
  const double largest_step = *std::max_element(step, step + kSuperGroups);
  const double largest_low = -*std::min_element(low, low + kSuperGroups);
  Pair pair{through_half(largest_step / 255.0), through_half(largest_low / 255.0)};
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * kGroup, end = std::min(b.count, begin + kGroup);
    const double min = pair.m > 0 ? std::clamp(std::round(-low[g] / pair.m), 0.0, 255.0) : 0.0;
    const double high = low[g] + 256.0 * step[g];
    const double from = -min * pair.m;
    const double wanted = pair.d > 0 ? (high - from) / 256.0 / pair.d : 0.0;
    const double scale = std::clamp(search == 1 ? std::ceil(wanted) : std::round(wanted),
                                    step[g] > 0 ? 1.0 : 0.0, 255.0);
    b.scale[g] = static_cast<uint8_t>(scale);
    b.min[g] = static_cast<uint8_t>(min);
    const double cell = scale * pair.d;
    for (int64_t i = begin; i < end; ++i) {
      const double u = cell > 0 ? std::floor((b.w[i] - from) / cell) : 0.0;
      b.code[i] = static_cast<uint8_t>(std::clamp(u, 0.0, 255.0));
    }
  }
  return pair;
}

// The pair for a narrower width: least squares of w on (scale * (u_b + 1/2), -min).
Pair refit(const Block& b, int bits, const Pair& cut, float gain) {
  double aa = 0, ab = 0, bb = 0, wa = 0, wb = 0, ww = 0;
  for (int64_t i = 0; i < b.count; ++i) {
    const auto g = static_cast<size_t>(i / kGroup);
    const double h = b.h[i], w = b.w[i];
    const double x = b.scale[g] * ((b.code[i] >> (8 - bits)) + 0.5);
    const double y = -static_cast<double>(b.min[g]);
    aa += h * x * x;
    ab += h * x * y;
    bb += h * y * y;
    wa += h * w * x;
    wb += h * w * y;
    ww += h * w * w;
  }
  double d = 0.0, m = 0.0;
  const double determinant = aa * bb - ab * ab;
  if (determinant > 1e-9 * aa * bb) {
    d = (wa * bb - wb * ab) / determinant;
    m = (wb * aa - wa * ab) / determinant;
  } else if (aa > 0) {
    d = wa / aa;
  }
  if (!(d > 0.0) || !(m >= 0.0)) return cut;
  const double explained = d * wa + m * wb;  // <w, w_b>
  if (explained > 0.0) {
    const double back = std::clamp(1.0 + gain * (ww / explained - 1.0), 1.0, 1.5);
    d *= back;
    m *= back;
  }
  const Pair fitted{through_half(d), through_half(m)};
  if (gain == 0.0f && error_of(b, bits, fitted) > error_of(b, bits, cut)) return cut;
  return fitted;
}

// Writes a plane's codes of one row and group: the bits from `high` down to `low` of each code.
void put_codes(const uint8_t* code, int64_t count, int bits, int low, uint8_t* to, int64_t row) {
  const int fields = 8 / bits;
  for (int64_t i = 0; i < count; ++i) {
    const auto quad = static_cast<int>(i / 4), j = static_cast<int>(i % 4);
    const int v = quad / fields, f = quad % fields;
    const int value = (code[i] >> low) & ((1 << bits) - 1);
    to[v * 64 + row * 4 + j] = static_cast<uint8_t>(to[v * 64 + row * 4 + j] | value << (f * bits));
  }
}

void put_half(uint8_t* to, float value) {
  const uint16_t half = to_half(value);
  std::memcpy(to, &half, 2);
}

}  // namespace

Quantized quantize(const float* weights, int64_t stride, const Shape& shape,
                   const Quantizing& options, uint8_t* const* planes) {
  float largest = 0.0f;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const float* w = weights + row * stride;
    for (int64_t i = 0; i < shape.columns; ++i) {
      if (!std::isfinite(w[i])) {
        fail(PYRT_EINVAL, "weight [%lld, %lld] is %f", static_cast<long long>(row),
             static_cast<long long>(i), static_cast<double>(w[i]));
      }
      largest = std::max(largest, std::fabs(w[i]));
    }
  }
  // So that the largest weight is in 2^11..2^12 and the pairs are well inside fp16.
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  exponent = std::clamp(exponent - 12, -100, 100);
  Quantized result{std::ldexp(1.0f, exponent), {}, 0.0f};
  const auto inverse = static_cast<float>(std::ldexp(1.0, -exponent));
  const int64_t tiles = num_tiles(shape), supers = num_supers(shape);
  struct Sums {
    double error[kMaxLevels];
    double energy;
  };
  std::vector<Sums> sums(static_cast<size_t>(tiles), Sums{});
  base::ThreadPool::process().parallel_for(tiles, 1, [&](int64_t first, int64_t last) {
    Block b;
    for (int64_t tile = first; tile < last; ++tile) {
      uint8_t* at[kMaxLevels] = {};
      for (int level = 0; level < shape.levels; ++level) {
        at[level] = planes[level] + tile * tile_bytes(shape, level);
        std::memset(at[level], 0, static_cast<size_t>(tile_bytes(shape, level)));
      }
      for (int64_t super = 0; super < supers; ++super) {
        b.count = std::min(kSuper, shape.columns - super * kSuper);
        const int64_t groups = ceil_div(b.count, kGroup);
        for (int64_t row = 0; row < std::min(kTileRows, shape.rows - tile * kTileRows); ++row) {
          const float* w = weights + (tile * kTileRows + row) * stride + super * kSuper;
          std::fill(b.w + b.count, b.w + kSuper, 0.0f);
          std::fill(b.h + b.count, b.h + kSuper, 0.0f);
          for (int64_t i = 0; i < b.count; ++i) {
            b.w[i] = w[i] * inverse;
            b.h[i] = options.importance != nullptr ? options.importance[super * kSuper + i] : 1.0f;
          }
          const Pair full = choose_codes(b, shape, std::clamp(options.search, 1, 16));
          for (int64_t g = 0; g < groups; ++g) {
            at[0][g * 32 + row] = b.scale[g];
            at[0][g * 32 + 16 + row] = b.min[g];
          }
          Sums& sum = sums[static_cast<size_t>(tile)];
          for (int64_t i = 0; i < b.count; ++i) {
            sum.energy += static_cast<double>(b.w[i]) * b.w[i] * b.h[i];
          }
          double error = 0.0;
          for (int level = 0; level < shape.levels; ++level) {
            const int bits = shape.bits[level], plane = plane_bits(shape, level);
            if (plane != 0) {
              const float wider = std::ldexp(1.0f, 8 - bits);
              const Pair cut{through_half(full.d * wider), full.m};
              const Pair pair = refit(b, bits, cut, bits < 8 ? options.gain[level] : 0.0f);
              error = error_of(b, bits, pair);
              uint8_t* to = at[level] + (level == 0 ? kMetaBytes : 0);
              put_half(to + 2 * row, pair.d);
              put_half(to + 32 + 2 * row, pair.m);
              to += kPairBytes;
              for (int64_t g = 0; g < groups; ++g) {
                put_codes(b.code + g * kGroup, std::min(kGroup, b.count - g * kGroup), plane,
                          8 - bits, to + g * 64 * plane, row);
              }
            }
            sum.error[level] += error;
          }
        }
        for (int level = 0; level < shape.levels; ++level) {
          const int plane = plane_bits(shape, level);
          if (plane != 0) {
            at[level] += kPairBytes + (level == 0 ? kMetaBytes : 0) + groups * 64 * plane;
          }
        }
      }
    }
  });
  const double square = static_cast<double>(result.unit) * result.unit;
  Sums total{};
  for (const Sums& sum : sums) {
    for (int level = 0; level < shape.levels; ++level) total.error[level] += sum.error[level];
    total.energy += sum.energy;
  }
  for (int level = 0; level < shape.levels; ++level) {
    result.error[level] = static_cast<float>(total.error[level] * square);
  }
  result.energy = static_cast<float>(total.energy * square);
  return result;
}

void dequantize(const Shape& shape, const uint8_t* const* planes, int level, float unit,
                float* out) {
  int last = level;
  while (plane_bits(shape, last) == 0) --last;
  for (int64_t tile = 0; tile < num_tiles(shape); ++tile) {
    const uint8_t* at[kMaxLevels] = {};
    for (int l = 0; l <= level; ++l) at[l] = planes[l] + tile * tile_bytes(shape, l);
    for (int64_t super = 0; super < num_supers(shape); ++super) {
      const int64_t columns = std::min(kSuper, shape.columns - super * kSuper);
      const uint8_t* meta = at[0];
      at[0] += kMetaBytes;
      const uint8_t* pair = at[last];
      for (int64_t row = 0; row < std::min(kTileRows, shape.rows - tile * kTileRows); ++row) {
        uint16_t d, m;
        std::memcpy(&d, pair + 2 * row, 2);
        std::memcpy(&m, pair + 32 + 2 * row, 2);
        float* to = out + (tile * kTileRows + row) * shape.columns + super * kSuper;
        for (int64_t i = 0; i < columns; ++i) {
          const int64_t g = i / kGroup;
          int code = 0;
          for (int l = 0; l <= level; ++l) {
            const int bits = plane_bits(shape, l);
            if (bits == 0) continue;
            const auto quad = static_cast<int>(i % kGroup / 4), fields = 8 / bits;
            const uint8_t byte =
                at[l][kPairBytes + g * 64 * bits + quad / fields * 64 + row * 4 + i % 4];
            code = code << bits | ((byte >> (quad % fields * bits)) & ((1 << bits) - 1));
          }
          const double value =
              static_cast<double>(from_half(d)) * meta[g * 32 + row] * (code + 0.5) -
              static_cast<double>(from_half(m)) * meta[g * 32 + 16 + row];
          to[i] = static_cast<float>(value * unit);
        }
      }
      for (int l = 0; l <= level; ++l) {
        const int bits = plane_bits(shape, l);
        if (bits != 0) at[l] += kPairBytes + ceil_div(columns, kGroup) * 64 * bits;
      }
    }
  }
}

}  // namespace pyruntime::moe
