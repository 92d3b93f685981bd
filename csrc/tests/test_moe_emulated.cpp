// The AVX-512 and AVX-VNNI kernels' source over emulated instructions, against the scalar kernels.
#include <gtest/gtest.h>

#include "moe/kernels.hpp"
#include "tests/support/nested.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "tests/support/emulated.hpp"

namespace pyruntime::moe {
namespace avx512 {
namespace {
#include "moe/kernels.inc.hpp"

inline __m512 halves_to_float(const uint8_t* at) { return emulated::from_halves(at); }
//
#include "moe/kernels_avx512.inc.hpp"
}  // namespace

const Kernels kTable = {quantize, tiles, silu_mul};

}  // namespace avx512
}  // namespace pyruntime::moe

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace pyruntime::moe {
namespace avx_vnni {
namespace {

__m256i emulated_dot(__m256i sum, __m256i codes, __m256i a) {
  uint8_t u[32];
  int8_t s[32];
  int32_t out[8];
  std::memcpy(u, &codes, 32);
  std::memcpy(s, &a, 32);
  std::memcpy(out, &sum, 32);
  for (int i = 0; i < 32; ++i) out[i / 4] += u[i] * s[i];
  std::memcpy(&sum, out, 32);
  return sum;
}
#define _mm256_dpbusd_avx_epi32 emulated_dot
#include "moe/kernels.inc.hpp"
//
#include "moe/kernels_avx2.inc.hpp"
//
#include "moe/kernels_avxvnni.inc.hpp"
}  // namespace

const Kernels kTable = {quantize, tiles, silu_mul};

}  // namespace avx_vnni
}  // namespace pyruntime::moe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pyruntime::moe {
namespace {

void expect_equal_to_scalar(const Kernels& kernel) {
  for (const Shape& shape : kShapes) {
    const NestedCase m(shape, 31);
    std::vector<float> x = normal(21 * shape.columns, 32, 3.0f);
    for (int64_t k = 0; k < shape.columns; ++k) {
      x[static_cast<size_t>(k)] = k % 2 == 0 ? 5.0f : -5.0f;
    }
    const Coded coded(x, 21, shape.columns, kScalarKernels);
    for (int level = 0; level < shape.levels; ++level) {
      const std::vector<float> want = multiply(kScalarKernels, m.at(level), coded);
      for (const int64_t n : {1, 2, 3, 5, 7, 8, 11, 21}) {
        Coded some = coded;
        some.rows = std::vector<Row>(coded.rows.begin(), coded.rows.begin() + n);
        const std::vector<float> got = multiply(kernel, m.at(level), some);
        for (size_t i = 0; i < got.size(); ++i) ASSERT_EQ(got[i], want[i]) << level << " " << n;
      }
    }
  }
}

TEST(MoeEmulated, Avx512Vnni) { expect_equal_to_scalar(avx512::kTable); }

TEST(MoeEmulated, AvxVnni) {
  if (kernels("avx2") == nullptr) GTEST_SKIP() << "this CPU has no avx2";
  expect_equal_to_scalar(avx_vnni::kTable);
}

}  // namespace
}  // namespace pyruntime::moe
#endif
