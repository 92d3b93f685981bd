// The cuckoo filter: approximate membership with deletion, for any number of threads at once.
//
// What it is. A multiset of 64-bit keys (or strings, by their hash) that keeps a fingerprint of 8
// or 16 bits for each: `contains` never says no to a key that is in, and says yes to one that is
// not with a probability of about 2 * slots * load / 2^bits. layout.hpp has the memory layout and
// where keys go, core.hpp what an operation does and why nothing present is ever missed, evict.hpp
// how room is made. An insert that fails has displaced nothing.
//
// Capacity. So many distinct keys fit: segments of at most 2^16 slots, filled to 95 % (small ones
// less, since chance weighs more there).
//
// Ownership. One block of memory: words, then epochs and counters; huge pages from 4 MiB on.
//
// Threads. Every operation may run beside every other, but `clear` and what replaces the content
// wait for running calls and hold new ones back (a shared mutex: one atomic per call, not per key).
// Large batches are cut over the process's thread pool. After a fork the child may read and write
// its copy, if no call was running.
//
// Duplicates. A key may be in up to 2 * slots times; one more gives kDupLimit. Deleting a key that
// is not in takes out a key with an equal fingerprint and bucket with the false-positive
// probability: never do it.
//
// File. 128 bytes of header and the words as they are in memory (docs/filter_format.md).
//
// Sources: Fan et al., "Cuckoo Filter: Practically Better Than Bloom" (CoNEXT 2014); Dortmann et
// al., arXiv 2603.15486.
#pragma once

#include <atomic>
#include <cstdint>
#include <shared_mutex>
#include <string>
#include <vector>

#include "filter/batch.hpp"

namespace pyruntime::filter {

struct Options {
  uint64_t capacity = 0;  // 1..2^38
  uint32_t bits = 16;     // 8 or 16
  uint32_t slots = 8;     // per bucket, 8 or 16
  uint64_t seed = 0;
};

// The header of a file; little-endian, 128 bytes.
struct FileHeader {
  char magic[8];  // "PYRTCKF1"
  uint16_t major;
  uint16_t minor;
  uint32_t header_bytes;
  uint8_t bits;
  uint8_t slots;
  uint8_t key_kind;  // 0 unknown, 1 integers, 2 strings: what the caller put in
  uint8_t reserved0;
  uint32_t buckets;  // per segment
  uint64_t seed;
  uint64_t num_segments;
  uint64_t capacity;
  uint64_t occupied;
  uint64_t body_bytes;
  uint32_t threshold;
  uint8_t reserved1[44];
  uint64_t body_hash;    // XXH64, seed 0
  uint64_t header_hash;  // of all before it
};
static_assert(sizeof(FileHeader) == 128);

struct Info {
  uint64_t capacity, occupied, num_slots, bytes, seed, num_segments;
  uint32_t bits, slots, buckets;
  uint64_t moves, retries, max_path;
  double expected_fpr;
};

class Filter {
 public:
  explicit Filter(const Options& options);  // throws PYRT_EINVAL, PYRT_ENOMEM
  ~Filter();
  Filter(const Filter&) = delete;
  Filter& operator=(const Filter&) = delete;

  // Per-key results as in core.hpp; return how many keys were stored, removed or found. `unique`:
  // keys that are there already (or look so) are left out, as kExists.
  uint64_t insert(const uint64_t* keys, size_t n, uint8_t* status, bool unique);
  uint64_t remove(const uint64_t* keys, size_t n, uint8_t* status);
  uint64_t contains(const uint64_t* keys, size_t n, uint8_t* out) const;
  void count(const uint64_t* keys, size_t n, uint32_t* out) const;

  void clear();
  Info info() const;
  uint64_t seed() const noexcept { return view_.seed; }
  // Counts the occupied slots again; throws PYRT_ECORRUPT if they are not as counted.
  void check() const;
  // A hash of all words, for tests: a failed insert leaves it as it was.
  uint64_t words_hash() const;

  // Geometry, with this filter's own addresses; and its words.
  const View& view() const noexcept { return view_; }
  uint32_t bits() const noexcept { return bits_; }
  uint32_t slots() const noexcept { return slots_; }
  uint64_t words_bytes() const noexcept { return body_bytes_; }
  void read_words(void* out) const;
  void write_words(const void* words);

  uint64_t file_bytes() const noexcept { return sizeof(FileHeader) + body_bytes_; }
  // Writes file_bytes() bytes. `key_kind` is kept for the reader.
  void save(void* out, uint8_t key_kind) const;
  // Reads what `save` wrote; checks everything before it allocates. Throws PYRT_ECORRUPT,
  // PYRT_EVERSION, PYRT_ENOMEM.
  static Filter* load(const void* data, size_t bytes, uint8_t* key_kind);

 private:
  Filter() = default;
  void allocate();
  uint64_t recount() const;

  uint32_t bits_ = 0;
  uint32_t slots_ = 0;
  uint64_t capacity_ = 0;
  uint64_t body_bytes_ = 0;
  uint64_t mapped_bytes_ = 0;
  void* base_ = nullptr;
  View view_{};
  const Kernels* kernels_ = nullptr;
  std::atomic<int64_t> occupied_{0};
  mutable std::shared_mutex gate_;
};

// Strings by offsets[n + 1] into data, as keys: XXH64 with the filter's seed.
void hash_strings(uint64_t seed, const char* data, const int64_t* offsets, size_t n,
                  uint64_t* keys);

}  // namespace pyruntime::filter
