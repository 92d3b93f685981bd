// Ids, records and options of the KV block pool; block_pool.hpp is the page that explains them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/os_memory.hpp"
#include "base/status.hpp"

namespace pyruntime::kv {

// Physical blocks: 0 .. num_blocks - 1 of their group; kNone where there is none.
using BlockId = uint32_t;
inline constexpr uint32_t kNone = 0xffffffffu;

// Content nodes; 0 is none, 0..2 are the heads of the eviction order.
using NodeId = uint32_t;
inline constexpr NodeId kNoNode = 0;
inline constexpr NodeId kFirstNode = 3;

// generation << 32 | slot. A slot's generation changes when its sequence ends.
using SeqHandle = uint64_t;

inline constexpr uint32_t kMaxGroups = 8;
inline constexpr uint32_t kNumTiers = 2;  // below the device: host memory, disk

enum class Policy : uint32_t { lru = 0, slru = 1, score = 2 };

struct GroupOptions {
  uint32_t num_blocks = 0;
  uint32_t window = 0;  // tokens a query attends to, itself included; 0: all
};

struct Options {
  uint32_t block_size = 16;  // tokens per block, alike in all groups
  uint32_t num_layers = 1;
  std::vector<GroupOptions> groups;
  uint32_t max_seqs = 1024;
  uint32_t max_blocks = 0;      // per sequence; 0: the largest group's
  uint32_t extra_nodes = 0;     // content that lower tiers may hold beyond what is in blocks
  uint32_t run_blocks = 16;     // blocks an allocation tries to get in one run; 1: no reservations
  uint32_t event_capacity = 0;  // 0: no events
  bool sharing = true;
  uint64_t seed = 0;   // of the index's hash; 0: random
  std::string secret;  // the deployment's, of export keys
};

// What the index knows of one block of content. Fields marked T belong to the tiers: the core
// keeps them with the node, sets them to their defaults when the node is made, and reads only
// `tier` (a node that has a copy in a lower tier outlives its device blocks).
struct alignas(64) Node {
  uint64_t key;              // chained hash of the namespace and all tokens up to this block's end
  NodeId parent;             // kNoNode for a namespace's root
  uint32_t children;         // nodes and sequences that continue this one
  uint32_t generation;       // odd while in use; makes a stale id detectable
  uint32_t space;            // namespace
  int64_t expiry_ns;         // T: retention deadline, 0 none
  uint32_t tier[kNumTiers];  // T: slot in a lower tier, kNone
  uint8_t export_key[16];    // valid if kHasExportKey
  uint32_t stored_event;     // low bits of the sequence number of its `stored` event
  uint32_t flags;            // kHasExportKey ...
};
static_assert(sizeof(Node) == 64);

enum NodeFlags : uint32_t {
  kHasExportKey = 1,
  kIsRoot = 2,
  kAnnounced = 4,       // a `stored` event was written and no `removed` one since
  kTierFlags = 0xff00,  // T: free for the tiers
};

// A node in one group: where its block is, who holds it, and its place in the eviction order.
struct GroupNode {
  BlockId block;  // kNone: not in this group's blocks
  uint32_t hold;  // table entries and retention holds
  NodeId prev;    // eviction list, valid if kListed
  NodeId next;
  uint32_t kids;   // children with a block in this group
  uint32_t uses;   // planned uses left; one hold stands for all of them
  uint32_t stamp;  // step in which it was last held
  uint8_t flags;
  uint8_t hits;    // admissions that found it, saturating
  uint16_t depth;  // blocks from the namespace's root, saturating
};
static_assert(sizeof(GroupNode) == 32);

enum GroupNodeFlags : uint8_t {
  kListed = 1,     // in an eviction list
  kProtected = 2,  // of the second segment
};

// An array in reserved address space: zero-filled, pages appear as they are first written, so that
// a pool made for the worst case costs what it uses. Throws PYRT_ENOMEM.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t size, bool huge = false) : size_(size) {
    if (size > (size_t{1} << 46) / sizeof(T)) {
      fail(PYRT_EINVAL, "%zu records of %zu bytes; no address space holds them", size, sizeof(T));
    }
    bytes_ = size * sizeof(T);
    if (bytes_ == 0) return;
    const size_t page = huge && bytes_ >= base::os::kHugePageBytes ? base::os::kHugePageBytes
                                                                   : base::os::page_bytes();
    bytes_ = (bytes_ + page - 1) / page * page;
    data_ = static_cast<T*>(base::os::reserve(bytes_, page));
    if (data_ != nullptr && !base::os::commit(data_, bytes_)) {
      base::os::unreserve(data_, bytes_);
      data_ = nullptr;
    }
    if (data_ == nullptr) fail(PYRT_ENOMEM, "no address space for %zu bytes", bytes_);
    if (page == base::os::kHugePageBytes) base::os::advise_huge(data_, bytes_, true);
  }
  ~Array() {
    if (data_ != nullptr) base::os::unreserve(data_, bytes_);
  }
  Array(Array&& other) noexcept { *this = static_cast<Array&&>(other); }
  Array& operator=(Array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  T& operator[](size_t i) noexcept { return data_[i]; }
  const T& operator[](size_t i) const noexcept { return data_[i]; }
  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  size_t bytes() const noexcept { return bytes_; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
  size_t bytes_ = 0;
};

}  // namespace pyruntime::kv
