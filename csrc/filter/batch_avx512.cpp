// The same as AVX2, with what the compiler makes of hashing at this level.
#if defined(__x86_64__)

#include <immintrin.h>

#include "filter/batch.hpp"
#include "filter/evict.hpp"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt")

namespace pyruntime::filter {

namespace avx512 {

#include "filter/pair_vector.inc.hpp"

// Calls what the one above defines.
#include "filter/batch.inc.hpp"

}  // namespace avx512

extern constinit const LevelKernels kAvx512Kernels = avx512::make_level();

}  // namespace pyruntime::filter

#pragma GCC pop_options
#endif
