#include "cuda/kv/kernels.cuh"
#include "kv/cuda.hpp"

PYRT_CUDA_EXPORT int pyrt_cuda_kv_copy(const pyrt_kv_device_copy* copy, void* stream) noexcept {
  return pyruntime::kv::copy_blocks(*copy, stream);
}
