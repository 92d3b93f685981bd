/* Experts in a bit-nested code: stores, quantization and the arithmetic on them.
 *
 * The code and its file are described in docs/mxs.md. A matrix has levels 0..levels-1, each with a
 * width in bits; level l needs the planes of levels 0..l. Every pointer is host memory.
 *
 * Batch invariance: the bits of a result row depend on that row's inputs alone: not on the other
 * rows, the number of threads or the instruction set. A prefill and a decode of a token are equal.
 *
 * Threads: an open store is immutable; all functions may be called from any thread, those on one
 * writer from one thread at a time.
 */
#ifndef PYRUNTIME_MOE_H
#define PYRUNTIME_MOE_H

#include "pyruntime/abi.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PYRT_MOE_LEVELS = 4, PYRT_MOE_MATRICES = 3, PYRT_MOE_SKIP = 255 };

/* A matrix and its width at each level: rising, by 2, 4 or 8 bits (or 0) at a time, at most 8. */
typedef struct pyrt_moe_shape {
  int64_t rows;
  int64_t columns;
  int32_t levels; /* 1..4 */
  uint8_t bits[4];
} pyrt_moe_shape;

/* What a store is about. */
typedef struct pyrt_moe_info {
  uint32_t struct_size;
  uint32_t num_layers;
  uint32_t num_experts; /* per sparse layer */
  uint32_t hidden;
  uint32_t ffn;
  uint32_t levels;
  uint8_t bits[3][4]; /* of gate, up and down at each level */
  uint8_t model_hash[32];
  uint64_t file_bytes;  /* ignored by the writer, like the next two */
  uint64_t num_extents; /* of planes and dense matrices */
  uint64_t reserved;
} pyrt_moe_info;

/* One extent of a store. */
typedef struct pyrt_moe_extent {
  uint32_t dense; /* 1: a dense matrix */
  uint32_t layer;
  uint32_t expert; /* or the dense matrix's number */
  uint32_t level;
  uint64_t offset; /* in the file, a multiple of 4096 */
  uint64_t bytes;  /* data; on disk padded to a multiple of 4096 */
  uint32_t crc;    /* CRC-32C of the data */
  uint32_t reserved;
  pyrt_moe_shape shape; /* of a dense matrix */
  float unit[3];        /* of gate, up, down; dense: the first */
  float error[3];       /* sum of squared errors at this level */
  float energy[3];      /* sum of squares */
} pyrt_moe_extent;

/* Name of the instruction set the kernels use: "avx512_vnni", "avx_vnni", "avx2", "scalar". */
PYRT_API const char* pyrt_moe_isa(void) PYRT_NOEXCEPT;

/* Bytes of a matrix's planes at `level`; 0 for a shape that is not valid or a level outside it. */
PYRT_API int64_t pyrt_moe_plane_bytes(const pyrt_moe_shape* shape, int32_t level) PYRT_NOEXCEPT;

typedef struct pyrt_moe_store pyrt_moe_store;

/* Open a store; no extent is read. PYRT_ENOENT, PYRT_EIO; PYRT_ECORRUPT for a file that is
 * truncated, half-written or damaged, PYRT_EVERSION for one this library does not know. */
PYRT_API pyrt_status pyrt_moe_store_open(const char* path, pyrt_moe_store** out) PYRT_NOEXCEPT;
PYRT_API void pyrt_moe_store_close(pyrt_moe_store* store) PYRT_NOEXCEPT;
PYRT_API pyrt_status pyrt_moe_store_info(const pyrt_moe_store* store,
                                         pyrt_moe_info* out) PYRT_NOEXCEPT;
/* All extents in file order: extents[num_extents]. */
PYRT_API pyrt_status pyrt_moe_store_extents(const pyrt_moe_store* store, pyrt_moe_extent* extents,
                                            uint64_t num_extents) PYRT_NOEXCEPT;
/* Read extent `index` (of that order) into out[bytes] and check it. PYRT_EINVAL, PYRT_EIO,
 * PYRT_ECORRUPT; `out` may then hold anything. */
PYRT_API pyrt_status pyrt_moe_store_read(const pyrt_moe_store* store, uint64_t index, void* out,
                                         uint64_t bytes) PYRT_NOEXCEPT;

typedef struct pyrt_moe_writer pyrt_moe_writer;

/* Begin a store in a temporary file beside `path`. */
PYRT_API pyrt_status pyrt_moe_writer_create(const char* path, const pyrt_moe_info* info,
                                            pyrt_moe_writer** out) PYRT_NOEXCEPT;
/* Remove the temporary file unless the store was committed. */
PYRT_API void pyrt_moe_writer_destroy(pyrt_moe_writer* writer) PYRT_NOEXCEPT;
/* Append an extent: layer, expert, level (or dense, number, shape), unit, error and energy of
 * `extent` are used. */
PYRT_API pyrt_status pyrt_moe_writer_add(pyrt_moe_writer* writer, const pyrt_moe_extent* extent,
                                         const void* data, uint64_t bytes) PYRT_NOEXCEPT;
/* Finish the file, sync it and give it its name. PYRT_ESTATE if a layer is not whole. */
PYRT_API pyrt_status pyrt_moe_writer_commit(pyrt_moe_writer* writer) PYRT_NOEXCEPT;

/* Quantize weights[rows, columns] (rows `stride` apart) into planes[levels], buffers of
 * pyrt_moe_plane_bytes each. importance[columns] weighs errors, or NULL; gain[levels] (0..1, or
 * NULL) gives back what least squares takes from a width's gain; `search` is how many places are
 * tried for each end of a group's range, 2..16, or 1: the whole range. unit[1], error[levels],
 * energy[1]. PYRT_EINVAL names the place of a weight that is not finite. */
PYRT_API pyrt_status pyrt_moe_quantize(const float* weights, int64_t stride,
                                       const pyrt_moe_shape* shape, const float* importance,
                                       const float* gain, int32_t search, uint8_t* const* planes,
                                       float* unit, float* error, float* energy) PYRT_NOEXCEPT;

/* out[rows, columns] = the weights at `level`. */
PYRT_API pyrt_status pyrt_moe_dequantize(const pyrt_moe_shape* shape, const uint8_t* const* planes,
                                         int32_t level, float unit, float* out) PYRT_NOEXCEPT;

/* out[n, rows] = x[n, columns] . w^T with w at `level`; activations are int8 in groups of 32. */
PYRT_API pyrt_status pyrt_moe_linear(const pyrt_moe_shape* shape, const uint8_t* const* planes,
                                     int32_t level, float unit, const float* x, int64_t n,
                                     float* out) PYRT_NOEXCEPT;

/* One layer's experts in memory. */
typedef struct pyrt_moe_layer {
  uint32_t struct_size;
  int32_t levels;
  int64_t hidden;
  int64_t ffn;
  int64_t experts;
  uint8_t bits[3][4];
  uint32_t reserved;
  const uint8_t* const* planes; /* [experts, levels]: extents' data, or NULL where not loaded */
  const float* units;           /* [experts, 3] */
} pyrt_moe_layer;

/* out[n, hidden] = sum over slots s, in slot order, of
 *   weights[n, s] * down . (silu(gate . x) * (up . x))
 * of expert ids[n, s] at level levels[n, s] (levels NULL: `level` for all). An id of -1 or a level
 * of PYRT_MOE_SKIP skips the slot. PYRT_EINVAL for an id or level outside the layer, or one whose
 * planes are not all loaded; `out` is then unchanged. */
PYRT_API pyrt_status pyrt_moe_ffn(const pyrt_moe_layer* layer, const float* x, int64_t n,
                                  const int32_t* ids, const float* weights, int64_t top_k,
                                  const uint8_t* levels, int32_t level, float* out) PYRT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
