#include "base/cuda.hpp"
#include "cuda/include/device.cuh"
#include "pyruntime/abi.h"

PYRT_CUDA_EXPORT int pyrt_cuda_abi_version() noexcept { return PYRT_ABI_VERSION; }

#if defined(__CUDACC__)

PYRT_CUDA_EXPORT const char* pyrt_cuda_error_name(int error) noexcept {
  return cudaGetErrorName(static_cast<cudaError_t>(error));
}

PYRT_CUDA_EXPORT const char* pyrt_cuda_error_text(int error) noexcept {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

PYRT_CUDA_EXPORT int pyrt_cuda_versions(int* driver, int* runtime) noexcept {
  const cudaError_t error = cudaDriverGetVersion(driver);
  return error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime);
}

PYRT_CUDA_EXPORT int pyrt_cuda_device_count(int* count) noexcept {
  const cudaError_t error = cudaGetDeviceCount(count);
  cudaGetLastError();  // a missing device must not show up in the next launch
  return error;
}

PYRT_CUDA_EXPORT int pyrt_cuda_host_register(void* memory, size_t bytes) noexcept {
  const cudaError_t error =
      cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  cudaGetLastError();
  return error;
}

PYRT_CUDA_EXPORT int pyrt_cuda_host_unregister(void* memory) noexcept {
  const cudaError_t error = cudaHostUnregister(memory);
  cudaGetLastError();
  return error;
}

PYRT_CUDA_EXPORT int pyrt_cuda_reachable(const void* address, int* reachable) noexcept {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, address);
  // At its own address, that is: kernels are given no other.
  *reachable = error == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered &&
               attributes.devicePointer == address;
  cudaGetLastError();
  return error;
}

PYRT_CUDA_EXPORT int pyrt_cuda_synchronize(void* stream) noexcept {
  return cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
}

#else  // the shim: one device, whose memory is the host's

PYRT_CUDA_EXPORT const char* pyrt_cuda_error_name(int) noexcept { return "cudaErrorShim"; }
PYRT_CUDA_EXPORT const char* pyrt_cuda_error_text(int) noexcept { return "refused by the shim"; }

PYRT_CUDA_EXPORT int pyrt_cuda_versions(int* driver, int* runtime) noexcept {
  *driver = *runtime = 0;
  return 0;
}

PYRT_CUDA_EXPORT int pyrt_cuda_device_count(int* count) noexcept {
  *count = 1;
  return 0;
}

PYRT_CUDA_EXPORT int pyrt_cuda_host_register(void*, size_t) noexcept { return 0; }
PYRT_CUDA_EXPORT int pyrt_cuda_host_unregister(void*) noexcept { return 0; }
PYRT_CUDA_EXPORT int pyrt_cuda_reachable(const void*, int* reachable) noexcept {
  *reachable = 1;
  return 0;
}
PYRT_CUDA_EXPORT int pyrt_cuda_synchronize(void*) noexcept { return 0; }

#endif
