// Calls into libpyruntime_cuda.so, which is opened when the first of them is made.
//
//   PYRT_CUDA_CALL(pyrt_cuda_pool_gather, &copy, stream);
//
// with the launcher declared in the core's cuda.hpp. Throws PYRT_ENODEV (with which of three: built
// without CUDA, no driver, no device) or PYRT_ECUDA with CUDA's name, code and text.
#pragma once

namespace pyruntime::capi {

// Address of a launcher, once a device is known to be usable.
void* cuda_symbol(const char* name);

// Throws PYRT_ECUDA unless `error` is 0.
void cuda_check(const char* launcher, int error);

}  // namespace pyruntime::capi

#define PYRT_CUDA_CALL(launcher, ...)                                                              \
  ::pyruntime::capi::cuda_check(                                                                   \
      #launcher, reinterpret_cast<decltype(&launcher)>(::pyruntime::capi::cuda_symbol(#launcher))( \
                     __VA_ARGS__))
