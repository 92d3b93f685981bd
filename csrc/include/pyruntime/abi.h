/* pyruntime C ABI: what every core's header shares.
 *
 * Conventions of the whole ABI
 *   - A function that can fail returns pyrt_status: PYRT_OK (0) or a negative code. Results come
 *     back through out-pointers, which are written only on success.
 *   - The text of the calling thread's most recent failure is pyrt_last_error(); it stays valid
 *     until that thread's next failing call.
 *   - A failed call leaves the state as it was before it.
 *   - Option structs start with `uint32_t struct_size`, set by their pyrt_*_init function, so that
 *     they can grow: a library reads no field beyond the caller's struct_size.
 *   - Handles are opaque. NULL where a handle is asked for gives PYRT_EINVAL; destroy functions
 *     accept NULL and do nothing.
 *   - No C++ exception ever crosses this border.
 */
#ifndef PYRUNTIME_ABI_H
#define PYRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

#if defined(PYRT_BUILDING)
#define PYRT_API __attribute__((visibility("default")))
#else
#define PYRT_API
#endif

#ifdef __cplusplus
#define PYRT_NOEXCEPT noexcept
extern "C" {
#else
#define PYRT_NOEXCEPT
#endif

/* Raised when a released function or struct changes incompatibly. */
#define PYRT_ABI_VERSION 1

typedef int32_t pyrt_status;

enum {
  PYRT_OK = 0,
  PYRT_EINVAL = -1,        /* an argument is out of its documented range */
  PYRT_ENOMEM = -2,        /* the operating system gave no memory */
  PYRT_EFULL = -3,         /* a pool, filter, KV space or budget is exhausted */
  PYRT_ENOENT = -4,        /* unknown id or file */
  PYRT_ECORRUPT = -5,      /* stored data fail their checks */
  PYRT_EIO = -6,           /* a read or write failed */
  PYRT_EVERSION = -7,      /* ABI or format too new or too old */
  PYRT_ENODEV = -8,        /* no GPU, no driver, or built without CUDA */
  PYRT_ECUDA = -9,         /* a CUDA call failed */
  PYRT_ESTATE = -10,       /* busy, double release, stale handle, forked child */
  PYRT_ECLOSED = -11,      /* the object was closed */
  PYRT_ETIMEOUT = -12,     /* a deadline passed */
  PYRT_ECANCELED = -13,    /* the caller's stop flag was raised */
  PYRT_EUNSUPPORTED = -14, /* valid, but not implemented here */
  PYRT_EINTERNAL = -15     /* a bug of ours; please report the message */
};

/* The ABI version the loaded library was built with; compare with PYRT_ABI_VERSION. */
PYRT_API int32_t pyrt_abi_version(void) PYRT_NOEXCEPT;

/* Library version, e.g. "0.1.0". Static storage. */
PYRT_API const char* pyrt_version(void) PYRT_NOEXCEPT;

/* "PYRT_EINVAL" and so on; "unknown status" for a value that is none. Static storage. */
PYRT_API const char* pyrt_status_name(pyrt_status status) PYRT_NOEXCEPT;

/* Text of this thread's most recent failure, "" if there was none. */
PYRT_API const char* pyrt_last_error(void) PYRT_NOEXCEPT;

/* Receives the runtime's few log lines. `level` is Python's: 10 debug, 20 info, 30 warning,
 * 40 error. May be called from any thread; never from a hot path. */
typedef void (*pyrt_log_fn)(int32_t level, const char* message, void* user);

/* Sets the process's log callback; NULL (the default) silences. Thread-safe; a call in flight on
 * another thread may still reach the previous callback, so its `user` must outlive it. */
PYRT_API void pyrt_set_log_callback(pyrt_log_fn fn, void* user) PYRT_NOEXCEPT;

/* SIMD level in use: "scalar", "avx2", "avx512", "avx512_vnni", "neon". The environment variable
 * PYRUNTIME_SIMD forces a lower one (read once, at first use). Static storage. */
PYRT_API const char* pyrt_simd_level(void) PYRT_NOEXCEPT;

/* The best level this CPU has, whatever PYRUNTIME_SIMD says. Static storage. */
PYRT_API const char* pyrt_simd_detected(void) PYRT_NOEXCEPT;

/* A stop flag: raised by one thread, read at operator boundaries by another. */
typedef struct pyrt_stop pyrt_stop;
PYRT_API pyrt_status pyrt_stop_create(pyrt_stop** out) PYRT_NOEXCEPT;
PYRT_API void pyrt_stop_destroy(pyrt_stop* stop) PYRT_NOEXCEPT;
/* Raise (value != 0) or lower (0) the flag; NULL is ignored. Lock-free. */
PYRT_API void pyrt_stop_set(pyrt_stop* stop, int32_t value) PYRT_NOEXCEPT;
/* 1 if raised, 0 if not or if stop is NULL. */
PYRT_API int32_t pyrt_stop_is_set(const pyrt_stop* stop) PYRT_NOEXCEPT;

/* The process's one thread pool. It starts on first use with as many threads as the process may
 * run on (PYRUNTIME_THREADS overrides); no result depends on its size. */
PYRT_API int32_t pyrt_threads_size(void) PYRT_NOEXCEPT;
/* Resize to `size` threads, the caller's included (1..1024). Waits for work in flight.
 * PYRT_EINVAL outside the range; PYRT_ESTATE when called from inside the pool. */
PYRT_API pyrt_status pyrt_threads_resize(int32_t size) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
