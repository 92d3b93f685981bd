// Memory laid out as KV blocks, filled with numbers that tell whose they are.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "kv/copy.hpp"

namespace pyruntime::kv::test {

enum class Layout { layers, packed, padded };

class Memory {
 public:
  Memory(Layout layout, uint32_t num_blocks, uint32_t num_pieces, uint64_t piece_bytes)
      : words_(piece_bytes / 8) {
    const uint64_t gap = layout == Layout::padded ? 64 : 0;
    bytes_.resize(num_blocks * num_pieces * (piece_bytes + gap) + 64);
    char* const base = bytes_.data() + 64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64;
    space.piece_bytes = piece_bytes;
    space.num_blocks = num_blocks;
    const bool packed = layout == Layout::packed;
    space.block_stride = packed ? piece_bytes * num_pieces : piece_bytes + gap;
    for (uint32_t p = 0; p < num_pieces; ++p) {
      space.bases.push_back(base + p * (packed ? piece_bytes : space.block_stride * num_blocks));
    }
  }

  // Fills a block with `tag`, the piece and the place in it.
  void fill(BlockId block, uint32_t tag) {
    for (uint32_t p = 0; p < space.bases.size(); ++p) {
      uint64_t* words = piece(block, p);
      for (uint64_t i = 0; i < words_; ++i) words[i] = word(tag, p, i);
    }
  }
  // The block's tag; ~0u if it does not hold one in all its words.
  uint32_t tag(BlockId block) const {
    const auto found = static_cast<uint32_t>(*piece(block, 0) >> 32u);
    for (uint32_t p = 0; p < space.bases.size(); ++p) {
      const uint64_t* words = piece(block, p);
      for (uint64_t i = 0; i < words_; ++i) {
        if (words[i] != word(found, p, i)) return ~0u;
      }
    }
    return found;
  }

  Space space;

 private:
  static uint64_t word(uint32_t tag, uint32_t p, uint64_t i) {
    return uint64_t{tag} << 32u | p << 16u | (i & 0xffffu);
  }
  uint64_t* piece(BlockId block, uint32_t p) const {
    return reinterpret_cast<uint64_t*>(space.bases[p] + block * space.block_stride);
  }
  uint64_t words_;
  std::vector<char> bytes_;
};

}  // namespace pyruntime::kv::test
