/* The memory pool: lock-free fixed-size objects on huge pages.
 *
 * Threads: get, put and their bulk forms may be called from any thread on any object of the pool.
 * An object may be put by another thread than the one that got it. create and destroy must not run
 * beside other calls on the same pool. Objects are not zeroed.
 */
#ifndef PYRUNTIME_POOL_H
#define PYRUNTIME_POOL_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pyrt_pool pyrt_pool;

/* pages: what the memory should be made of; every wish falls back to the next one and reports it */
enum { PYRT_PAGES_AUTO = 0, PYRT_PAGES_THP = 1, PYRT_PAGES_HUGETLB = 2, PYRT_PAGES_4K = 3 };
/* prefault: when pages are faulted in. Never inside get. */
enum { PYRT_PREFAULT_NONE = 0, PYRT_PREFAULT_SYNC = 1, PYRT_PREFAULT_BACKGROUND = 2 };
/* check: what put verifies.
 *   RANGE  foreign and misaligned pointers (about free)
 *   STATE  also double release, and writes to a released object's first or last 16 bytes
 *   GUARD  also an inaccessible page behind each object, and released objects are inaccessible
 *          (a system call per get and put; no prefault, pages are 4 KiB) */
enum { PYRT_CHECK_RANGE = 0, PYRT_CHECK_STATE = 1, PYRT_CHECK_GUARD = 2 };
/* fork: what a forked child sees. COW: its own copy. EXCLUDE: no memory, calls give PYRT_ESTATE. */
enum { PYRT_FORK_COW = 0, PYRT_FORK_EXCLUDE = 1 };

typedef struct pyrt_pool_options {
  uint32_t struct_size;
  uint32_t pages;         /* PYRT_PAGES_... */
  uint32_t prefault;      /* PYRT_PREFAULT_... */
  uint32_t check;         /* PYRT_CHECK_... */
  uint32_t fork;          /* PYRT_FORK_... */
  int32_t node;           /* preferred NUMA node, -1 for none */
  uint64_t object_bytes;  /* 1 .. 2^30 */
  uint64_t align;         /* power of two up to 2 MiB; 0: natural, and coloured against cache-set
                             conflicts (the stride is then no power of two) */
  uint64_t capacity;      /* objects, 1 .. 2^40 */
  uint64_t max_capacity;  /* the pool grows up to this many; 0: capacity (it does not grow) */
  uint32_t cache_objects; /* objects a thread may keep, in two magazines of half of it: 2 .. 512;
                             0: chosen so that one thread per core keeps at most 1/4 of the pool */
  uint32_t reserved;
} pyrt_pool_options;

typedef struct pyrt_pool_statistics {
  uint32_t struct_size;
  uint32_t num_caches;      /* thread caches in use */
  uint64_t capacity;        /* objects the pool may hand out without growing */
  uint64_t in_use;          /* objects handed out (exact when no call is in flight) */
  uint64_t cached;          /* free objects in thread caches */
  uint64_t depot;           /* free objects shared by all threads, the untouched ones included */
  uint64_t gets;            /* objects handed out so far */
  uint64_t puts;            /* objects taken back so far */
  uint64_t refills;         /* magazine exchanges with the depot to get */
  uint64_t spills;          /* magazine exchanges with the depot to put */
  uint64_t failures;        /* gets refused because the pool was exhausted */
  uint64_t steals;          /* magazines taken from another thread's cache at exhaustion */
  uint64_t grows;           /* units committed after creation */
  uint64_t trims;           /* units given back */
  uint64_t fallbacks;       /* wishes for pages or nodes that were refused */
  uint64_t overwrites;      /* released objects found modified (PYRT_CHECK_STATE and above) */
  uint64_t lost_in_fork;    /* caches that a fork caught in mid exchange; their objects are lost */
  uint64_t committed_bytes; /* address space made usable */
  uint64_t huge_bytes;      /* of it, on huge pages now; read from smaps, so it costs ~1 ms */
} pyrt_pool_statistics;

/* Fills defaults: no prefault, range checks, copy-on-write fork, any node, sizes 0. */
PYRT_API void pyrt_pool_options_init(pyrt_pool_options* options) PYRT_NOEXCEPT;

/* Creates a pool. PYRT_EINVAL names the option; PYRT_ENOMEM when the memory is not to be had. */
PYRT_API pyrt_status pyrt_pool_create(const pyrt_pool_options* options,
                                      pyrt_pool** out) PYRT_NOEXCEPT;

/* Destroys a pool and unmaps its memory. PYRT_ESTATE with the count while objects are out, unless
 * `force`; the pool then lives on unchanged. */
PYRT_API pyrt_status pyrt_pool_destroy(pyrt_pool* pool, int32_t force) PYRT_NOEXCEPT;

/* One object, or NULL when the pool is exhausted (then pyrt_last_error() is not touched), the pool
 * is NULL, or the pool is excluded from this forked child. */
PYRT_API void* pyrt_pool_get(pyrt_pool* pool) PYRT_NOEXCEPT;

/* Takes an object back. PYRT_EINVAL for a pointer that is no object of the pool; PYRT_ESTATE for a
 * double release (with PYRT_CHECK_STATE). The pool is unchanged then. */
PYRT_API pyrt_status pyrt_pool_put(pyrt_pool* pool, void* object) PYRT_NOEXCEPT;

/* Gets n objects, all or none: PYRT_EFULL when fewer are to be had. n may be 0. */
PYRT_API pyrt_status pyrt_pool_get_bulk(pyrt_pool* pool, void** out, size_t n) PYRT_NOEXCEPT;

/* Takes n objects back, all or none, with the checks of pyrt_pool_put for each. */
PYRT_API pyrt_status pyrt_pool_put_bulk(pyrt_pool* pool, void* const* objects,
                                        size_t n) PYRT_NOEXCEPT;

/* A cache of its own beside those of threads: for a fiber, a pinned worker, or C++ that inlines its
 * calls (pool_cache.hpp). One thread at a time may use one. In a forked child it holds no objects
 * of its own; one that another thread was using at that moment may be lost: its calls give NULL and
 * PYRT_ESTATE there. */
typedef struct pyrt_pool_cache pyrt_pool_cache;

/* PYRT_ENOMEM without memory; PYRT_ESTATE in a child that the pool is excluded from. */
PYRT_API pyrt_status pyrt_pool_cache_create(pyrt_pool* pool, pyrt_pool_cache** out) PYRT_NOEXCEPT;
/* Gives its free objects back to the pool. Before the pool's destroy, which refuses until then. */
PYRT_API pyrt_status pyrt_pool_cache_destroy(pyrt_pool_cache* cache) PYRT_NOEXCEPT;
/* As pyrt_pool_get and so on, through this cache. */
PYRT_API void* pyrt_pool_cache_get(pyrt_pool_cache* cache) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_pool_cache_put(pyrt_pool_cache* cache, void* object) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_pool_cache_get_bulk(pyrt_pool_cache* cache, void** out,
                                              size_t n) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_pool_cache_put_bulk(pyrt_pool_cache* cache, void* const* objects,
                                              size_t n) PYRT_NOEXCEPT;
/* The version of the layout that pool_cache.hpp reads. */
PYRT_API uint32_t pyrt_pool_cache_layout(void) PYRT_NOEXCEPT;

/* The same with indices 0 .. max_capacity - 1, the handles of array-minded callers. */
PYRT_API pyrt_status pyrt_pool_get_indices(pyrt_pool* pool, uint32_t* out, size_t n) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_pool_put_indices(pyrt_pool* pool, const uint32_t* indices,
                                           size_t n) PYRT_NOEXCEPT;

/* Address of object `index`, NULL if out of range or not committed yet. */
PYRT_API void* pyrt_pool_ptr_of(const pyrt_pool* pool, uint64_t index) PYRT_NOEXCEPT;
/* Index of an object's address, -1 if it is none of this pool. */
PYRT_API int64_t pyrt_pool_index_of(const pyrt_pool* pool, const void* object) PYRT_NOEXCEPT;

/* Geometry, for registration with devices: object i starts at
 * base + (i / per_unit) * unit_bytes + (i % per_unit) * stride. */
typedef struct pyrt_pool_layout {
  uint32_t struct_size;
  uint32_t per_unit;
  void* base;
  uint64_t object_bytes;
  uint64_t stride;
  uint64_t unit_bytes;
  uint64_t committed_bytes;
  uint64_t max_capacity;
} pyrt_pool_layout;
PYRT_API pyrt_status pyrt_pool_get_layout(const pyrt_pool* pool,
                                          pyrt_pool_layout* layout) PYRT_NOEXCEPT;

/* Faults in all committed memory now and asks for huge pages where they are missing.
 * PYRT_ENOMEM when the system stops it (a memory limit); what was faulted in stays. */
PYRT_API pyrt_status pyrt_pool_prefault(pyrt_pool* pool) PYRT_NOEXCEPT;

/* Gives whole free units back to the system; `released_bytes` may be NULL. Drains every thread's
 * cache, so it is for quiet moments. */
PYRT_API pyrt_status pyrt_pool_trim(pyrt_pool* pool, uint64_t* released_bytes) PYRT_NOEXCEPT;

/* Returns the calling thread's cached objects to the depot. */
PYRT_API pyrt_status pyrt_pool_flush_thread(pyrt_pool* pool) PYRT_NOEXCEPT;

/* Statistics; fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_pool_get_statistics(pyrt_pool* pool,
                                              pyrt_pool_statistics* statistics) PYRT_NOEXCEPT;

/* Walks every free object of a pool at rest: each in range and once, and
 * capacity = in_use + cached + depot. PYRT_ECORRUPT says what is wrong. */
PYRT_API pyrt_status pyrt_pool_check(pyrt_pool* pool) PYRT_NOEXCEPT;

/* Objects between their scattered places and packed rows, on a CUDA device. Every address is one
 * the device can reach: device memory, or host memory registered with pyrt_gpu_register. */
typedef struct pyrt_pool_device_copy {
  uint32_t struct_size;
  uint32_t per_unit; /* this and the next four as in pyrt_pool_layout: of the pool itself if its */
  uintptr_t base;    /* memory is registered, or of a mirror of it in device memory */
  uint64_t object_bytes;
  uint64_t stride;
  uint64_t unit_bytes;
  uint64_t num_objects; /* rows of an index at or above it are left alone */
  uintptr_t indices;    /* uint32[n], 4-byte aligned */
  uint64_t n;
  uintptr_t packed; /* row i at packed + i * packed_stride; fastest where all are multiples of 16 */
  uint64_t packed_stride;
} pyrt_pool_device_copy;

/* Copies object indices[i] to row i (gather) or row i to object indices[i] (scatter; an index that
 * comes twice leaves a mixture of its rows). Asynchronous: ordered on `stream`, a cudaStream_t (0:
 * the default stream), and the memory must live until it is done. PYRT_EINVAL names the field;
 * PYRT_ENODEV says what is missing; PYRT_ECUDA. */
PYRT_API pyrt_status pyrt_pool_gather_async(const pyrt_pool_device_copy* copy,
                                            uintptr_t stream) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_pool_scatter_async(const pyrt_pool_device_copy* copy,
                                             uintptr_t stream) PYRT_NOEXCEPT;

/* A byte budget that arenas and caches share. It is a ledger: reserve before committing memory,
 * give back after releasing some. Amounts are whole 2 MiB units, the grain in which memory comes
 * and goes. Any thread may call; in a forked child every call gives PYRT_ESTATE. */
typedef struct pyrt_budget pyrt_budget;
typedef struct pyrt_budget_client pyrt_budget_client;

enum { PYRT_BUDGET_UNIT_BYTES = 2097152 };

/* Asked, on the thread of another client's reserve and with no lock of the budget held, to free
 * about `bytes`. It gives back what it frees with pyrt_budget_give_back and returns how much that
 * was (0: nothing now); only what was given back counts. Must not reserve more than is available,
 * nor unregister its own client. */
typedef uint64_t (*pyrt_budget_reclaim)(void* user, uint64_t bytes);

typedef struct pyrt_budget_statistics {
  uint32_t struct_size;
  uint32_t num_clients;
  uint64_t limit_bytes;
  uint64_t available_bytes; /* limit_bytes less what the clients reserved */
  uint64_t reserves;        /* granted so far */
  uint64_t failures;        /* refused so far */
  uint64_t reclaims;        /* that asked other clients */
} pyrt_budget_statistics;

typedef struct pyrt_budget_client_statistics {
  uint32_t struct_size;
  int32_t priority;
  uint64_t reserved_bytes;
  uint64_t peak_bytes;
  uint64_t reserves;    /* granted so far */
  uint64_t failures;    /* refused so far */
  uint64_t asked;       /* times it was asked to free something */
  uint64_t asked_bytes; /* bytes it was asked for, in all */
  uint64_t freed_bytes; /* bytes its callback said it freed, in all */
} pyrt_budget_client_statistics;

/* limit_bytes: 2 MiB .. 2^62, rounded down to whole units. */
PYRT_API pyrt_status pyrt_budget_create(uint64_t limit_bytes, pyrt_budget** out) PYRT_NOEXCEPT;

/* PYRT_ESTATE while clients are registered. */
PYRT_API pyrt_status pyrt_budget_destroy(pyrt_budget* budget) PYRT_NOEXCEPT;

/* Adds a client. A higher priority is served at the cost of lower and equal ones. `name` is copied,
 * for messages; `reclaim` may be NULL: then nothing is ever taken from this client. */
PYRT_API pyrt_status pyrt_budget_register(pyrt_budget* budget, const char* name, int32_t priority,
                                          pyrt_budget_reclaim reclaim, void* user,
                                          pyrt_budget_client** out) PYRT_NOEXCEPT;

/* Removes a client after waiting for its running callbacks, so the caller holds no lock that they
 * need. PYRT_ESTATE while it holds bytes, unless `force`, which gives them back; PYRT_ESTATE from
 * inside its own callback. */
PYRT_API pyrt_status pyrt_budget_unregister(pyrt_budget_client* client,
                                            int32_t force) PYRT_NOEXCEPT;

/* Reserves bytes (a multiple of 2 MiB). If they do not fit, asks clients of lower priority, then of
 * equal priority, those who hold most first, to free the difference. PYRT_EFULL with the bytes
 * asked and available if they still do not fit. Hold no lock that another client's callback takes.
 */
PYRT_API pyrt_status pyrt_budget_reserve(pyrt_budget_client* client, uint64_t bytes) PYRT_NOEXCEPT;

/* Gives bytes back (a multiple of 2 MiB); PYRT_EINVAL beyond what the client reserved. */
PYRT_API pyrt_status pyrt_budget_give_back(pyrt_budget_client* client,
                                           uint64_t bytes) PYRT_NOEXCEPT;

/* Statistics; fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_budget_get_statistics(const pyrt_budget* budget,
                                                pyrt_budget_statistics* statistics) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_budget_client_get_statistics(
    const pyrt_budget_client* client, pyrt_budget_client_statistics* statistics) PYRT_NOEXCEPT;

/* Objects of many sizes on huge pages: slab classes over one reserved range, drawing on a budget.
 * Every object starts on a 4 KiB boundary and is not zeroed. Any thread may call, at the price of a
 * mutex; create and destroy must not run beside other calls. In a forked child every call gives
 * PYRT_ESTATE. */
typedef struct pyrt_arena pyrt_arena;

typedef struct pyrt_arena_options {
  uint32_t struct_size;
  uint32_t pages;         /* PYRT_PAGES_AUTO, _THP or _4K */
  int32_t node;           /* preferred NUMA node, -1 for none */
  int32_t priority;       /* in the budget */
  uint64_t reserve_bytes; /* address space, 2 MiB .. 2^43; give more than will be committed */
  pyrt_budget* budget;    /* what committed memory is counted against; NULL: reserve_bytes only */
  const char* name;       /* in the budget's messages; copied; NULL: "arena" */
  /* Asked when the budget needs more than the arena's empty slabs: to release objects, preferably
   * neighbours, of about `bytes`. Returns the bytes released, 0 for none. May be NULL. */
  pyrt_budget_reclaim reclaim;
  void* user;
  const uint64_t* class_bytes; /* sizes that shall fit exactly (rounded up to 4 KiB); copied */
  uint64_t num_classes;
} pyrt_arena_options;

typedef struct pyrt_arena_statistics {
  uint32_t struct_size;
  uint32_t num_slabs;
  uint64_t objects;         /* out now */
  uint64_t in_use_bytes;    /* of them, rounded up to their classes */
  uint64_t committed_bytes; /* whole slabs: what the budget is charged */
  uint64_t empty_bytes;     /* of them, without an object: what trim would give back */
  uint64_t reserved_bytes;  /* address space */
  uint64_t acquires;        /* granted so far */
  uint64_t releases;
  uint64_t failures;      /* acquires refused so far */
  uint64_t trimmed_bytes; /* given back so far */
  uint64_t fallbacks;     /* wishes for pages or nodes that were refused */
  uint64_t huge_bytes;    /* on huge pages now; read from smaps, so it costs ~1 ms */
} pyrt_arena_statistics;

/* Fills defaults: huge pages, any node, no budget, reserve_bytes 0. */
PYRT_API void pyrt_arena_options_init(pyrt_arena_options* options) PYRT_NOEXCEPT;

/* Creates an arena; commits nothing. PYRT_EINVAL names the option. */
PYRT_API pyrt_status pyrt_arena_create(const pyrt_arena_options* options,
                                       pyrt_arena** out) PYRT_NOEXCEPT;

/* Unmaps everything and leaves the budget. PYRT_ESTATE while objects are out, unless `force`. */
PYRT_API pyrt_status pyrt_arena_destroy(pyrt_arena* arena, int32_t force) PYRT_NOEXCEPT;

/* One object of at least `bytes`. When a new slab does not fit the budget, the arena's empty slabs
 * go first, then other clients are asked (so hold no lock their callbacks take). PYRT_EFULL if the
 * budget or the range is exhausted. */
PYRT_API pyrt_status pyrt_arena_acquire(pyrt_arena* arena, uint64_t bytes,
                                        void** out) PYRT_NOEXCEPT;

/* Takes an object back. PYRT_EINVAL if it is none of the arena; PYRT_ESTATE if it is not out. */
PYRT_API pyrt_status pyrt_arena_release(pyrt_arena* arena, void* object) PYRT_NOEXCEPT;

/* The bytes an object that is out may use; fails as release does. */
PYRT_API pyrt_status pyrt_arena_size_of(pyrt_arena* arena, const void* object,
                                        uint64_t* bytes) PYRT_NOEXCEPT;

/* Gives slabs without objects back to the system and the budget; `released_bytes` may be NULL. */
PYRT_API pyrt_status pyrt_arena_trim(pyrt_arena* arena, uint64_t* released_bytes) PYRT_NOEXCEPT;

/* Statistics; fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_arena_get_statistics(pyrt_arena* arena,
                                               pyrt_arena_statistics* statistics) PYRT_NOEXCEPT;

/* Walks the slabs and free runs; PYRT_ECORRUPT says what is wrong. */
PYRT_API pyrt_status pyrt_arena_check(pyrt_arena* arena) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
