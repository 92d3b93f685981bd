// The 512-bit instructions of the expert kernels, and AVX-VNNI's one, in plain C++: the kernels'
// own source compiles over them, so that its logic is tested on a CPU that has neither.
// Include after <immintrin.h>; the names are macros from then on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/half.hpp"

namespace emulated {

template <class T>
struct Vector512 {
  T lane[64 / sizeof(T)];
};
using Ints = Vector512<int32_t>;
using Floats = Vector512<float>;

template <class To, class From>
Vector512<To> cast(const Vector512<From>& v) {
  Vector512<To> out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}
template <class T, class Body>
Ints each(const Ints& a, Body body) {
  auto v = cast<T>(a);
  for (T& x : v.lane) x = static_cast<T>(body(x));
  return cast<int32_t>(v);
}
template <class Body>
Floats zip(const Floats& a, const Floats& b, Body body) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.lane[i] = body(a.lane[i], b.lane[i]);
  return out;
}
template <class Body>
Ints zip(const Ints& a, const Ints& b, Body body) {
  Ints out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<int32_t>(body(a.lane[i], b.lane[i]));
  return out;
}

inline Ints load(const void* at) {
  Ints out;
  std::memcpy(&out, at, 64);
  return out;
}
inline Ints set32(int32_t value) {
  Ints out;
  for (int32_t& x : out.lane) x = value;
  return out;
}
inline Ints set8(char value) {
  Ints out;
  std::memset(&out, value, 64);
  return out;
}
inline Floats setf(float value) {
  Floats out;
  for (float& x : out.lane) x = value;
  return out;
}
inline Floats to_float(const Ints& a) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<float>(a.lane[i]);
  return out;
}
inline Ints widen(__m128i bytes) {
  uint8_t raw[16];
  std::memcpy(raw, &bytes, 16);
  Ints out;
  for (int i = 0; i < 16; ++i) out.lane[i] = raw[i];
  return out;
}
inline Floats from_halves(const uint8_t* at) {
  Floats out;
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    std::memcpy(&half, at + 2 * i, 2);
    out.lane[i] = pyruntime::base::from_half(half);
  }
  return out;
}
inline Ints dot(const Ints& sum, const Ints& u, const Ints& s) {
  Ints out = sum;
  const auto a = cast<uint8_t>(u);
  const auto b = cast<int8_t>(s);
  for (int i = 0; i < 64; ++i) out.lane[i / 4] += a.lane[i] * b.lane[i];
  return out;
}
inline Floats fused(const Floats& a, const Floats& b, const Floats& c) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return out;
}
inline void store_masked(float* to, unsigned mask, const Floats& v) {
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) to[i] = v.lane[i];
  }
}
inline Ints add(const Ints& a, const Ints& b) {
  return zip(a, b, [](int64_t x, int64_t y) { return x + y; });
}
inline Ints left32(const Ints& a, int count) {
  return each<uint32_t>(a, [=](uint32_t x) { return x << count; });
}
inline Ints left16(const Ints& a, int count) {
  return each<uint16_t>(a, [=](uint16_t x) { return x << count; });
}
inline Ints right16(const Ints& a, int count) {
  return each<uint16_t>(a, [=](uint16_t x) { return x >> count; });
}
inline int count_of(__m128i v) {
  int count;
  std::memcpy(&count, &v, 4);
  return count;
}

}  // namespace emulated

#define __m512i emulated::Ints
#define __m512 emulated::Floats
#define _mm512_set1_epi32 emulated::set32
#define _mm512_set1_epi8 emulated::set8
#define _mm512_set1_ps emulated::setf
#define _mm512_setzero_si512() emulated::set32(0)
#define _mm512_setzero_ps() emulated::setf(0)
#define _mm512_loadu_si512(at) emulated::load(at)
#define _mm512_cvtepi32_ps emulated::to_float
#define _mm512_cvtepu8_epi32 emulated::widen
#define _mm512_mul_ps(a, b) emulated::zip(a, b, [](float x, float y) { return x * y; })
#define _mm512_sub_ps(a, b) emulated::zip(a, b, [](float x, float y) { return x - y; })
#define _mm512_and_si512(a, b) emulated::zip(a, b, [](int32_t x, int32_t y) { return x & y; })
#define _mm512_or_si512(a, b) emulated::zip(a, b, [](int32_t x, int32_t y) { return x | y; })
#define _mm512_mask_storeu_ps emulated::store_masked
#define _mm512_dpbusd_epi32 emulated::dot
#define _mm512_add_epi32 emulated::add
#define _mm512_slli_epi32 emulated::left32
#define _mm512_sll_epi32(a, n) emulated::left32(a, emulated::count_of(n))
#define _mm512_sll_epi16(a, n) emulated::left16(a, emulated::count_of(n))
#define _mm512_srl_epi16(a, n) emulated::right16(a, emulated::count_of(n))
#define _mm512_fmadd_ps emulated::fused
