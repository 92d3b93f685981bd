// The disk tier: KV blocks in one file, under names of their content, there after a restart.
//
// What it is. A store of items of one size, each under a key of 32 bytes (export_key.hpp). A key
// names content for good, so nothing is ever changed: an item is there, or is not. The least
// recently used ones make room. A cache: whatever is in doubt is a miss, never wrong data.
//
//   0            header: magic, version, sizes, fingerprint, CRC-32C                one page
//   4096         records, 64 bytes for each slot                                   whole pages
//                { key[32] | sequence u64 | slot u32 | payload crc u32 | 0 u64 | 0 u32 | crc u32 }
//   data_offset  slot 0 | slot 1 | ...              item_bytes each, padded to whole pages
//
// Numbers are little-endian. A record is valid if its last CRC fits and it names its own slot; all
// zeroes are none. The payload's CRC goes over the key and the data, so that data cannot pass under
// another key. Checksums find damage; they do not withstand who can write to the file.
//
// Order of writes. Slots are num_items + a few spare ones, which are always free:
//
//   free slot, invalid record on disk
//     -> payload written -> sync -> record written, records of evicted items zeroed -> sync
//     -> visible                                    -> those slots are free
//
// so a record is never on disk before its payload, and a payload is overwritten only after its
// record was invalid on disk. A slot whose record may be valid there although it is free (`doubt`:
// after a failed write, a bad checksum, or from an older file) is zeroed and synced before it is
// used. Two syncs for each round of up to num_spare items. A crash at any point leaves each record
// old, new, or torn, which its CRC tells; all three are right.
//
// Opening makes the file, or reads its records and no payload. A file that is shorter than it was
// loses the items beyond its end. Of two records of one key the later counts. Recency is the order
// in which items were put; within a call the first key is the most recent, because a block is of
// no use without those before it.
//
// Failure. An error leaves what was there, and items of earlier rounds of the same call. Reads that
// fail say so and drop nothing; a payload that does not fit its checksum is dropped and counted.
//
// Threads. Any thread may call. One mutex guards the bookkeeping and is not held during I/O; puts
// take turns. Slots that are being read are pinned, and neither evicted nor written. In a forked
// child every call gives PYRT_ESTATE. Complexity: O(1) for each key beside its I/O; opening
// O(slots). Memory: 80 bytes for each slot, all of it taken when the file is opened.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "kv/disk_file.hpp"

namespace pyruntime::kv {

inline constexpr uint32_t kDiskPage = 4096;
inline constexpr uint32_t kDiskVersion = 1;
inline constexpr char kDiskMagic[8] = {'P', 'Y', 'R', 'T', 'K', 'V', 'D', '\n'};
inline constexpr uint32_t kMaxFingerprint = 1024;
inline constexpr uint64_t kMaxDiskSlots = uint64_t{1} << 24;

struct DiskHeader {
  char magic[8];
  uint32_t version;
  uint32_t record_bytes;
  uint64_t item_bytes;
  uint64_t num_slots;
  uint64_t num_spare;
  uint64_t data_offset;
  uint32_t fingerprint_bytes;
  uint8_t fingerprint[kMaxFingerprint];
  uint32_t crc;  // of all before
};
static_assert(sizeof(DiskHeader) == 1080 && sizeof(DiskHeader) <= kDiskPage);

using DiskKey = std::array<uint8_t, 32>;

struct DiskRecord {
  DiskKey key;
  uint64_t sequence;  // of the put, from 1; higher is later
  uint32_t slot;      // its own place
  uint32_t payload_crc;
  uint64_t reserved;
  uint32_t reserved2;
  uint32_t crc;  // of all before
};
static_assert(sizeof(DiskRecord) == 64 && kDiskPage % sizeof(DiskRecord) == 0);

struct DiskOptions {
  uint64_t item_bytes = 0;      // of a payload, 1 .. 2^30
  uint64_t capacity_bytes = 0;  // the file has at most so many
  std::string fingerprint;      // what the items are about; another one's file is refused
};

enum class DiskFound : uint8_t { miss = 0, hit = 1, corrupt = 2 };

struct DiskStats {
  uint64_t capacity = 0;  // items
  uint64_t items = 0;
  uint64_t hits = 0, misses = 0;  // keys asked for by get
  uint64_t corrupt = 0;           // items dropped for their checksum; misses as well
  uint64_t stored = 0;            // items written
  uint64_t evicted = 0;
  uint64_t failures = 0;  // calls that a read or write failed
  uint64_t bytes_read = 0, bytes_written = 0;
  uint64_t syncs = 0;
  uint64_t file_bytes = 0;
};

class Disk {
 public:
  // Throws PYRT_EINVAL (options; another fingerprint, item size or capacity than the file's),
  // PYRT_EVERSION, PYRT_ECORRUPT (no such file, or a damaged header), and what files throw.
  Disk(const std::string& path, const DiskOptions& options);
  Disk(std::unique_ptr<DiskFile> file, const std::string& name, const DiskOptions& options);
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  uint64_t item_bytes() const noexcept { return header_.item_bytes; }

  // Stores the items that are not there, `data` having item_bytes for each key; what is there
  // counts as used. They are durable when the call returns. Of more keys than there is room for,
  // the first. Returns how many were new.
  uint64_t put(const uint8_t* keys, uint64_t n, const void* data);
  // Reads items to their places in `out`; places of keys that are no hits are zeroed. Throws
  // PYRT_EIO for a failed read; `out` and `found` are then undefined.
  void get(const uint8_t* keys, uint64_t n, void* out, DiskFound* found);
  // How many keys, from the first on, are there; these count as used. No I/O.
  uint64_t match(const uint8_t* keys, uint64_t n);

  DiskStats stats();
  void fail_io(int64_t n, DiskFault fault) noexcept { file_.fail(n, fault); }
  // Throws PYRT_ECORRUPT unless the bookkeeping is consistent. Waits for a put in progress.
  void check();

 private:
  static constexpr uint32_t kNoSlot = 0xffffffffu;
  enum class State : uint8_t {
    free,
    taken,    // a put writes it
    present,  // in the index and the order
    leaving,  // a put zeroes its record
    dropped   // for its checksum, while somebody reads it
  };
  struct Slot {
    DiskKey key;
    uint64_t sequence;
    uint32_t crc;
    uint32_t chain;         // in the index
    uint32_t older, newer;  // in the order
    uint32_t readers;
    State state;
    bool doubt;  // the record on disk may be valid, or another one
  };
  struct Item {   // of a put or get
    uint64_t at;  // place in the caller's arrays
    uint64_t sequence;
    uint32_t slot;
    uint32_t crc;
  };
  using Lock = std::unique_lock<std::mutex>;

  void read_records(uint64_t file_bytes);
  void require_this_process() const;
  uint64_t record_offset(uint32_t slot) const noexcept;
  uint64_t payload_offset(uint32_t slot) const noexcept;
  DiskRecord record_of(uint32_t slot) const noexcept;

  uint32_t& bucket(const DiskKey& key) noexcept;
  uint32_t find(const DiskKey& key) noexcept;
  void link(uint32_t slot, bool newest) noexcept;
  void unlink(uint32_t slot) noexcept;
  void touch(uint32_t slot) noexcept;
  void set_free(uint32_t slot) noexcept;

  void put_round(std::span<Item> items, const uint8_t* keys, const uint8_t* data);
  void take_slots(std::span<Item> items);
  void clear_doubts(std::span<const Item> items);
  void write_payloads(std::span<Item> items, const uint8_t* keys, const uint8_t* data);
  void choose_victims(size_t count, std::vector<uint32_t>& victims);
  void write_records(std::vector<DiskRecord>& records);
  void sync();
  void read_items(std::span<const Item> items, const uint8_t* keys, uint8_t* out, DiskFound* found);
  void drop(uint32_t slot, uint64_t sequence) noexcept;

  const std::string name_;
  const int64_t process_;
  FaultyFile file_;
  DiskHeader header_{};
  uint64_t slot_bytes_ = 0;
  uint64_t capacity_ = 0;  // items
  std::mutex put_mutex_;   // taken before mutex_, held during a put's I/O
  std::mutex mutex_;       // guards everything below
  std::condition_variable unpinned_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> buckets_;  // first slot of a chain
  std::vector<uint32_t> free_;
  uint32_t oldest_ = kNoSlot, newest_ = kNoSlot;
  uint64_t next_sequence_ = 1;
  DiskStats stats_;
};

}  // namespace pyruntime::kv
