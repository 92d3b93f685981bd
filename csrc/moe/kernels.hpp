// Inner loops on nested planes, one table per instruction set, all giving the same bits.
//
// Activations are int8 in groups of 32 with a float scale t each; S is a group's sum. For a row of
// weights, with sc and mn the scales and mins of its group and u_b its codes cut to the width:
//
//   P += float(64 * sum(u_b a) + 32 S) * (sc * t)     R += mn * (t * S)       per group
//   p += d_b * P                                       r += m_b * R            per super-block
//   y  = (p / 64 - r) * unit                                                   at the end
//
// The integer part is exact (below 2^27 and with at most 24 significant bits), each += is one fused
// multiply-add, and the order is fixed; so the number of tokens in a call, the instruction set and
// the way codes are unpacked change no bit. A prefill and a decode of a token are equal.
//
// Unpacking costs one AND per field and no shift: field f of a byte carries a factor 2^(f * bits)
// through the dot product, and the fields' sums are put together by shifts once per group.
#pragma once

#include <cstdint>

#include "moe/layout.hpp"
#include "simd/level.hpp"

namespace pyruntime::moe {

// A matrix at one of its widths.
struct Nested {
  int64_t rows;
  int64_t columns;
  int32_t planes;  // 1..kMaxLevels
  int32_t bits[kMaxLevels];
  const uint8_t* data[kMaxLevels];
  float unit;
};

// `planes[l]` is the matrix's data of level l, for levels 0..level; levels without bits are
// skipped.
inline Nested nested(const Shape& shape, const uint8_t* const* planes, int level, float unit) {
  Nested w{shape.rows, shape.columns, 0, {}, {}, unit};
  for (int l = 0; l <= level; ++l) {
    if (plane_bits(shape, l) == 0) continue;
    w.bits[w.planes] = plane_bits(shape, l);
    w.data[w.planes++] = planes[l];
  }
  return w;
}

// One quantized row of activations; groups past the row's end are zero up to a whole group.
struct Row {
  const int8_t* codes;     // [groups * 32], -127..127
  const float* scales;     // [groups]: t
  const float* sums;       // [groups]: t * S
  const int32_t* offsets;  // [groups]: 32 * S
};

// Bytes of a quantized row, and its parts in them. `at` is 64-byte aligned.
constexpr int64_t row_bytes(int64_t columns) {
  return (ceil_div(columns, kGroup) * 44 + 63) / 64 * 64;
}
inline Row row_at(uint8_t* at, int64_t columns) {
  const int64_t groups = ceil_div(columns, kGroup);
  return {reinterpret_cast<int8_t*>(at), reinterpret_cast<float*>(at + groups * 32),
          reinterpret_cast<float*>(at + groups * 36), reinterpret_cast<int32_t*>(at + groups * 40)};
}

struct Kernels {
  // Quantizes x[columns] into the row at `to`. A value that is not finite makes its group's scale
  // NaN, so that it shows in every result.
  void (*quantize)(const float* x, int64_t columns, uint8_t* to);
  // outs[i][first * 16 ...] = rows[i] . w^T for the tiles [first, last).
  void (*tiles)(const Nested& w, int64_t first, int64_t last, const Row* rows, int64_t n,
                float* const* outs);
  // gate[i] = silu(gate[i]) * up[i]
  void (*silu_mul)(float* gate, const float* up, int64_t count);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
#endif

// Instruction sets by name, best first, that this CPU runs: "avx512_vnni", "avx_vnni", "avx2",
// "scalar". nullptr for a name it does not.
const Kernels* kernels(const char* name) noexcept;
// The table in use, and its name.
const Kernels& kernels() noexcept;
const char* kernels_name() noexcept;

}  // namespace pyruntime::moe
