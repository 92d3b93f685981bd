#if defined(__x86_64__)
#include <immintrin.h>

#include "ops/kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace pyruntime::ops {
namespace {
#include "ops/vec_avx512.hpp"
//
#include "ops/kernels.inc.hpp"
}  // namespace

const Kernels kAvx512Kernels = kTable;

}  // namespace pyruntime::ops

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
