/* CUDA devices: what is there, and host memory they may read.
 *
 * Device code is a second library, libpyruntime_cuda.so beside this one, opened on first use; the
 * environment variable PYRUNTIME_CUDA_LIBRARY names another file. Every call that needs a device
 * gives PYRT_ENODEV where there is none, and the message says which of three it is: built without
 * CUDA, no (or too old a) driver, no device. CUDA's own failures are PYRT_ECUDA with its name, code
 * and text. The current device is the calling thread's, as set with CUDA or cupy (they share the
 * primary context).
 */
#ifndef PYRUNTIME_GPU_H
#define PYRUNTIME_GPU_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pyrt_gpu_info {
  uint32_t struct_size;
  int32_t num_devices;     /* at least 1 */
  int32_t driver_version;  /* newest CUDA the driver supports: 1000 * major + 10 * minor */
  int32_t runtime_version; /* CUDA this build was made with */
} pyrt_gpu_info;

/* PYRT_OK when there is a usable device; fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_gpu_get_info(pyrt_gpu_info* info) PYRT_NOEXCEPT;

/* Lets devices read and write [memory, memory + bytes), which is locked in place until it is
 * unregistered; asynchronous copies from and to it run at full speed. */
PYRT_API pyrt_status pyrt_gpu_register(void* memory, size_t bytes) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_gpu_unregister(void* memory) PYRT_NOEXCEPT;

/* Sets *reachable to 1 where devices can use the memory at `address` (device, managed, or
 * registered host memory), else to 0. */
PYRT_API pyrt_status pyrt_gpu_reachable(const void* address, int32_t* reachable) PYRT_NOEXCEPT;

/* Waits until everything on `stream` (a cudaStream_t; 0: the default stream) is done, and reports
 * what failed there. */
PYRT_API pyrt_status pyrt_gpu_synchronize(uintptr_t stream) PYRT_NOEXCEPT;

/* Where the KV blocks of a cache, or of a staging buffer, lie. Part p (K, V) of block b of layer l
 * starts at base + b * block_stride + l * layer_stride + p * part_stride, distances in bytes: a
 * cache [layers, 2, blocks, block bytes] and a buffer [blocks, layers, 2, block bytes] are both of
 * this kind. The device must be able to reach it: device memory, or registered host memory. */
typedef struct pyrt_kv_layout {
  uintptr_t base;
  uint64_t block_stride;
  uint64_t layer_stride;
  uint64_t part_stride;
  uint64_t num_blocks;
} pyrt_kv_layout;

/* Blocks from .. from + count - 1 go to blocks to .. to + count - 1; `start` is the sum of the
 * counts of the runs before this one. */
typedef struct pyrt_kv_run {
  uint32_t start;
  uint32_t from;
  uint32_t to;
  uint32_t count;
} pyrt_kv_run;

typedef struct pyrt_kv_device_copy {
  uint32_t struct_size;
  uint32_t num_layers;
  uint32_t num_parts; /* 2 for K and V */
  uint32_t reserved;
  pyrt_kv_layout from;
  pyrt_kv_layout to;
  uint64_t block_bytes; /* of one part of one block of one layer */
  uintptr_t runs;       /* pyrt_kv_run[num_runs], where the device can read it, 4-byte aligned */
  uint64_t num_runs;
  uint64_t num_blocks; /* the sum of the runs' counts, below 2^32 */
} pyrt_kv_device_copy;

/* Copies runs of KV blocks, all layers and parts, in one kernel on `stream` (a cudaStream_t; 0: the
 * default stream): out of a paged cache into a packed buffer, back, or within a cache. Blocks
 * outside a layout are left alone; targets must be distinct and not be sources. Asynchronous: the
 * memory, the runs included, must live until the stream has done it. Fastest where every address
 * and distance is a multiple of 16. PYRT_EINVAL names the field; PYRT_ENODEV; PYRT_ECUDA. */
PYRT_API pyrt_status pyrt_kv_copy_async(const pyrt_kv_device_copy* copy,
                                        uintptr_t stream) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
