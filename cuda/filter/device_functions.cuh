// What a kernel of the caller's own does with a filter's table, one key and one thread at a time:
// the same words and answers as on the CPU. Shipped with the package, for nvcc and NVRTC
// (pyruntime.filter.raw_kernel_options); needs C++17 and libcu++'s <cuda/atomic>.
//
//   #include "cuda/filter/device_functions.cuh"
//   using namespace pyruntime;
//   extern "C" __global__ void lookup(filter::View view, const uint64_t* keys, size_t n, bool* out)
//   {
//     const size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x;
//     if (i < n) out[i] = filter::contains_u64<16, 8>(view, keys[i]);  // 16 bits, 8 slots
//   }
//
// Any number of threads and kernels may call anything of this on one table at once; a key that is
// in all the while is always found.
#pragma once

#include "cuda/include/atomic.cuh"
#include "filter/core.hpp"

namespace pyruntime::filter {

struct OnDevice {
  static constexpr bool kConcurrent = true;
  PYRT_HOST_DEVICE static uint64_t load(const uint64_t* word) {
    return dev::atomic_ref<uint64_t>(*const_cast<uint64_t*>(word)).load(dev::acquire);
  }
  PYRT_HOST_DEVICE static bool cas(uint64_t* word, uint64_t& expected, uint64_t desired) {
    return dev::atomic_ref<uint64_t>(*word).compare_exchange_strong(expected, desired, dev::acq_rel,
                                                                    dev::acquire);
  }
  PYRT_HOST_DEVICE static uint32_t epoch(const uint32_t* epoch) {
    return dev::atomic_ref<uint32_t>(*const_cast<uint32_t*>(epoch)).load(dev::acquire);
  }
  PYRT_HOST_DEVICE static void bump(uint32_t* epoch) {
    dev::atomic_ref<uint32_t>(*epoch).fetch_add(1, dev::acq_rel);
  }
  PYRT_HOST_DEVICE static void settle() {}  // the loads before are acquire loads
  PYRT_HOST_DEVICE static void at(Step) {}
  PYRT_HOST_DEVICE static void count(const View& view, Counter which, uint64_t n) {
    dev::atomic_ref<uint64_t>(view.counters[which]).fetch_add(n, dev::relaxed);
  }
  PYRT_HOST_DEVICE static void at_least(const View& view, Counter which, uint64_t n) {
    dev::atomic_ref<uint64_t> value(view.counters[which]);
    uint64_t seen = value.load(dev::relaxed);
    while (seen < n && !value.compare_exchange_weak(seen, n, dev::relaxed, dev::relaxed)) {
    }
  }
};

// Kernel arguments are made of it by numpy (pyruntime/filter/device.py).
static_assert(sizeof(View) == 56, "fields of View have moved");

// False is certain.
template <int W, int B>
PYRT_HOST_DEVICE inline bool contains_u64(const View& view, uint64_t key) {
  return contains<OnDevice, W, B>(view, locate<W>(view, key));
}

// Stores a key where there is room without relocating another; false if there is none.
template <int W, int B>
PYRT_HOST_DEVICE inline bool insert_u64(const View& view, uint64_t key) {
  const Position p = locate<W>(view, key);
  return insert_directly<OnDevice, W, B>(view, bucket_words<W, B>(view, p.segment, p.first),
                                         bucket_words<W, B>(view, p.segment, p.second),
                                         p.fingerprint);
}

// Takes one copy of a key out; false if there is none. Only for keys that are in.
template <int W, int B>
PYRT_HOST_DEVICE inline bool delete_u64(const View& view, uint64_t key) {
  return remove<OnDevice, W, B>(view, locate<W>(view, key));
}

}  // namespace pyruntime::filter
