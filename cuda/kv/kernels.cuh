// KV blocks between two layouts (`pyrt_kv_device_copy`): a row is one part of one block of one
// layer.
#pragma once

#include "cuda/base/copy.cuh"
#include "pyruntime/gpu.h"

namespace pyruntime::kv {

struct BlockPlaces {
  pyrt_kv_device_copy copy;

  // The run that holds the i-th block of the copy: the last one that starts at or before it.
  __device__ const pyrt_kv_run& run_of(uint64_t i) const {
    const auto* runs = reinterpret_cast<const pyrt_kv_run*>(copy.runs);
    uint64_t low = 0, high = copy.num_runs;
    while (high - low > 1) {
      const uint64_t middle = (low + high) / 2;
      if (runs[middle].start <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return runs[low];
  }

  __device__ static unsigned char* at(const pyrt_kv_layout& layout, uint64_t block, uint64_t layer,
                                      uint64_t part) {
    return reinterpret_cast<unsigned char*>(layout.base) + block * layout.block_stride +
           layer * layout.layer_stride + part * layout.part_stride;
  }

  __device__ bool locate(uint64_t row, const unsigned char** from, unsigned char** to) const {
    const uint64_t part = row % copy.num_parts;
    const uint64_t layer = row / copy.num_parts % copy.num_layers;
    const uint64_t i = row / copy.num_parts / copy.num_layers;
    const pyrt_kv_run& run = run_of(i);
    const uint64_t within = i - run.start;
    const uint64_t source = run.from + within, target = run.to + within;
    if (within >= run.count || source >= copy.from.num_blocks || target >= copy.to.num_blocks) {
      return false;
    }
    *from = at(copy.from, source, layer, part);
    *to = at(copy.to, target, layer, part);
    return true;
  }
};

inline int copy_blocks(const pyrt_kv_device_copy& copy, void* stream) {
  uint64_t alignment = 0;
  for (const pyrt_kv_layout& side : {copy.from, copy.to}) {
    alignment |= side.base | side.block_stride | side.layer_stride | side.part_stride;
  }
  return dev::copy_rows(BlockPlaces{copy}, copy.num_blocks * copy.num_layers * copy.num_parts,
                        copy.block_bytes, alignment, stream);
}

}  // namespace pyruntime::kv
