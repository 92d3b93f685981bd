// Vectors of a bucket or two.
#if defined(__x86_64__)

#include <immintrin.h>

#include "filter/batch.hpp"
#include "filter/evict.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")

namespace pyruntime::filter {

namespace avx2 {

#include "filter/pair_vector.inc.hpp"

// Calls what the one above defines. No vector is handed to a function that is not inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
#define PYRT_FILTER_LOCATE_AVX2
#include "filter/batch.inc.hpp"
#undef PYRT_FILTER_LOCATE_AVX2
#pragma GCC diagnostic pop

}  // namespace avx2

extern constinit const LevelKernels kAvx2Kernels = avx2::make_level();

}  // namespace pyruntime::filter

#pragma GCC pop_options
#endif
