#if defined(__x86_64__)
#include <immintrin.h>

#include "moe/kernels.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif

namespace pyruntime::moe {
namespace {
#include "moe/kernels.inc.hpp"
//
#include "moe/kernels_avx2.inc.hpp"

//
#include "moe/kernels_avxvnni.inc.hpp"
}  // namespace

const Kernels kAvxVnniKernels = {quantize, tiles, silu_mul};

}  // namespace pyruntime::moe

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
