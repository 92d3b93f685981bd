// Names of content that leaves the pool: in events, on the host and on disk, in other processes.
//
// The key of a block is the SHA-256 digest of a 64-byte head and all tokens up to the block's end:
//
//   key[i] = SHA-256( head | tokens[0 .. (i+1) * block_size) as little-endian int32 )
//   head   = SHA-256( "pyruntime-kv-1" 0 | len(secret) | secret | len(space) | space )  32 bytes
//            block_size as little-endian uint64, 24 bytes of 0
//
// with lengths as little-endian uint64, so that no two pairs (secret, space) give the same bytes.
// Pure: no pool is needed, and any language's SHA-256 computes it. Who does not know the deployment
// secret can neither predict keys nor test guesses of a prompt against keys seen in events.
//
// Cost. Blocks of 16 tokens are 64 bytes: one compression for the chain and one for the digest's
// padding. The two are independent (this block's padding, the next block's tokens), so they run
// side by side in about the time of one. A KeyChain keeps its place: going on costs what is new.
#pragma once

#include "kv/sha256.hpp"

namespace pyruntime::kv {

class KeyChain {
 public:
  // Throws PYRT_EINVAL unless block_size is 1 .. 2^20.
  KeyChain(const void* secret, size_t secret_bytes, const void* space, size_t space_bytes,
           uint32_t block_size, const ShaKernels& kernels = sha_kernels());

  uint64_t blocks() const noexcept { return blocks_; }

  // Where the tokens of a block are whole blocks of the hash, a chain's place is its state and
  // number of blocks: another chain with the same head may go on from there.
  bool resumable() const noexcept { return aligned_; }
  const ShaState& state() const noexcept { return state_; }
  void resume(const ShaState& state, uint64_t blocks) noexcept {
    state_ = state;
    blocks_ = blocks;
  }

  // Goes on over `n` further blocks and writes their keys, 32 bytes each.
  void extend(const int32_t* tokens, uint64_t n, uint8_t* keys) noexcept;

 private:
  void extend_aligned(const uint8_t* data, uint64_t n, uint8_t* keys) noexcept;

  const ShaKernels* kernels_;
  uint32_t block_size_;
  uint64_t blocks_ = 0;
  bool aligned_;    // blocks are whole 64-byte blocks of SHA-256
  ShaState state_;  // after all blocks, if aligned
  Sha256 stream_;   // if not
};

}  // namespace pyruntime::kv
