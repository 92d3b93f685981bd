/* The cuckoo filter: approximate membership with deletion, for many threads at once.
 * csrc/filter/filter.hpp has the design, docs/filter_format.md the file.
 *
 * A filter never says no to a key that is in. It says yes to one that is not with the probability
 * `expected_fpr` of its information. Keys are 64-bit integers, or strings that are hashed to such;
 * the two must not be mixed in one filter. A key may be in several times, up to 2 * slots.
 *
 * A filter that is full can grow by generations, each twice as large as the one before: nothing
 * that is in is lost, then or by later deletions. Lookups then read one generation after the other.
 *
 * Any thread may call anything at any time; `grow`, `compact` and `clear` wait for running calls.
 */
#ifndef PYRUNTIME_FILTER_H
#define PYRUNTIME_FILTER_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Results by key. */
enum {
  PYRT_FILTER_OK = 0,        /* stored; removed */
  PYRT_FILTER_EXISTS = 1,    /* unique insert: was there, or looks so. Remove: was not there */
  PYRT_FILTER_FULL = 2,      /* no room; nothing has changed */
  PYRT_FILTER_DUP_LIMIT = 3, /* this key is in as often as it can be */
};

typedef struct pyrt_filter pyrt_filter;

typedef struct pyrt_filter_options {
  uint32_t struct_size;
  uint32_t bits;     /* of a fingerprint: 8 or 16 */
  uint64_t capacity; /* distinct keys that fit for sure, 1..2^38 */
  uint64_t seed;
  uint32_t slots; /* of a bucket: 8 or 16 */
  uint32_t reserved;
} pyrt_filter_options;

typedef struct pyrt_filter_info {
  uint32_t struct_size;
  uint32_t bits;
  uint32_t slots;
  uint32_t buckets;  /* of a segment */
  uint64_t capacity; /* distinct keys that fit for sure, in all generations together */
  uint64_t occupied; /* slots: keys that are in */
  uint64_t num_slots;
  uint64_t bytes; /* of memory */
  uint64_t seed;
  uint64_t num_segments; /* of the first generation */
  uint64_t moves;        /* of fingerprints, so far */
  uint64_t retries;      /* of inserts that another thread disturbed */
  uint64_t max_path;     /* most moves of one insert */
  double expected_fpr;
  uint32_t num_generations;
  uint32_t reserved;
} pyrt_filter_info;

/* PYRT_EINVAL, PYRT_ENOMEM. */
PYRT_API pyrt_status pyrt_filter_create(const pyrt_filter_options* options,
                                        pyrt_filter** out) PYRT_NOEXCEPT;
PYRT_API void pyrt_filter_destroy(pyrt_filter* filter) PYRT_NOEXCEPT;

/* Stores keys[n]. status[n] (or NULL) gets PYRT_FILTER_OK, _EXISTS (only if `unique`), _FULL or
 * _DUP_LIMIT; *stored (or NULL) how many are OK. What is not OK has left no trace. Two threads that
 * insert one key as unique at the same time may both store it. */
PYRT_API pyrt_status pyrt_filter_insert(pyrt_filter* filter, const uint64_t* keys, uint64_t n,
                                        int32_t unique, uint8_t* status,
                                        uint64_t* stored) PYRT_NOEXCEPT;

/* out[n]: 1 or 0; *present (or NULL): how many 1. */
PYRT_API pyrt_status pyrt_filter_contains(const pyrt_filter* filter, const uint64_t* keys,
                                          uint64_t n, uint8_t* out,
                                          uint64_t* present) PYRT_NOEXCEPT;

/* As contains, packed: key i is bit i % 8 (from the lowest) of out[i / 8]. out has (n + 7) / 8
 * bytes; bits behind the last key are 0. */
PYRT_API pyrt_status pyrt_filter_contains_bits(const pyrt_filter* filter, const uint64_t* keys,
                                               uint64_t n, uint8_t* out,
                                               uint64_t* present) PYRT_NOEXCEPT;

/* out[n]: how often each key is in, or more. */
PYRT_API pyrt_status pyrt_filter_count(const pyrt_filter* filter, const uint64_t* keys, uint64_t n,
                                       uint32_t* out) PYRT_NOEXCEPT;

/* Takes one copy of each of keys[n] out. status[n] (or NULL): PYRT_FILTER_OK or _EXISTS (it was not
 * there); *removed (or NULL): how many OK. Only for keys that are in, their insert having returned:
 * another may go instead. */
PYRT_API pyrt_status pyrt_filter_remove(pyrt_filter* filter, const uint64_t* keys, uint64_t n,
                                        uint8_t* status, uint64_t* removed) PYRT_NOEXCEPT;

/* One key, for compiled code that asks for many of them one by one; otherwise as above, and a
 * negative result is a pyrt_status. Contains: 1 or 0. Insert: PYRT_FILTER_OK, _FULL or
 * _DUP_LIMIT. Remove: PYRT_FILTER_OK or _EXISTS (it was not there). */
PYRT_API int32_t pyrt_filter_contains1(const pyrt_filter* filter, uint64_t key) PYRT_NOEXCEPT;
PYRT_API int32_t pyrt_filter_insert1(pyrt_filter* filter, uint64_t key) PYRT_NOEXCEPT;
PYRT_API int32_t pyrt_filter_remove1(pyrt_filter* filter, uint64_t key) PYRT_NOEXCEPT;

/* keys[n] of strings data[offsets[i] .. offsets[i + 1]), by this filter's seed. offsets[n + 1] do
 * not fall and end within data_bytes. */
PYRT_API pyrt_status pyrt_filter_hash_strings(const pyrt_filter* filter, const char* data,
                                              uint64_t data_bytes, const int64_t* offsets,
                                              uint64_t n, uint64_t* keys) PYRT_NOEXCEPT;

/* Adds a generation, unless the filter has more than `seen` by now, so that threads which find it
 * full at the same time grow it once (0: in any case). Waits for running calls. PYRT_ENOMEM;
 * PYRT_EFULL: the next generation would have more than 2^24 segments. */
PYRT_API pyrt_status pyrt_filter_grow(pyrt_filter* filter, uint32_t seen) PYRT_NOEXCEPT;

/* Takes generations away, the newest first, as long as all that is in one fits into the older ones
 * as they are planned; *dropped (or NULL) is how many. What does not fit stays as it is. Memory and
 * the time of lookups shrink; false positives grow with the load. Waits for running calls.
 * PYRT_ENOMEM, and PYRT_ECORRUPT as `check`; nothing is lost then. */
PYRT_API pyrt_status pyrt_filter_compact(pyrt_filter* filter, uint32_t* dropped) PYRT_NOEXCEPT;

/* Adds everything that is in `other`, which stays as it is: PYRT_EINVAL unless both were made with
 * the same capacity, bits, slots and seed. Their keys must be of one kind. PYRT_EFULL (growing does
 * not help: a key's place in a younger generation cannot be told from an older one), PYRT_ENOMEM;
 * then nothing has changed. Waits for running calls on both. */
PYRT_API pyrt_status pyrt_filter_merge(pyrt_filter* filter, const pyrt_filter* other) PYRT_NOEXCEPT;

/* Takes everything out and leaves one generation. Waits for running calls. */
PYRT_API pyrt_status pyrt_filter_clear(pyrt_filter* filter) PYRT_NOEXCEPT;

/* Fields beyond the caller's struct_size are not written. */
PYRT_API pyrt_status pyrt_filter_get_info(const pyrt_filter* filter,
                                          pyrt_filter_info* out) PYRT_NOEXCEPT;

/* Counts the occupied slots again: PYRT_ECORRUPT if they are not as counted. No writer may run. */
PYRT_API pyrt_status pyrt_filter_check(const pyrt_filter* filter) PYRT_NOEXCEPT;

/* The bytes that `save` writes. 0 for NULL. */
PYRT_API uint64_t pyrt_filter_file_bytes(const pyrt_filter* filter) PYRT_NOEXCEPT;

/* Writes the filter to out[bytes], bytes = pyrt_filter_file_bytes(); PYRT_EINVAL if it has grown
 * since that said so. key_kind (0..2: unknown, integers, strings) is kept for the reader. Waits for
 * running calls. */
PYRT_API pyrt_status pyrt_filter_save(const pyrt_filter* filter, void* out, uint64_t bytes,
                                      uint32_t key_kind) PYRT_NOEXCEPT;

/* Makes a filter of what `save` wrote. PYRT_ECORRUPT says what is wrong, before anything is
 * allocated; PYRT_EVERSION; PYRT_ENOMEM. */
PYRT_API pyrt_status pyrt_filter_load(const void* data, uint64_t bytes, pyrt_filter** out,
                                      uint32_t* key_kind) PYRT_NOEXCEPT;

/* Makes a filter of a file of what `save` wrote, mapped for as long as the filter lives: lookups
 * read it where it is, and what would change the filter gives PYRT_ESTATE. The header is always
 * checked; the rest, which reads the whole file, if `verify`. A damaged body that was not verified
 * gives wrong answers; the file must not be cut short meanwhile. PYRT_ENOENT, PYRT_EIO, and as
 * `load`. */
PYRT_API pyrt_status pyrt_filter_open_map(const char* path, int32_t verify, pyrt_filter** out,
                                          uint32_t* key_kind) PYRT_NOEXCEPT;

/* A filter's table in memory that a CUDA device reaches: the same words. Calls on one filter are
 * ordered by their stream; PYRT_ENODEV and PYRT_ECUDA as in gpu.h. */
typedef struct pyrt_filter_device {
  uint32_t struct_size;
  uint32_t bits;
  uint32_t slots;
  uint32_t threshold;
  uint32_t buckets;
  uint32_t reserved;
  uint64_t num_segments;
  uint64_t seed;
  uint64_t words_bytes; /* num_segments * buckets * slots * bits / 8 */
  uintptr_t words;      /* uint64_t[words_bytes / 8], 16-byte aligned */
  uintptr_t epochs;     /* uint32_t[num_segments], zero at first */
  uintptr_t counters;   /* uint64_t[3], zero at first */
} pyrt_filter_device;

/* Fills everything but the addresses. PYRT_EUNSUPPORTED: the filter has several generations. */
PYRT_API pyrt_status pyrt_filter_device_layout(const pyrt_filter* filter,
                                               pyrt_filter_device* out) PYRT_NOEXCEPT;
/* Copies the words out to, or in from, host memory words[bytes]. Reading: PYRT_EUNSUPPORTED as
 * above. Writing replaces all generations by one with these words; it waits for running calls,
 * counts what is occupied, and leaves the filter as it was where it fails. */
PYRT_API pyrt_status pyrt_filter_read_words(const pyrt_filter* filter, void* words,
                                            uint64_t bytes) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_filter_write_words(pyrt_filter* filter, const void* words,
                                             uint64_t bytes) PYRT_NOEXCEPT;

/* As the calls of the same name on a CPU, asynchronous on `stream` (a cudaStream_t), with
 * keys[n], status[n], out[n] and scratch[n + 1] where the device reaches them. */
PYRT_API pyrt_status pyrt_filter_device_insert_async(const pyrt_filter_device* device,
                                                     uintptr_t keys, uint64_t n, uintptr_t status,
                                                     uintptr_t scratch,
                                                     uintptr_t stream) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_filter_device_contains_async(const pyrt_filter_device* device,
                                                       uintptr_t keys, uint64_t n, uintptr_t out,
                                                       uintptr_t stream) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_filter_device_remove_async(const pyrt_filter_device* device,
                                                     uintptr_t keys, uint64_t n, uintptr_t status,
                                                     uintptr_t stream) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
