#include "base/crc32c.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace pyruntime::base {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;

using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables t{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kPolynomial : 0);
    t[0][i] = crc;
  }
  for (uint32_t i = 0; i < 256; ++i) {
    for (size_t k = 1; k < 8; ++k) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xff];
  }
  return t;
}

constexpr Tables kTables = make_tables();

#if defined(__x86_64__)
constexpr size_t kStream = 4096;  // bytes of each of the three streams

// shift[k][b]: the CRC register after kStream zero bytes, for byte k of the register being b.
using Shift = std::array<std::array<uint32_t, 256>, 4>;

Shift make_shift() {
  Shift s{};
  for (uint32_t k = 0; k < 4; ++k) {
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t crc = b << (8 * k);
      for (size_t i = 0; i < kStream; ++i) crc = (crc >> 8) ^ kTables[0][crc & 0xff];
      s[k][b] = crc;
    }
  }
  return s;
}

uint32_t shifted(const Shift& s, uint32_t crc) {
  return s[0][crc & 0xff] ^ s[1][(crc >> 8) & 0xff] ^ s[2][(crc >> 16) & 0xff] ^ s[3][crc >> 24];
}

__attribute__((target("sse4.2"))) uint32_t crc32c_sse(const uint8_t* p, size_t size, uint32_t crc) {
  static const Shift shift = make_shift();
  const auto word = [](const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, 8);
    return value;
  };
  uint64_t a = ~crc;
  // The instruction has a latency of three cycles and a throughput of one: three streams.
  for (; size >= 3 * kStream; p += 3 * kStream, size -= 3 * kStream) {
    uint64_t b = 0, c = 0;
    for (size_t i = 0; i < kStream; i += 8) {
      a = _mm_crc32_u64(a, word(p + i));
      b = _mm_crc32_u64(b, word(p + kStream + i));
      c = _mm_crc32_u64(c, word(p + 2 * kStream + i));
    }
    a = shifted(shift, static_cast<uint32_t>(a)) ^ b;
    a = shifted(shift, static_cast<uint32_t>(a)) ^ c;
  }
  for (; size >= 8; p += 8, size -= 8) a = _mm_crc32_u64(a, word(p));
  auto last = static_cast<uint32_t>(a);
  for (; size > 0; ++p, --size) last = _mm_crc32_u8(last, *p);
  return ~last;
}
#endif

}  // namespace

uint32_t crc32c_tables(const void* data, size_t size, uint32_t crc) noexcept {
  const auto* p = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (; size >= 8; p += 8, size -= 8) {
    const uint32_t low =
        crc ^ (uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24);
    crc = kTables[7][low & 0xff] ^ kTables[6][(low >> 8) & 0xff] ^ kTables[5][(low >> 16) & 0xff] ^
          kTables[4][low >> 24] ^ kTables[3][p[4]] ^ kTables[2][p[5]] ^ kTables[1][p[6]] ^
          kTables[0][p[7]];
  }
  for (; size > 0; ++p, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xff];
  return ~crc;
}

uint32_t crc32c(const void* data, size_t size, uint32_t crc) noexcept {
#if defined(__x86_64__)
  static const bool sse = __builtin_cpu_supports("sse4.2") != 0;
  if (sse) return crc32c_sse(static_cast<const uint8_t*>(data), size, crc);
#endif
  return crc32c_tables(data, size, crc);
}

}  // namespace pyruntime::base
