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

/* Waits until everything on `stream` (a cudaStream_t; 0: the default stream) is done, and reports
 * what failed there. */
PYRT_API pyrt_status pyrt_gpu_synchronize(uintptr_t stream) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
