#include <cmath>
#include <cstring>

#include "base/half.hpp"
#include "moe/kernels.hpp"

namespace pyruntime::moe {
namespace {

using base::from_half;

#include "moe/kernels.inc.hpp"

// Adds (total << bits) + sum of a group's codes times activations for each of the 16 rows.
void add_plane(const uint8_t* codes, int bits, const int8_t* a, int32_t* totals) {
  const int fields = 8 / bits;
  const int mask = (1 << bits) - 1;
  for (int row = 0; row < kTileRows; ++row) {
    int32_t sum = 0;
    for (int v = 0; v < 8 / fields; ++v) {
      const uint8_t* bytes = codes + v * 64 + row * 4;
      for (int f = 0; f < fields; ++f) {
        for (int j = 0; j < 4; ++j) {
          sum += ((bytes[j] >> (f * bits)) & mask) * a[(v * fields + f) * 4 + j];
        }
      }
    }
    totals[row] = totals[row] * (1 << bits) + sum;
  }
}

void tile(const Nested& w, int64_t index, const Row& x, float* out) {
  const uint8_t* at[kMaxLevels];
  for (int i = 0; i < w.planes; ++i) at[i] = w.data[i] + index * nested_tile_bytes(w, i);
  float p[kTileRows] = {}, r[kTileRows] = {};
  const int64_t groups = ceil_div(w.columns, kGroup);
  for (int64_t first = 0; first < groups; first += kSuperGroups) {
    const int64_t count = groups - first < kSuperGroups ? groups - first : kSuperGroups;
    const uint8_t* meta = at[0];
    at[0] += kMetaBytes;
    const uint8_t* pair = at[w.planes - 1];
    for (int i = 0; i < w.planes; ++i) at[i] += kPairBytes;
    float big_p[kTileRows] = {}, big_r[kTileRows] = {};
    for (int64_t g = 0; g < count; ++g) {
      int32_t totals[kTileRows] = {};
      for (int i = 0; i < w.planes; ++i) {
        add_plane(at[i], w.bits[i], x.codes + (first + g) * kGroup, totals);
        at[i] += 64 * w.bits[i];
      }
      const float t = x.scales[first + g], sum = x.sums[first + g];
      for (int row = 0; row < kTileRows; ++row) {
        const auto value = static_cast<float>(totals[row] * 64 + x.offsets[first + g]);
        const float scale = static_cast<float>(meta[g * 32 + row]) * t;
        big_p[row] = std::fma(value, scale, big_p[row]);
        big_r[row] = std::fma(static_cast<float>(meta[g * 32 + 16 + row]), sum, big_r[row]);
      }
    }
    for (int row = 0; row < kTileRows; ++row) {
      uint16_t d, m;
      std::memcpy(&d, pair + 2 * row, 2);
      std::memcpy(&m, pair + 32 + 2 * row, 2);
      p[row] = std::fma(from_half(d), big_p[row], p[row]);
      r[row] = std::fma(from_half(m), big_r[row], r[row]);
    }
  }
  const int64_t rows = w.rows - index * kTileRows;
  for (int64_t row = 0; row < (rows < kTileRows ? rows : kTileRows); ++row) {
    out[index * kTileRows + row] = (p[row] * (1.0f / 64) - r[row]) * w.unit;
  }
}

void tiles(const Nested& w, int64_t first, int64_t last, const Row* rows, int64_t n,
           float* const* outs) {
  for (int64_t index = first; index < last; ++index) {
    for (int64_t i = 0; i < n; ++i) tile(w, index, rows[i], outs[i]);
  }
}

}  // namespace

const Kernels kScalarKernels = {quantize, tiles, silu_mul};

}  // namespace pyruntime::moe
