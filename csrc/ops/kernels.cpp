#include "ops/kernels.hpp"

namespace pyruntime::ops {

const Kernels& kernels([[maybe_unused]] simd::Level level) noexcept {
#if defined(__x86_64__)
  if (level == simd::Level::avx512 || level == simd::Level::avx512_vnni) return kAvx512Kernels;
  if (level == simd::Level::avx2) return kAvx2Kernels;
#endif
  return kScalarKernels;
}

const Kernels& kernels() noexcept {
  static const Kernels& table = kernels(simd::level());
  return table;
}

}  // namespace pyruntime::ops
