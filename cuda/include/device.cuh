// What device code is written against. The same source is compiled twice: by nvcc for a GPU, and by
// g++ with shim/cuda_host.hpp, which runs it on CPU threads under sanitizers.
//
// The contract of a kernel room (one per core; nothing else needs an edit to add one)
//   cuda/<core>/kernels.cuh   device code, in namespace pyruntime::<core>; includes this header
//   cuda/<core>/<core>.cu     launchers with C linkage (below), collected into libpyruntime_cuda.so
//   cuda/tests/test_<core>_kernels.cpp   GoogleTest; g++ and the shim in every tree, nvcc for a GPU
//   cuda/tests/planted_<core>.cpp        optional: faults the sanitizers must find (planted.hpp)
//   csrc/<core>/cuda.hpp      declares the launchers for csrc/capi and the .cu alike
// Paths in includes start at the repository's root for cuda/ ("cuda/include/device.cuh") and at
// csrc/ for what both sides share ("pool/cuda.hpp", "base/hash.hpp"): such a header has no standard
// containers and no exceptions, and marks functions PYRT_HOST_DEVICE.
//
// A launcher: extern "C" int pyrt_cuda_<core>_<verb>(..., void* stream) noexcept. It computes the
// grid, launches asynchronously and returns a cudaError_t as int (0 is success); it neither
// allocates nor synchronises, and its arguments were checked by csrc/capi, which calls it as
// PYRT_CUDA_CALL(pyrt_cuda_<core>_<verb>, ..., stream). Pointers may be device memory or registered
// host memory: never dereference them in the launcher.
//
// What device code may use
//   - __global__ __device__ __host__ __forceinline__ __launch_bounds__ __restrict__ __shared__;
//     threadIdx blockIdx blockDim gridDim (three dimensions), warpSize; dim3, uint2, uint4.
//   - from "cuda/include/atomic.cuh" (which costs nvcc five seconds): dev::atomic_ref<T> (device
//     scope), dev::block_atomic_ref<T>, with dev::relaxed, dev::acquire, dev::release,
//     dev::acq_rel, dev::seq_cst. Or, without it, atomicAdd/Sub/Min/Max/And/Or/Xor/Exch/CAS, which
//     are relaxed. No __threadfence: ThreadSanitizer cannot see fences, so publish through an
//     atomic with release and acquire.
//   - __syncthreads, __syncthreads_count/_and/_or; __syncwarp, __shfl[_up|_down|_xor]_sync,
//     __ballot_sync, __any_sync, __all_sync, __match_any_sync, __reduce_*_sync. A shuffle or vote
//     orders no memory; __syncwarp and __syncthreads do. No __activemask: masks are explicit.
//   - __popc[ll] __clz[ll] __ffs[ll] __brev[ll] __umulhi __umul64hi __ldg __trap; dev::min,
//     dev::max; <cmath> in float.
//   - PYRT_DYNAMIC_SHARED(type, name) for shared memory sized at launch, at most 48 KiB. In the
//     shim it is a heap block of the exact size, so AddressSanitizer sees an index out of it; it
//     does not see one out of a __shared__ array.
//   - dev::pause() in every loop that waits for another thread: the shim's threads do not preempt.
//     Blocks may only wait for blocks that have started, as on a GPU.
//   - Anything else (inline PTX, cp.async, tensor cores, cache hints) sits in a small leaf function
//     under #if defined(__CUDA_ARCH__) with a plain C++ twin; a GPU test compares the two.
//
// PYRT_LAUNCH(kernel, grid, block, stream, args...) and PYRT_LAUNCH_SHARED with the bytes of
// dynamic shared memory before the stream are expressions giving a cudaError_t as int. A kernel
// with commas in its template arguments goes in parentheses. In the shim a launch returns when the
// grid is done.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no headers but CUDA's, and those of the run time built in
#include <cuda/std/cstddef>
#include <cuda/std/cstdint>
#else
#include <cstddef>
#include <cstdint>
#endif

#if defined(__CUDACC__)
#if !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#define PYRT_HOST_DEVICE __host__ __device__
#else
#include "cuda/shim/cuda_host.hpp"
#define PYRT_HOST_DEVICE
#endif

// Launchers are what libpyruntime_cuda.so exports; everything else in it is hidden.
#define PYRT_CUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace pyruntime::dev {

#if defined(__CUDACC__)

#if !defined(__CUDACC_RTC__)
using Stream = cudaStream_t;
#endif

__device__ inline void pause() {
#if defined(__CUDA_ARCH__)
  __nanosleep(64);
#endif
}

// The outer parentheses keep the commas together where a launch is an argument of another macro.
#define PYRT_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...)               \
  ([&] {                                                                                 \
    const auto pyrt_kernel = kernel;                                                     \
    pyrt_kernel<<<(grid), (block), (shared_bytes),                                       \
                  static_cast<cudaStream_t>(static_cast<void*>(stream))>>>(__VA_ARGS__); \
    return static_cast<int>(cudaGetLastError());                                         \
  }())
#define PYRT_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char pyrt_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(pyrt_dynamic_shared)

#else

using Stream = void*;

inline void pause() { shim::yield(); }

#define PYRT_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  ::pyruntime::shim::launch_kernel(kernel, grid, block, shared_bytes,      \
                                   stream __VA_OPT__(, ) __VA_ARGS__)
#define PYRT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::pyruntime::shim::dynamic_shared())

#endif

#define PYRT_LAUNCH(kernel, grid, block, stream, ...) \
  PYRT_LAUNCH_SHARED(kernel, grid, block, 0, stream __VA_OPT__(, ) __VA_ARGS__)

template <class T>
PYRT_HOST_DEVICE constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
PYRT_HOST_DEVICE constexpr T max(T a, T b) {
  return a < b ? b : a;
}

}  // namespace pyruntime::dev
