// A prepared decode batch: sequences that each grow by one token per step, again and again.
//
// What a scheduler asks for most often, with everything that does not change between steps kept:
// handles resolved, the caller's arrays bound. A row whose open block does not fill costs a check,
// a token store and a few counters; the others (one in block_size) publish their block and take
// one, in two passes so that the cache misses of one row overlap those of the next. Rows that were
// changed elsewhere since (kTouched), or that share their open block, take the general way once.
//
// A step says that all tokens appended before it are valid in all layers now: the engine's work
// that wrote them is ordered before whatever reads them.
#pragma once

#include "kv/block_pool.hpp"

namespace pyruntime::kv {

class Batch {
 public:
  struct Arrays {               // of one group; each may be null
    int32_t* tables = nullptr;  // [rows, stride]: entries are written as they come
    size_t stride = 0;
    int32_t* slots = nullptr;  // [rows]: where the new token goes, block * block_size + offset
  };

  // Throws PYRT_ESTATE for handles that are none, swapped out, or there twice. `lengths` (may be
  // null) receives the tokens each row holds. Tables are written whole, -1 behind the last entry.
  Batch(BlockPool& pool, std::span<const SeqHandle> seqs, std::span<const Arrays> arrays,
        int32_t* lengths);

  uint32_t rows() const { return static_cast<uint32_t>(slots_.size()); }

  // Appends tokens[i] to row i. False: not enough blocks, `result.left` says by how much, and
  // nothing has changed. Throws PYRT_ESTATE when a row's sequence has ended or was swapped out, and
  // PYRT_EINVAL when a table row is full; nothing has changed then either.
  bool advance(const int32_t* tokens, StepResult& result);

 private:
  void open_block(uint32_t row, int32_t token, uint64_t key, StepResult& result);
  void general(uint32_t row, int32_t token, StepResult& result);
  void write_row(uint32_t row);

  BlockPool& pool_;
  std::vector<uint32_t> slots_, generations_;
  std::vector<Arrays> arrays_;
  int32_t* lengths_;
  std::vector<int32_t> bases_[kMaxGroups];  // first slot of each row's open block
  std::vector<uint32_t> full_, touched_;    // rows of the step that is made
  std::vector<uint64_t> keys_;
};

}  // namespace pyruntime::kv
