// The launchers of cuda/base in libpyruntime_cuda.so: what every core needs of a device. All return
// a cudaError_t as int.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
// Compared by the loader: a library left over from another build is refused.
int pyrt_cuda_abi_version() noexcept;
const char* pyrt_cuda_error_name(int error) noexcept;
const char* pyrt_cuda_error_text(int error) noexcept;
// Versions as 1000 * major + 10 * minor; a driver version of 0 means no driver.
int pyrt_cuda_versions(int* driver, int* runtime) noexcept;
int pyrt_cuda_device_count(int* count) noexcept;
int pyrt_cuda_host_register(void* memory, size_t bytes) noexcept;
int pyrt_cuda_host_unregister(void* memory) noexcept;
int pyrt_cuda_reachable(const void* address, int* reachable) noexcept;
int pyrt_cuda_synchronize(void* stream) noexcept;
}
