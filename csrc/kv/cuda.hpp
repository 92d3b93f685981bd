// The KV blocks' launcher in libpyruntime_cuda.so; the arguments are checked by csrc/capi.
#pragma once

#include "pyruntime/gpu.h"

extern "C" {
int pyrt_cuda_kv_copy(const pyrt_kv_device_copy* copy, void* stream) noexcept;
}
