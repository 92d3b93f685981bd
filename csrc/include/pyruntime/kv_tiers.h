/* KV blocks below and beyond the device: names of content that are the same everywhere.
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

#ifdef __cplusplus
}
#endif
#endif
