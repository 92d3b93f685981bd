// A prepared decode batch: sequences that each grow by one token per step, again and again.
//
// What a scheduler asks for most often, with everything that does not change between steps kept:
// handles resolved, the caller's arrays bound, and, since all rows advance together, which rows'
// blocks will be full at which step. So a step has two parts: rows whose block is full (one in
// block_size) publish it and take another, in passes so that the cache misses of one row overlap
// those of the next; then every row gets its token, in one loop without branches.
// The pool counts changes made elsewhere (`touches_`); after one the batch looks at all its rows
// again. Rows that were changed, or that share their open block, take the general way once.
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
  // `attempt`: a refusal is not counted, another try follows.
  bool advance(const int32_t* tokens, StepResult& result, bool attempt = false);

 private:
  void look();
  void hold_back(const uint32_t* full, uint32_t num_full, int64_t* need);
  void open_block(uint32_t row, uint64_t key, StepResult& result);
  void general(uint32_t row, StepResult& result);
  void write_row(uint32_t row);
  void set_bases(uint32_t row, uint32_t at);

  BlockPool& pool_;
  uint64_t id_;
  std::vector<uint32_t> slots_, generations_;
  std::vector<Arrays> arrays_;
  int32_t* lengths_;
  std::vector<int32_t> bases_[kMaxGroups];  // first slot of each row's open block

  // Plain rows by the residue of their fill when they were last looked at: those of residue r are
  // rows_of_[begin_of_[r] .. begin_of_[r + 1]), and full when (r + phase_) % block_size == 0.
  uint64_t seen_touches_ = 0;
  bool seen_ = false;
  uint32_t phase_ = 0;
  std::vector<uint32_t> rows_of_, begin_of_;
  std::vector<uint32_t> touched_;  // rows that take the general way in the next step
  std::vector<uint64_t> keys_;
  std::vector<int32_t> unwanted_;  // where nobody asks for slots or lengths
};

}  // namespace pyruntime::kv
