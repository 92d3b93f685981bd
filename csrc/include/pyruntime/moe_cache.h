/* Experts of a store in limited memory: loaded plane by plane when tokens need them, computed while
 * others are still loading, evicted by worth. csrc/moe/cache.hpp has the design.
 *
 * A cache belongs to its process (PYRT_ESTATE in a forked child). Any thread may call; calls of
 * pyrt_moe_cache_ffn run one after another.
 */
#ifndef PYRUNTIME_MOE_CACHE_H
#define PYRUNTIME_MOE_CACHE_H

#include "pyruntime/moe.h"
#include "pyruntime/pool.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pyrt_moe_cache pyrt_moe_cache;

/* The order in which a call's planes are loaded. */
enum { PYRT_MOE_ORDER_HEBF = 0, PYRT_MOE_ORDER_JOHNSON = 1, PYRT_MOE_ORDER_ID = 2 };

typedef struct pyrt_moe_cache_options {
  uint32_t struct_size;
  int32_t priority;       /* in the budget */
  uint64_t limit_bytes;   /* of planes in memory, at most */
  pyrt_budget* budget;    /* what they are counted against too, or NULL */
  uint64_t scratch_bytes; /* for activations of a call; more tokens go in groups. 0: 64 MiB */
  int32_t floor;          /* base planes that a layer keeps, as far as possible */
  int32_t threads;        /* that read, 1..64 */
  int32_t order;          /* PYRT_MOE_ORDER_... */
  uint8_t direct;         /* 1: read past the page cache where the file system allows */
  uint8_t strict;         /* 1: a token without a refinement plane fails; 0: it gets less */
  uint8_t worth_errors;   /* 1: eviction weighs uses by the error that a plane takes away */
  uint8_t reserved;
} pyrt_moe_cache_options;

typedef struct pyrt_moe_cache_statistics {
  uint32_t struct_size;
  uint32_t prefetching; /* 0 while prefetching is paused, because it wasted more than it gave */
  uint64_t limit_bytes;
  uint64_t capacity_bytes; /* the limit, or what the cache has of the budget now */
  uint64_t used_bytes;     /* of planes in memory or on their way */
  uint64_t resident[4];    /* planes in memory, by level */
  uint64_t hits[4];        /* planes that calls needed and found, by level */
  uint64_t misses[4];      /* and did not find */
  uint64_t bytes_read;
  uint64_t evictions;
  uint64_t evicted_bytes;
  uint64_t prefetched_bytes;
  uint64_t prefetch_useful_bytes; /* used by a later call */
  uint64_t prefetch_wasted_bytes; /* evicted before any call used them */
  uint64_t prefetch_cancelled;    /* planes */
  uint64_t read_errors;
  uint64_t checksum_errors;
  uint64_t quarantined; /* planes that are not tried again */
  uint64_t failed_tokens;
  uint64_t degraded_tokens; /* computed at a lower level because of bad planes */
  uint64_t calls;
  uint64_t waits; /* times a call had nothing to compute */
  uint64_t wait_nanoseconds;
  char backend[12]; /* "direct", "buffered" */
  uint32_t reserved;
} pyrt_moe_cache_statistics;

/* `store` must outlive the cache. PYRT_EINVAL; PYRT_EFULL with the bytes needed when limit or
 * budget do not hold one expert; PYRT_ENOMEM. */
PYRT_API pyrt_status pyrt_moe_cache_create(const pyrt_moe_store* store,
                                           const pyrt_moe_cache_options* options,
                                           pyrt_moe_cache** out) PYRT_NOEXCEPT;
/* No call may be running. Waits for reads on their way. */
PYRT_API void pyrt_moe_cache_destroy(pyrt_moe_cache* cache) PYRT_NOEXCEPT;

/* As pyrt_moe_ffn on `layer` of the store, loading what is missing. floors[n, top_k] (or NULL) are
 * levels that must be there; above them, up to the level asked for, a slot takes what is in memory:
 * results then depend on earlier calls. status[n] (or NULL): 0; 1 if a plane could not be read, the
 * token's row is then zero; 2 if it was computed at a lower level for that reason. PYRT_EINVAL. */
PYRT_API pyrt_status pyrt_moe_cache_ffn(pyrt_moe_cache* cache, int64_t layer, const float* x,
                                        int64_t n, const int32_t* ids, const float* weights,
                                        int64_t top_k, const uint8_t* levels, int32_t level,
                                        const uint8_t* floors, float* out,
                                        uint8_t* status) PYRT_NOEXCEPT;

/* Says that experts[count] of `layer` are likely to be wanted at `level`: loads them when nothing
 * else is to be read and nothing worth more has to go. A call for the layer cancels what has not
 * begun. PYRT_EINVAL. */
PYRT_API pyrt_status pyrt_moe_cache_prefetch(pyrt_moe_cache* cache, int64_t layer,
                                             const int32_t* experts, int64_t count,
                                             int32_t level) PYRT_NOEXCEPT;

/* Bytes that computing experts[count] of `layer` at `level` would have to read. */
PYRT_API pyrt_status pyrt_moe_cache_missing(pyrt_moe_cache* cache, int64_t layer,
                                            const int32_t* experts, int64_t count, int32_t level,
                                            uint64_t* bytes) PYRT_NOEXCEPT;

/* Evicts planes that are not in use until at most `bytes` are used; used_bytes (or NULL) is what
 * remains. */
PYRT_API pyrt_status pyrt_moe_cache_shrink(pyrt_moe_cache* cache, uint64_t bytes,
                                           uint64_t* used_bytes) PYRT_NOEXCEPT;

/* Waits until nothing is being read. */
PYRT_API pyrt_status pyrt_moe_cache_drain(pyrt_moe_cache* cache) PYRT_NOEXCEPT;

PYRT_API pyrt_status pyrt_moe_cache_get_statistics(
    pyrt_moe_cache* cache, pyrt_moe_cache_statistics* statistics) PYRT_NOEXCEPT;

/* Walks all invariants: PYRT_ECORRUPT says what is wrong. */
PYRT_API pyrt_status pyrt_moe_cache_check(pyrt_moe_cache* cache) PYRT_NOEXCEPT;

/* The order in which a layer's missing planes are loaded, a pure function. counts[experts, levels]:
 * tokens that want an expert at exactly a level; resident[experts]: levels in memory;
 * load_seconds[levels] to load a plane; compute_seconds[levels] to compute a token.
 * planes[experts * levels, 2] gets (expert, level), *num_planes of them; *makespan (or NULL) the
 * seconds until all is computed. PYRT_EINVAL. */
PYRT_API pyrt_status pyrt_moe_plan(int32_t order, int64_t experts, int32_t levels,
                                   const int64_t* counts, const int32_t* resident,
                                   const double* load_seconds, const double* compute_seconds,
                                   int32_t* planes, int64_t* num_planes,
                                   double* makespan) PYRT_NOEXCEPT;

/* The seconds until all is computed if planes[num_planes, 2] are loaded in this order. PYRT_EINVAL
 * for an order that is not one of the missing planes, each after the lower ones of its expert. */
PYRT_API pyrt_status pyrt_moe_makespan(int64_t experts, int32_t levels, const int64_t* counts,
                                       const int32_t* resident, const double* load_seconds,
                                       const double* compute_seconds, const int32_t* planes,
                                       int64_t num_planes, double* makespan) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
