// Copying rows of bytes between scattered and packed places: the one kernel behind every bulk copy.
//
// A room says where its rows are with a small struct that is copied to the device:
//   struct Places {
//     __device__ bool locate(uint64_t row, const unsigned char** from, unsigned char** to) const;
//   };
// locate gives the two addresses of a row, or false to leave the row alone. Rows must not overlap.
//
// Rows are cut into pieces of kPieceBytes, so that few long rows fill a GPU as many short ones do.
// A tile of consecutive threads, as wide as a piece has words (at most a block), copies one piece,
// four words in flight per thread; tiles stride over all pieces. Words are the widest that every
// address allows (16, 4 or 1 bytes); a row's last bytes that fill no word are copied one by one.
#pragma once

#include "cuda/include/device.cuh"

namespace pyruntime::dev {

inline constexpr uint64_t kPieceBytes = 16 << 10;
inline constexpr uint32_t kCopyThreads = 256;
inline constexpr uint64_t kCopyBlocks = 4096;  // at most; enough for any GPU, and grids stay small

// The bytes are of any type, so a word may alias it.
struct __attribute__((may_alias)) Word16 {
  uint64_t low, high;
} __attribute__((aligned(16)));
struct __attribute__((may_alias)) Word4 {
  uint32_t bits;
};
struct __attribute__((may_alias)) Word1 {
  uint8_t bits;
};

template <class Word>
__device__ inline void copy_bytes(unsigned char* to, const unsigned char* from, uint64_t bytes,
                                  uint32_t lane, uint32_t lanes) {
  auto* out = reinterpret_cast<Word*>(to);
  const auto* in = reinterpret_cast<const Word*>(from);
  const uint64_t words = bytes / sizeof(Word);
  uint64_t i = lane;
  for (; i + uint64_t{3} * lanes < words; i += uint64_t{4} * lanes) {
    const Word a = in[i], b = in[i + lanes], c = in[i + 2 * lanes], d = in[i + 3 * lanes];
    out[i] = a;
    out[i + lanes] = b;
    out[i + 2 * lanes] = c;
    out[i + 3 * lanes] = d;
  }
  for (; i < words; i += lanes) out[i] = in[i];
  for (i = words * sizeof(Word) + lane; i < bytes; i += lanes) to[i] = from[i];
}

// `lanes` is a power of two that divides the block.
template <class Word, class Places>
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows_kernel(Places places, uint64_t rows, uint64_t row_bytes, uint32_t lanes) {
  const uint64_t pieces = (row_bytes + kPieceBytes - 1) / kPieceBytes;
  const uint64_t thread = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const uint64_t tiles = uint64_t{gridDim.x} * blockDim.x / lanes;
  for (uint64_t item = thread / lanes; item < rows * pieces; item += tiles) {
    const uint64_t begin = item % pieces * kPieceBytes;
    const unsigned char* from;
    unsigned char* to;
    if (!places.locate(item / pieces, &from, &to)) continue;
    copy_bytes<Word>(to + begin, from + begin, min(kPieceBytes, row_bytes - begin),
                     static_cast<uint32_t>(thread % lanes), lanes);
  }
}

template <class Word, class Places>
int copy_rows_by_words(const Places& places, uint64_t rows, uint64_t row_bytes, void* stream) {
  const uint64_t piece_words = (min(row_bytes, kPieceBytes) + sizeof(Word) - 1) / sizeof(Word);
  uint32_t lanes = 1;
  while (lanes < kCopyThreads && lanes < piece_words) lanes *= 2;
  const uint64_t items = rows * ((row_bytes + kPieceBytes - 1) / kPieceBytes);
  const uint64_t tiles_per_block = kCopyThreads / lanes;
  const uint64_t blocks = min((items + tiles_per_block - 1) / tiles_per_block, kCopyBlocks);
  return PYRT_LAUNCH((copy_rows_kernel<Word, Places>), dim3(static_cast<unsigned>(blocks)),
                     dim3(kCopyThreads), stream, places, rows, row_bytes, lanes);
}

// Launches the copy of `rows` rows. `alignment` is the bitwise or of every address and distance
// that locate() adds up: its low bits say how wide a word may be.
template <class Places>
int copy_rows(const Places& places, uint64_t rows, uint64_t row_bytes, uint64_t alignment,
              void* stream) {
  if (rows == 0 || row_bytes == 0) return 0;
  if (alignment % 16 == 0) return copy_rows_by_words<Word16>(places, rows, row_bytes, stream);
  if (alignment % 4 == 0) return copy_rows_by_words<Word4>(places, rows, row_bytes, stream);
  return copy_rows_by_words<Word1>(places, rows, row_bytes, stream);
}

}  // namespace pyruntime::dev
