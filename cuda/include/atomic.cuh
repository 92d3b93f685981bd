// Atomics with memory orders for device code; the contract is on top of device.cuh.
#pragma once

#include "cuda/include/device.cuh"

#if defined(__CUDACC__)
#include <cuda/atomic>
#else
#include <atomic>
#endif

namespace pyruntime::dev {

#if defined(__CUDACC__)

template <class T>
using atomic_ref = ::cuda::atomic_ref<T, ::cuda::thread_scope_device>;
template <class T>
using block_atomic_ref = ::cuda::atomic_ref<T, ::cuda::thread_scope_block>;

inline constexpr auto relaxed = ::cuda::std::memory_order_relaxed;
inline constexpr auto acquire = ::cuda::std::memory_order_acquire;
inline constexpr auto release = ::cuda::std::memory_order_release;
inline constexpr auto acq_rel = ::cuda::std::memory_order_acq_rel;
inline constexpr auto seq_cst = ::cuda::std::memory_order_seq_cst;

#else

template <class T>
using atomic_ref = std::atomic_ref<T>;
template <class T>
using block_atomic_ref = std::atomic_ref<T>;

inline constexpr auto relaxed = std::memory_order_relaxed;
inline constexpr auto acquire = std::memory_order_acquire;
inline constexpr auto release = std::memory_order_release;
inline constexpr auto acq_rel = std::memory_order_acq_rel;
inline constexpr auto seq_cst = std::memory_order_seq_cst;

#endif

}  // namespace pyruntime::dev
