// The pool's launchers in libpyruntime_cuda.so; the arguments are checked by csrc/capi.
#pragma once

#include "pyruntime/pool.h"

extern "C" {
int pyrt_cuda_pool_gather(const pyrt_pool_device_copy* copy, void* stream) noexcept;
int pyrt_cuda_pool_scatter(const pyrt_pool_device_copy* copy, void* stream) noexcept;
}
