// IEEE binary16 by integer arithmetic: the same bits everywhere.
#pragma once

#include <bit>
#include <cstdint>

namespace pyruntime::base {

// Round to nearest even; what is too large becomes the largest finite half (saturating), NaN stays.
inline uint16_t to_half(float value) noexcept {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7bff);
  if (magnitude < 0x38800000) {  // subnormal: let float addition do the rounding
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline float from_half(uint16_t half) noexcept {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude < 0x400) {
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
  }
  const uint32_t special = magnitude >= 0x7c00 ? 0x38000000 : 0;  // infinity, NaN
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000 + special));
}

}  // namespace pyruntime::base
