// Pool objects between their scattered places and packed rows (`pyrt_pool_device_copy`).
#pragma once

#include "cuda/base/copy.cuh"
#include "pyruntime/pool.h"

namespace pyruntime::pool {

struct ObjectPlaces {
  pyrt_pool_device_copy copy;
  bool gather;

  __device__ bool locate(uint64_t row, const unsigned char** from, unsigned char** to) const {
    const uint32_t index = reinterpret_cast<const uint32_t*>(copy.indices)[row];
    if (index >= copy.num_objects) return false;
    auto* object = reinterpret_cast<unsigned char*>(copy.base) +
                   index / copy.per_unit * copy.unit_bytes + index % copy.per_unit * copy.stride;
    auto* packed = reinterpret_cast<unsigned char*>(copy.packed) + row * copy.packed_stride;
    *from = gather ? object : packed;
    *to = gather ? packed : object;
    return true;
  }
};

inline int copy_objects(const pyrt_pool_device_copy& copy, bool gather, void* stream) {
  return dev::copy_rows(
      ObjectPlaces{copy, gather}, copy.n, copy.object_bytes,
      copy.base | copy.stride | copy.unit_bytes | copy.packed | copy.packed_stride, stream);
}

}  // namespace pyruntime::pool
