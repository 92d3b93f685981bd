#if defined(__x86_64__)
#include <immintrin.h>

#include "moe/kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif

namespace pyruntime::moe {
namespace {
#include "moe/kernels.inc.hpp"

inline __m512 halves_to_float(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
//
#include "moe/kernels_avx512.inc.hpp"
}  // namespace

const Kernels kAvx512VnniKernels = {quantize, tiles, silu_mul};

}  // namespace pyruntime::moe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
