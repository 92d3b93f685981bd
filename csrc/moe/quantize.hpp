// From float weights to nested planes.
//
// Per group of 32 columns an asymmetric 8-bit floor code over the group's range; scale and minimum
// are 8-bit multiples of a super-block's fp16 pair (d, m). A narrower width is the code's top bits,
// and for each width (d, m) are fitted again, by least squares over the super-block. Least squares
// shrinks weights towards zero; at low widths that loss of gain hurts a model more than the error
// it saves, so `gain` says how much of it to give back (0: none, 1: <w, w_b> = <w, w>).
//
// With `importance` (the mean square of each column's activation) all errors are weighted by it.
#pragma once

#include <cstdint>

#include "moe/layout.hpp"

namespace pyruntime::moe {

struct Quantizing {
  const float* importance;  // [columns], not negative; nullptr: all equal
  float gain[kMaxLevels];
  int32_t search;  // places tried for each end of a group's range, 2..16; 1: the whole range
};

struct Quantized {
  float unit;
  float error[kMaxLevels];  // sum of (weighted) squared errors per level
  float energy;
};

// planes[l] receives plane_bytes(shape, l) bytes. Throws PYRT_EINVAL naming the row and column of
// a weight that is not finite.
Quantized quantize(const float* weights, int64_t stride, const Shape& shape,
                   const Quantizing& options, uint8_t* const* planes);

// The weights at a level as float32 [rows, columns].
void dequantize(const Shape& shape, const uint8_t* const* planes, int level, float unit,
                float* out);

}  // namespace pyruntime::moe
