// Copies of block runs between two places, in as few and as large pieces as their layouts allow.
//
// A Space is where blocks of one KV group lie. A block has `bases.size()` pieces, K and V of each
// layer; piece p of block b is at bases[p] + b * block_stride. A run of blocks that is contiguous
// on both sides is one copy per piece; where pieces follow each other on both sides too (packed
// blocks), it is one copy in all.
//
// Why not memcpy. What is swapped exceeds the caches by far, but single pieces do not, and memcpy
// decides by the size of one call: for pieces of 512 KiB it fetches the destination's lines before
// it overwrites them and reaches 60 % of what one large memcpy does. `stream` writes past the
// caches whatever the size. Below kStreamBytes in all, memcpy: what is small is read again soon.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kv/types.hpp"

namespace pyruntime::kv {

struct SwapRun {
  BlockId from;
  BlockId to;
  uint32_t count;
};

struct Space {
  std::vector<char*> bases;  // one per piece
  uint64_t block_stride = 0;
  uint64_t piece_bytes = 0;
  uint32_t num_blocks = 0;

  uint64_t block_bytes() const noexcept { return piece_bytes * bases.size(); }
  // Throws PYRT_EINVAL for what cannot be a layout.
  void check() const;
};

// Adds a block to runs, prolonging the last one where it goes on on both sides.
void add_run(std::vector<SwapRun>& runs, BlockId from, BlockId to);

// The shape of a copy between two spaces.
class CopyShape {
 public:
  static constexpr uint64_t kStreamBytes = uint64_t{1} << 20;
  static constexpr uint64_t kPartBytes = uint64_t{1} << 20;  // at most, between two looks at `stop`

  CopyShape(const Space& from, const Space& to);  // throws PYRT_EINVAL unless they agree

  // Separate copies a run of `count` blocks takes.
  uint64_t descriptors(uint32_t count) const noexcept {
    return joined_blocks_ ? (joined_pieces_ ? 1 : pieces_) : count * (joined_pieces_ ? 1 : pieces_);
  }

  // Copies a run; calls `go_on` before each part and ends when it says false. Returns whether all
  // was copied. `streaming`: past the caches; then publish with stream_fence() before telling
  // others.
  template <class GoOn>
  bool copy(const Space& from, const Space& to, const SwapRun& run, bool streaming,
            GoOn&& go_on) const;

 private:
  uint64_t pieces_;
  bool joined_blocks_;  // a run of blocks is contiguous on both sides, piece by piece
  bool joined_pieces_;  // the pieces of one block are contiguous on both sides
};

struct CopyKernels {
  const char* name;
  void (*stream)(char* to, const char* from, size_t bytes) noexcept;
};
const CopyKernels& copy_kernels() noexcept;         // in use
const CopyKernels& copy_kernels_scalar() noexcept;  // for tests
void stream_fence() noexcept;

template <class GoOn>
bool CopyShape::copy(const Space& from, const Space& to, const SwapRun& run, bool streaming,
                     GoOn&& go_on) const {
  const auto kernel = copy_kernels().stream;
  const uint64_t blocks = joined_blocks_ ? 1 : run.count;
  const uint64_t pieces = joined_pieces_ ? 1 : pieces_;
  const uint64_t bytes =
      from.piece_bytes * (joined_blocks_ ? run.count : 1) * (joined_pieces_ ? pieces_ : 1);
  for (uint64_t piece = 0; piece < pieces; ++piece) {
    for (uint64_t block = 0; block < blocks; ++block) {
      char* target = to.bases[piece] + (run.to + block) * to.block_stride;
      const char* source = from.bases[piece] + (run.from + block) * from.block_stride;
      for (uint64_t done = 0; done < bytes; done += kPartBytes) {
        if (!go_on()) return false;
        const size_t part = bytes - done < kPartBytes ? bytes - done : kPartBytes;
        if (streaming) {
          kernel(target + done, source + done, part);
        } else {
          __builtin_memcpy(target + done, source + done, part);
        }
      }
    }
  }
  return true;
}

}  // namespace pyruntime::kv
