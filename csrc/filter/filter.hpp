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
// Growth. A chain of generations, each a table of twice the segments of the one before, with the
// same hash, fingerprints and buckets. Inserts go to the newest that holds less than it is planned
// for, and where they find no room, to any other; lookups and deletes go newest first. Segment / 2
// of a generation is the segment of the one before (layout.hpp), so keys that collide in one
// generation collide in all older ones too. That is why a delete never makes another key disappear:
// give every key that is in one copy of its own. Where a delete of x takes the copy of y, in a
// generation not older than that of x's copy, the two collide there and so where x's copy is, which
// is y's from now on. A key's copy thus only ever moves to older generations, which a lookup reads
// after the newer ones: none is missed on the way.
//
// Ownership. One block of memory per generation: words, then epochs and counters; huge pages from
// 4 MiB on.
//
// Threads. Every operation may run beside every other, but `grow`, `clear` and what replaces the
// content wait for running calls and hold new ones back (one atomic per call, not per key).
// Large batches are cut over the process's thread pool, and for tables that no cache holds sorted
// by segment first, but for deletes (partition.hpp). After a fork the child may read and write its
// copy, if no call was running.
//
// Duplicates. A key may be in up to 2 * slots times, in each generation; one more gives kDupLimit,
// also where older generations have no room for another reason. Deleting a key that is not in, or
// whose insert has not returned, takes out a key with an equal fingerprint and bucket with the
// false-positive probability: never do it.
//
// File. 128 bytes of header and the words as they are in memory (file.cpp, docs/filter_format.md).
// So a filter may also be a file that is mapped: lookups read its pages, all else is refused.
//
// Sources: Fan et al., "Cuckoo Filter: Practically Better Than Bloom" (CoNEXT 2014); Dortmann et
// al., arXiv 2603.15486.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "filter/batch.hpp"
#include "filter/gate.hpp"

namespace pyruntime::filter {

// A file mapped read-only; an empty one where there is none.
class FileMap {
 public:
  FileMap() = default;
  explicit FileMap(const char* path);  // throws PYRT_ENOENT, PYRT_EIO
  ~FileMap();
  FileMap(FileMap&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
    other.data_ = nullptr;
  }
  FileMap& operator=(FileMap&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  const void* data() const noexcept { return data_; }
  size_t bytes() const noexcept { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

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
  uint8_t key_kind;     // 0 unknown, 1 integers, 2 strings: what the caller put in
  uint8_t generations;  // 0 in version 1, which has one; from 2 on in version 2
  uint32_t buckets;     // per segment
  uint64_t seed;
  uint64_t num_segments;  // of the first generation
  uint64_t capacity;      // of the first generation
  uint64_t occupied;
  uint64_t body_bytes;
  uint32_t threshold;
  uint8_t reserved1[44];
  uint64_t body_hash;    // XXH64, seed 0
  uint64_t header_hash;  // of all before it
};
static_assert(sizeof(FileHeader) == 128);

// Sums over all generations, but num_segments is that of the first.
struct Info {
  uint64_t capacity, occupied, num_slots, bytes, seed, num_segments;
  uint32_t bits, slots, buckets, generations;
  uint64_t moves, retries, max_path;
  double expected_fpr;
};

// One generation.
struct Table {
  Table() = default;
  ~Table();
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  View view{};
  uint64_t words_bytes = 0;
  uint64_t mapped_bytes = 0;
  void* base = nullptr;
  uint64_t planned = 0;  // distinct keys that fit for sure
  // The sum over all generations is exact; an undone move may take from another (core.hpp).
  std::atomic<int64_t> occupied{0};
};

class Filter {
 public:
  explicit Filter(const Options& options);  // throws PYRT_EINVAL, PYRT_ENOMEM
  Filter(const Filter&) = delete;
  Filter& operator=(const Filter&) = delete;

  // Per-key results as in core.hpp; return how many keys were stored, removed or found. `unique`:
  // keys that are there already (or look so) are left out, as kExists.
  uint64_t insert(const uint64_t* keys, size_t n, uint8_t* status, bool unique);
  uint64_t remove(const uint64_t* keys, size_t n, uint8_t* status);
  uint64_t contains(const uint64_t* keys, size_t n, uint8_t* out) const;
  // As contains, one bit per key: key i is bit i % 8 of out[i / 8]. Bits behind the last are 0.
  uint64_t contains_bits(const uint64_t* keys, size_t n, uint8_t* out) const;
  void count(const uint64_t* keys, size_t n, uint32_t* out) const;

  // Adds a generation, unless there are more than `seen` by now (0: in any case). Throws
  // PYRT_ENOMEM, and PYRT_EFULL at the limit of segments.
  void grow(uint32_t seen);
  // Takes generations away, the newest first, as long as what is in one fits into the older ones
  // (compact.cpp); returns how many. Throws PYRT_ENOMEM, and PYRT_ECORRUPT as `check`.
  uint32_t compact();
  // Adds what is in another filter of the same geometry and seed: what it holds of a key, bucket
  // and fingerprint, is enough. A copy goes to the same generation or an older one, because its
  // place in a younger one is not known. Throws PYRT_EINVAL; PYRT_EFULL, PYRT_ENOMEM and is as
  // before.
  void merge(const Filter& other);
  // Empties it and leaves one generation.
  void clear();
  Info info() const;
  uint64_t seed() const noexcept { return seed_; }
  // Counts the occupied slots again; throws PYRT_ECORRUPT if they are not as counted.
  void check() const;
  // A hash of all words, for tests: a failed insert leaves it as it was.
  uint64_t words_hash() const;

  // When large batches are sorted, for tests and measurements. No call may run beside it.
  void set_sort_limits(const SortLimits& limits) noexcept { sort_limits_ = limits; }

  // Geometry and words of a filter of one generation, for devices: a copy of its view, with this
  // filter's own addresses. Throw PYRT_EUNSUPPORTED where there are more.
  View view() const;
  uint32_t bits() const noexcept { return bits_; }
  uint32_t slots() const noexcept { return slots_; }
  uint64_t words_bytes() const;  // of the first generation
  void read_words(void* out) const;
  // Replaces the content, of all generations, by one of these words.
  void write_words(const void* words);

  uint64_t file_bytes() const;
  // Writes `bytes` bytes; throws PYRT_EINVAL if that is not file_bytes() (any more). `key_kind` is
  // kept for the reader.
  void save(void* out, uint64_t bytes, uint8_t key_kind) const;
  // Reads what `save` wrote; checks everything before it allocates. Throws PYRT_ECORRUPT,
  // PYRT_EVERSION, PYRT_ENOMEM.
  static Filter* load(const void* data, size_t bytes, uint8_t* key_kind);
  // Maps a file that `save` wrote: lookups read it where it is. What would change it throws
  // PYRT_ESTATE. Without `verify` neither the body's hash nor its count is checked, and no page is
  // read before its time; a damaged body then gives wrong answers, never more than that. Throws as
  // `load`, and PYRT_ENOENT, PYRT_EIO.
  static Filter* open_map(const char* path, bool verify, uint8_t* key_kind);

 private:
  using Tables = std::vector<std::unique_ptr<Table>>;  // the oldest generation first

  Filter() = default;
  // `words`: in a mapped file instead of the table's own memory.
  std::unique_ptr<Table> make_table(uint64_t num_segments, const void* words = nullptr) const;
  void push_table(Tables& tables, std::unique_ptr<Table> table) const;
  void drop_generations();
  uint64_t insert_into_generations(const uint64_t* keys, size_t n, uint8_t* status, bool unique);
  Status insert_anywhere(uint64_t key, bool unique);
  bool contains_one(uint64_t key) const;
  uint64_t contains_here(const uint64_t* keys, size_t n, uint8_t* out) const;
  uint64_t recount(const Table& table) const;
  uint64_t plan(uint64_t num_segments, size_t generation) const;
  uint64_t body_bytes() const;
  void require_one_generation() const;
  void require_writable() const;
  static std::unique_ptr<Filter> with_geometry(const FileHeader& header);

  uint32_t bits_ = 0;
  uint32_t slots_ = 0;
  uint64_t capacity_ = 0;  // of the first generation
  uint64_t seed_ = 0;
  uint32_t buckets_ = 0;
  uint32_t threshold_ = 0;
  const Kernels* kernels_ = nullptr;
  SortLimits sort_limits_;
  FileMap map_;
  Tables tables_;  // behind the gate
  mutable Gate gate_;
};

// Where the words of a generation begin in a file's body: each at a multiple of 64 bytes. The last
// one's end is the body's.
struct Extent {
  uint64_t begin, bytes;
};
Extent extent_of(uint64_t num_segments, uint32_t buckets, uint32_t bits, uint32_t slots,
                 uint32_t generation);
bool valid_shape(uint32_t bits, uint32_t slots);

inline constexpr uint64_t kMaxCapacity = uint64_t{1} << 38;
inline constexpr uint32_t kMaxGenerations = 25;  // one segment, doubled up to kMaxSegments

// Strings by offsets[n + 1] into data, as keys: XXH64 with the filter's seed.
void hash_strings(uint64_t seed, const char* data, const int64_t* offsets, size_t n,
                  uint64_t* keys);

}  // namespace pyruntime::filter
