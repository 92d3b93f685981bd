#include "cuda/pool/kernels.cuh"
#include "pool/cuda.hpp"

using namespace pyruntime;

PYRT_CUDA_EXPORT int pyrt_cuda_pool_gather(const pyrt_pool_device_copy* copy,
                                           void* stream) noexcept {
  return pool::copy_objects(*copy, true, stream);
}

PYRT_CUDA_EXPORT int pyrt_cuda_pool_scatter(const pyrt_pool_device_copy* copy,
                                            void* stream) noexcept {
  return pool::copy_objects(*copy, false, stream);
}
