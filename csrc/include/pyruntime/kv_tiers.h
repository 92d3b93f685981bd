/* KV blocks below and beyond the device: names of content that are the same everywhere, copies of
 * blocks between tiers beside an engine's steps, and blocks in a file.
 *
 * Conventions are those of abi.h.
 */
#ifndef PYRUNTIME_KV_TIERS_H
#define PYRUNTIME_KV_TIERS_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PYRT_KV_EXPORT_KEY_BYTES = 32 };

/* The keys of the full blocks of `tokens`: num_tokens / block_size of 32 bytes each, written to
 * `keys`. Key i is the SHA-256 digest of a 64-byte head, which depends on the secret, the namespace
 * and block_size, and of all tokens up to the end of block i as little-endian int32; the head is
 * spelled out in csrc/kv/export_key.hpp. Equal keys mean equal prefixes of one namespace of one
 * deployment; without the secret nobody can predict them.
 *
 *   secret, space   any bytes; may be NULL if their length is 0
 *   block_size      1 .. 2^20 tokens
 *
 * Pure and thread-safe; costs one SHA-256 compression for each 16 tokens and about half of one for
 * each block. PYRT_EINVAL names the argument. */
PYRT_API pyrt_status pyrt_kv_export_keys(const void* secret, uint64_t secret_bytes,
                                         const void* space, uint64_t space_bytes,
                                         const int32_t* tokens, uint64_t num_tokens,
                                         uint32_t block_size, uint8_t* keys) PYRT_NOEXCEPT;

/* The swap engine: copies runs of blocks between spaces on threads of its own, which sleep while
 * there is nothing to do. Copies that touch a block in the same way that one of them writes run in
 * the order of submission. Any thread may call; in a forked child every call gives PYRT_ESTATE. */
typedef struct pyrt_kv_swap pyrt_kv_swap;

typedef struct pyrt_kv_swap_options {
  uint32_t struct_size;
  uint32_t workers;     /* threads, 1..16 */
  uint32_t queue_limit; /* copies not collected, 1..2^20 */
  uint32_t reserved;
  uint64_t delay_ns; /* for tests: up to that long before each part of a copy, at most 10^9 */
  uint64_t seed;     /* of the delays */
} pyrt_kv_swap_options;

/* Where the blocks of one KV group lie: piece p (K or V of a layer) of block b is at
 * bases[p] + b * block_stride. Copied by the call; the memory must outlive the space. */
typedef struct pyrt_kv_space {
  uint32_t struct_size;
  uint32_t num_blocks; /* 1 .. 2^32 - 2 */
  const uintptr_t* bases;
  uint64_t num_pieces;   /* 1 .. 2^16 */
  uint64_t block_stride; /* at least piece_bytes */
  uint64_t piece_bytes;  /* 1 .. 2^30 */
} pyrt_kv_space;

typedef struct pyrt_kv_swap_run {
  uint32_t from;
  uint32_t to;
  uint32_t count;
} pyrt_kv_swap_run;

typedef struct pyrt_kv_completion {
  uint64_t ticket;
  pyrt_status
      status; /* PYRT_OK, PYRT_ECANCELED, or why the copy failed: then its target is undefined */
  uint32_t reserved;
} pyrt_kv_completion;

typedef struct pyrt_kv_swap_statistics {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t jobs;     /* submitted */
  uint64_t finished; /* in any way */
  uint64_t failed;
  uint64_t cancelled;
  uint64_t blocks;      /* copied */
  uint64_t bytes;       /* copied */
  uint64_t descriptors; /* separate copies these took */
  uint64_t conflicts;   /* jobs that had to wait for earlier ones */
  uint64_t copy_ns;     /* spent in copies, by the clock */
  uint64_t copy_cpu_ns; /* and on a CPU */
  uint64_t waits;       /* calls that had to wait */
  uint64_t wait_ns;
  uint64_t in_flight;
} pyrt_kv_swap_statistics;

/* Fills defaults: one thread, 4096 copies, no delay. */
PYRT_API void pyrt_kv_swap_options_init(pyrt_kv_swap_options* options) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_kv_swap_create(const pyrt_kv_swap_options* options,
                                         pyrt_kv_swap** out) PYRT_NOEXCEPT;
/* Cancels what is in flight and waits for its end. */
PYRT_API void pyrt_kv_swap_destroy(pyrt_kv_swap* swap) PYRT_NOEXCEPT;

/* Registers a space; ids of removed spaces are used again. */
PYRT_API pyrt_status pyrt_kv_swap_add_space(pyrt_kv_swap* swap, const pyrt_kv_space* space,
                                            uint32_t* out) PYRT_NOEXCEPT;
/* PYRT_ESTATE while a copy touches it. */
PYRT_API pyrt_status pyrt_kv_swap_remove_space(pyrt_kv_swap* swap, uint32_t space) PYRT_NOEXCEPT;

/* A fence holds a number, 0 at first, that `signal` raises. */
PYRT_API pyrt_status pyrt_kv_swap_add_fence(pyrt_kv_swap* swap, uint32_t* out) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_kv_swap_signal(pyrt_kv_swap* swap, uint32_t fence,
                                         uint64_t value) PYRT_NOEXCEPT;

/* Submits a copy of runs, to start once `fence` (0: none) has reached `value`. Spaces must agree in
 * num_pieces and piece_bytes; they may be the same one. No block may be written twice, or read and
 * written. PYRT_EFULL: collect first. */
PYRT_API pyrt_status pyrt_kv_swap_copy(pyrt_kv_swap* swap, uint32_t from, uint32_t to,
                                       const pyrt_kv_swap_run* runs, uint64_t num_runs,
                                       uint32_t fence, uint64_t value,
                                       uint64_t* ticket) PYRT_NOEXCEPT;

/* Ends a copy early; does nothing to one that has finished. It is collected all the same. */
PYRT_API pyrt_status pyrt_kv_swap_cancel(pyrt_kv_swap* swap, uint64_t ticket) PYRT_NOEXCEPT;

/* Waits until a copy (ticket 0: every copy) has finished; PYRT_ETIMEOUT after `timeout_ns`,
 * negative for no limit. It remains to be collected. */
PYRT_API pyrt_status pyrt_kv_swap_wait(pyrt_kv_swap* swap, uint64_t ticket,
                                       int64_t timeout_ns) PYRT_NOEXCEPT;

/* Takes up to `capacity` completions, in the order of their end. */
PYRT_API pyrt_status pyrt_kv_swap_collect(pyrt_kv_swap* swap, pyrt_kv_completion* out,
                                          uint64_t capacity, uint64_t* n) PYRT_NOEXCEPT;

/* Whether an unfinished copy writes the block or, `for_writing`, touches it: 1 or 0. */
PYRT_API pyrt_status pyrt_kv_swap_busy(pyrt_kv_swap* swap, uint32_t space, uint32_t block,
                                       int32_t for_writing, int32_t* out) PYRT_NOEXCEPT;

/* For tests: the n-th part of a copy from now fails with PYRT_EIO; 0: none. */
PYRT_API pyrt_status pyrt_kv_swap_fail_part(pyrt_kv_swap* swap, int64_t n) PYRT_NOEXCEPT;

/* Fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_kv_swap_get_statistics(pyrt_kv_swap* swap,
                                                 pyrt_kv_swap_statistics* out) PYRT_NOEXCEPT;
/* Counts the blocks in flight again; PYRT_ECORRUPT says what is wrong. */
PYRT_API pyrt_status pyrt_kv_swap_check(pyrt_kv_swap* swap) PYRT_NOEXCEPT;

/* The disk tier: items of one size in one file under keys of 32 bytes (pyrt_kv_export_keys), there
 * after a restart; the least recently used ones make room. What is in doubt is a miss: an item is
 * checked by its checksum whenever it is read. The file's layout and the order of its writes are in
 * csrc/kv/disk.hpp.
 *
 * Calls block for their I/O. Any thread may call; reads run beside each other and beside a put, and
 * puts take turns. In a forked child every call gives PYRT_ESTATE. */
typedef struct pyrt_kv_disk pyrt_kv_disk;

typedef struct pyrt_kv_disk_options {
  uint32_t struct_size;
  uint32_t fingerprint_bytes; /* at most 1024 */
  uint64_t item_bytes;        /* of an item, 1 .. 2^30 */
  uint64_t capacity_bytes;    /* of the file; it grows as it is filled. Room for two items at least,
                                 beside 64 bytes for each and one page; a sixteenth of the items, at
                                 most 64 of them, stay free. At most 2^24 items. */
  const void* fingerprint; /* says what the items are about: model, block size, dtype; may be NULL
                              if its length is 0 */
} pyrt_kv_disk_options;

enum {
  PYRT_KV_DISK_MISS = 0,
  PYRT_KV_DISK_HIT = 1,
  PYRT_KV_DISK_CORRUPT = 2 /* its checksum did not fit: dropped now */
};

enum {
  PYRT_KV_DISK_FAIL_IO = 0,    /* a write or sync fails */
  PYRT_KV_DISK_FAIL_SPACE = 1, /* a write or sync finds the disk full */
  PYRT_KV_DISK_FAIL_STOP = 2,  /* a write is half done, and none follows: what a crash leaves */
  PYRT_KV_DISK_FAIL_READ = 3   /* a read fails */
};

typedef struct pyrt_kv_disk_statistics {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t capacity; /* items */
  uint64_t items;
  uint64_t hits;    /* keys that get found */
  uint64_t misses;  /* and did not */
  uint64_t corrupt; /* items dropped for their checksum, counted as misses as well */
  uint64_t stored;  /* items written */
  uint64_t evicted;
  uint64_t failures; /* calls that a failed read or write ended */
  uint64_t bytes_read;
  uint64_t bytes_written;
  uint64_t syncs;
  uint64_t file_bytes; /* once it is full */
} pyrt_kv_disk_statistics;

/* Fills defaults: no fingerprint; both sizes are the caller's to say. */
PYRT_API void pyrt_kv_disk_options_init(pyrt_kv_disk_options* options) PYRT_NOEXCEPT;

/* Opens the file, or makes it (readable by its owner only) where there is none, and locks it.
 * PYRT_ESTATE: it is open already, here or elsewhere; PYRT_EINVAL: it was made with another
 * fingerprint, item size or capacity; PYRT_EVERSION, PYRT_ECORRUPT: it is of another version, or no
 * such file; PYRT_ENOENT, PYRT_EIO, PYRT_EFULL: what the system says. A file that is shorter than
 * it was, or whose records or items are damaged, opens: what is damaged is missing. */
PYRT_API pyrt_status pyrt_kv_disk_open(const char* path, const pyrt_kv_disk_options* options,
                                       pyrt_kv_disk** out) PYRT_NOEXCEPT;
/* Nothing is left to write. No other call may be running. */
PYRT_API void pyrt_kv_disk_close(pyrt_kv_disk* disk) PYRT_NOEXCEPT;

/* Stores those of `n` items that are not there; those that are count as used, the first key as the
 * last used. Of more than the capacity, the first. `data` holds n * item_bytes bytes. Durable on
 * return; `stored` (may be NULL) says how many were new.
 *
 * PYRT_EFULL (the disk has no room), PYRT_EIO: what was there stays; items are stored in rounds of
 * a sixteenth of the capacity, at most 64, and those of earlier rounds stay as well. */
PYRT_API pyrt_status pyrt_kv_disk_put(pyrt_kv_disk* disk, const uint8_t* keys, uint64_t n,
                                      const void* data, uint64_t* stored) PYRT_NOEXCEPT;

/* Reads items to their places in `out`, n * item_bytes bytes, and says for each key what was found:
 * one of the values above. Where there was no hit, `out` is zero.
 *
 * PYRT_EIO: a read failed; nothing is dropped, and `out` and `found` are undefined. */
PYRT_API pyrt_status pyrt_kv_disk_get(pyrt_kv_disk* disk, const uint8_t* keys, uint64_t n,
                                      void* out, uint8_t* found) PYRT_NOEXCEPT;

/* How many of the keys, from the first on, are there, without I/O; they count as used. */
PYRT_API pyrt_status pyrt_kv_disk_match(pyrt_kv_disk* disk, const uint8_t* keys, uint64_t n,
                                        uint64_t* out) PYRT_NOEXCEPT;

/* For tests: the n-th such call of the system from now goes wrong, in the way of
 * PYRT_KV_DISK_FAIL_*; 0: none. */
PYRT_API pyrt_status pyrt_kv_disk_fail_io(pyrt_kv_disk* disk, int64_t n,
                                          uint32_t fault) PYRT_NOEXCEPT;

/* Fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_kv_disk_get_statistics(pyrt_kv_disk* disk,
                                                 pyrt_kv_disk_statistics* out) PYRT_NOEXCEPT;
/* Counts everything again; PYRT_ECORRUPT says what is wrong. No I/O; O(slots). */
PYRT_API pyrt_status pyrt_kv_disk_check(pyrt_kv_disk* disk) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
