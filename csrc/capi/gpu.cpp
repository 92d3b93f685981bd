#include "pyruntime/gpu.h"

#include <algorithm>
#include <cstring>

#include "base/cuda.hpp"
#include "capi/cuda_loader.hpp"
#include "capi/error.hpp"

using namespace pyruntime;

extern "C" {

pyrt_status pyrt_gpu_get_info(pyrt_gpu_info* info) noexcept {
  return capi::guard([&] {
    capi::require(info, "info");
    pyrt_gpu_info full{info->struct_size, 0, 0, 0};
    PYRT_CUDA_CALL(pyrt_cuda_device_count, &full.num_devices);
    PYRT_CUDA_CALL(pyrt_cuda_versions, &full.driver_version, &full.runtime_version);
    std::memcpy(info, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_gpu_register(void* memory, size_t bytes) noexcept {
  return capi::guard([&] {
    capi::require(memory, "memory");
    if (bytes == 0) fail(PYRT_EINVAL, "bytes is 0; it must be at least 1");
    PYRT_CUDA_CALL(pyrt_cuda_host_register, memory, bytes);
  });
}

pyrt_status pyrt_gpu_unregister(void* memory) noexcept {
  return capi::guard([&] {
    capi::require(memory, "memory");
    PYRT_CUDA_CALL(pyrt_cuda_host_unregister, memory);
  });
}

pyrt_status pyrt_gpu_reachable(const void* address, int32_t* reachable) noexcept {
  return capi::guard([&] {
    capi::require(address, "address");
    capi::require(reachable, "reachable");
    int answer = 0;
    PYRT_CUDA_CALL(pyrt_cuda_reachable, address, &answer);
    *reachable = answer;
  });
}

pyrt_status pyrt_gpu_synchronize(uintptr_t stream) noexcept {
  return capi::guard(
      [&] { PYRT_CUDA_CALL(pyrt_cuda_synchronize, reinterpret_cast<void*>(stream)); });
}

}  // extern "C"
