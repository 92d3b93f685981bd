// The nested code's memory layout, the same in a store, in memory and on a GPU (docs/mxs.md).
//
// A matrix [rows, columns] is cut into tiles of 16 rows. A tile holds, along K, records of
// super-blocks of 256 columns; a super-block has up to 8 groups of 32 columns (the last one may
// have fewer). Each weight has an 8-bit code u, stored in planes from the top bit down: a base
// plane, then refinements of 2 or 4 bits. With the planes that make width b,
//
//   w_b = unit * (d_b * scale[g] * (u >> (8 - b) + 1/2) - m_b * min[g])
//
// Record of a super-block with G groups, for 16 rows:
//
//   base plane:   [scale u8[16] | min u8[16]] x 8    256 B   (groups past G are zero)
//   every plane:  d fp16[16] | m fp16[16]             64 B   (of the width this plane completes)
//                 G x codes                           64 * bits B each
//
// Codes of a group: vectors of 64 B = 16 rows x 4 bytes; byte j of row r holds 8/bits fields, field
// f at bit f * bits. Vector v, field f, byte j is column (v * (8 / bits) + f) * 4 + j of the group:
// with one AND (no shift) a field meets four consecutive activations of its row in one dot.
//
// Compiles under g++ and nvcc: plain data, no containers, no exceptions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyruntime::moe {

inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kGroup = 32;
inline constexpr int64_t kSuper = 256;
inline constexpr int64_t kSuperGroups = kSuper / kGroup;
inline constexpr int64_t kMetaBytes = 32 * kSuperGroups;  // scales and mins of a super-block
inline constexpr int64_t kPairBytes = 4 * kTileRows;      // d and m of a super-block
inline constexpr int kMaxLevels = 4;
inline constexpr int64_t kMaxSide = int64_t{1} << 20;  // rows or columns of a matrix

// One expert's matrices, in the order they lie in an extent.
enum Matrix : int { kGate = 0, kUp = 1, kDown = 2, kMatrices = 3 };

// A matrix and the width it has at each level. Level l adds bits[l] - bits[l - 1] bits; where that
// is 0 the level's extent holds nothing of this matrix.
struct Shape {
  int64_t rows;
  int64_t columns;
  int32_t levels;
  uint8_t bits[kMaxLevels];
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t num_tiles(const Shape& s) { return ceil_div(s.rows, kTileRows); }
constexpr int64_t num_supers(const Shape& s) { return ceil_div(s.columns, kSuper); }
constexpr int64_t num_groups(const Shape& s) { return ceil_div(s.columns, kGroup); }

constexpr int plane_bits(const Shape& s, int level) {
  return s.bits[level] - (level > 0 ? s.bits[level - 1] : 0);
}

// The first level that holds bits of this matrix is 0 always: bits[0] > 0.
constexpr int64_t tile_bytes(const Shape& s, int level) {
  const int bits = plane_bits(s, level);
  if (bits == 0) return 0;
  return num_supers(s) * (kPairBytes + (level == 0 ? kMetaBytes : 0)) + num_groups(s) * 64 * bits;
}

constexpr int64_t plane_bytes(const Shape& s, int level) {
  return num_tiles(s) * tile_bytes(s, level);
}

// Widths that planes of 2, 4 and 8 bits can make: rising, the first and each difference in
// {2, 4, 8} (a difference may be 0 too), none over 8.
constexpr bool valid(const Shape& s) {
  if (s.rows < 1 || s.rows > kMaxSide || s.columns < 1 || s.columns > kMaxSide) return false;
  if (s.levels < 1 || s.levels > kMaxLevels) return false;
  for (int level = 0; level < s.levels; ++level) {
    const int bits = plane_bits(s, level);
    if (bits != 2 && bits != 4 && bits != 8 && !(bits == 0 && level > 0)) return false;
    if (s.bits[level] > 8) return false;
  }
  return true;
}

// ---- the file -------------------------------------------------------------------------------

inline constexpr char kMagic[8] = {'P', 'Y', 'R', 'T', 'M', 'X', 'S', '\0'};
inline constexpr uint64_t kCommitMark = 0x4b4f54494d4d4f43;  // "COMMITOK"
inline constexpr uint32_t kVersion = 1;
inline constexpr uint32_t kPage = 4096;

// First page of a store; the rest of the page is zero. All integers are little endian.
struct Header {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;  // sizeof(Header)
  uint32_t record_bytes;  // sizeof(Record)
  uint32_t page;          // alignment of extents
  uint64_t file_bytes;    // footer included
  uint64_t index_offset;  // num_records records
  uint64_t num_records;
  uint32_t num_layers;   // of the model, dense ones included
  uint32_t num_experts;  // per sparse layer
  uint32_t hidden;
  uint32_t ffn;
  uint32_t levels;
  uint8_t bits[kMatrices][kMaxLevels];  // of gate, up and down at each level
  uint8_t model_hash[32];               // of the checkpoint's config and tensor list
  uint32_t reserved[6];
  uint32_t crc;  // CRC-32C of all bytes before it
};
static_assert(sizeof(Header) == 144);

enum RecordKind : uint32_t { kExpertPlane = 0, kDenseMatrix = 1 };

// One extent: a plane of a whole expert (gate, up, down one after another, each as planes of its
// tiles), or all planes of one dense matrix, one after another.
struct Record {
  uint32_t kind;
  uint32_t layer;
  uint32_t expert;  // dense: which matrix of the layer, the writer's number
  uint32_t level;   // dense: 0
  uint64_t offset;  // a multiple of the page
  uint64_t bytes;   // data; the extent is padded with zeros to a multiple of the page
  uint32_t crc;     // CRC-32C of the data
  uint32_t flags;   // 0
  uint32_t rows;    // dense only
  uint32_t columns;
  uint32_t dense_levels;
  uint8_t dense_bits[kMaxLevels];
  float unit[kMatrices];    // power of two the matrix was divided by; dense: the first
  float error[kMatrices];   // sum of squared errors at this level (weighted if calibrated)
  float energy[kMatrices];  // sum of squares, weighted alike
  uint32_t reserved[9];
};
static_assert(sizeof(Record) == 128);

// Last bytes of a store.
struct Footer {
  uint64_t file_bytes;
  uint32_t index_crc;
  uint32_t crc;  // of the two fields before it
  uint64_t commit;
};
static_assert(sizeof(Footer) == 24);

constexpr Shape expert_shape(const Header& h, int matrix) {
  const bool down = matrix == kDown;
  Shape s{down ? h.hidden : h.ffn, down ? h.ffn : h.hidden, static_cast<int32_t>(h.levels), {}};
  for (int level = 0; level < kMaxLevels; ++level) s.bits[level] = h.bits[matrix][level];
  return s;
}

constexpr Shape dense_shape(const Record& r) {
  Shape s{r.rows, r.columns, static_cast<int32_t>(r.dense_levels), {}};
  for (int level = 0; level < kMaxLevels; ++level) s.bits[level] = r.dense_bits[level];
  return s;
}

// Offset of `matrix` in the extent of `level`, and (for kMatrices) the extent's data bytes.
constexpr int64_t matrix_offset(const Header& h, int level, int matrix) {
  int64_t at = 0;
  for (int i = 0; i < matrix; ++i) at += plane_bytes(expert_shape(h, i), level);
  return at;
}

constexpr uint64_t padded(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace pyruntime::moe
