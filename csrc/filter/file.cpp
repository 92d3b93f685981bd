// Files of a filter: docs/filter_format.md.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstring>
#include <mutex>
#include <shared_mutex>

#include "base/os_memory.hpp"
#include "base/status.hpp"
#include "filter/filter.hpp"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "files are the words as they are in memory");

namespace pyruntime::filter {
namespace {

constexpr char kMagic[8] = {'P', 'Y', 'R', 'T', 'C', 'K', 'F', '1'};
constexpr uint16_t kOneGeneration = 1, kGenerations = 2;  // versions

uint64_t round_up(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

// The header of a file of `bytes` bytes, when all but the body's hash is right.
FileHeader read_header(const void* data, size_t bytes) {
  FileHeader h;
  if (bytes < sizeof h) {
    fail(PYRT_ECORRUPT, "a filter has a header of %zu bytes; there are %zu", sizeof h, bytes);
  }
  std::memcpy(&h, data, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof h.magic) != 0) {
    fail(PYRT_ECORRUPT, "this is no filter: its magic differs");
  }
  if (h.major != kOneGeneration && h.major != kGenerations) {
    fail(PYRT_EVERSION, "the filter's format is %u; this library reads %u and %u", h.major,
         kOneGeneration, kGenerations);
  }
  const uint64_t hash = base::xxh64(&h, offsetof(FileHeader, header_hash), 0);
  if (hash != h.header_hash) fail(PYRT_ECORRUPT, "the filter's header is damaged");
  const bool sane = h.header_bytes == sizeof h && valid_shape(h.bits, h.slots) && h.buckets >= 2 &&
                    h.buckets % 2 == 0 && h.buckets <= kMaxSegmentSlots / h.slots &&
                    h.num_segments >= 1 && h.num_segments <= kMaxSegments && h.threshold >= 1 &&
                    h.threshold <= h.slots && h.key_kind <= 2 && h.capacity >= 1 &&
                    h.capacity <= kMaxCapacity;
  const bool grown = h.major == kOneGeneration
                         ? h.generations == 0
                         : h.generations >= 2 && h.generations <= kMaxGenerations &&
                               h.num_segments <= kMaxSegments >> (h.generations - 1);
  if (!sane || !grown) fail(PYRT_ECORRUPT, "the filter's header has values that no filter has");
  const uint32_t last = h.major == kOneGeneration ? 0 : h.generations - 1U;
  const Extent end = extent_of(h.num_segments, h.buckets, h.bits, h.slots, last);
  const uint64_t body = end.begin + end.bytes;
  if (h.body_bytes != body || bytes != sizeof h + body) {
    fail(PYRT_ECORRUPT, "the filter should have %" PRIu64 " bytes; there are %zu", sizeof h + body,
         bytes);
  }
  return h;
}

uint32_t generations_of(const FileHeader& h) {
  return h.major == kOneGeneration ? 1 : h.generations;
}

void require_count(const FileHeader& h, uint64_t occupied) {
  if (occupied != h.occupied) {
    fail(PYRT_ECORRUPT, "the filter has %" PRIu64 " keys; its header says %" PRIu64, occupied,
         h.occupied);
  }
}

}  // namespace

FileMap::FileMap(const char* path) {
  const int descriptor = ::open(path, O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    fail(errno == ENOENT ? PYRT_ENOENT : PYRT_EIO, "%s: %s", path, std::strerror(errno));
  }
  struct stat status{};
  const bool file = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  bytes_ = file ? static_cast<size_t>(status.st_size) : 0;
  if (bytes_ != 0) data_ = base::os::map_file(descriptor, bytes_);
  ::close(descriptor);
  if (!file) fail(PYRT_EIO, "%s is no file", path);
  if (bytes_ < sizeof(FileHeader)) {
    const size_t bytes = bytes_;
    if (data_ != nullptr) base::os::unreserve(data_, bytes_);
    fail(PYRT_ECORRUPT, "a filter has a header of %zu bytes; %s has %zu", sizeof(FileHeader), path,
         bytes);
  }
  if (data_ == nullptr) fail(PYRT_EIO, "the system does not map %s", path);
}

FileMap::~FileMap() {
  if (data_ != nullptr) base::os::unreserve(data_, bytes_);
}

std::unique_ptr<Filter> Filter::with_geometry(const FileHeader& h) {
  std::unique_ptr<Filter> filter(new Filter());
  filter->bits_ = h.bits;
  filter->slots_ = h.slots;
  filter->capacity_ = h.capacity;
  filter->seed_ = h.seed;
  filter->buckets_ = h.buckets;
  filter->threshold_ = h.threshold;
  filter->kernels_ = &kernels(simd::level(), h.bits, h.slots);
  return filter;
}

Extent extent_of(uint64_t num_segments, uint32_t buckets, uint32_t bits, uint32_t slots,
                 uint32_t generation) {
  const uint64_t bytes = num_segments * buckets * (bits * slots / 8);
  uint64_t begin = 0;
  for (uint32_t i = 0; i < generation; ++i) begin += round_up(bytes << i);
  return {begin, bytes << generation};
}

uint64_t Filter::body_bytes() const {
  const Extent end = extent_of(tables_.front()->view.num_segments, buckets_, bits_, slots_,
                               static_cast<uint32_t>(tables_.size() - 1));
  return end.begin + end.bytes;
}

uint64_t Filter::file_bytes() const {
  const std::shared_lock lock(gate_);
  return sizeof(FileHeader) + body_bytes();
}

void Filter::save(void* out, uint64_t bytes, uint8_t key_kind) const {
  const std::unique_lock lock(gate_);
  FileHeader h{};
  h.body_bytes = body_bytes();
  if (bytes != sizeof h + h.body_bytes) {
    fail(PYRT_EINVAL, "bytes is %" PRIu64 "; the filter has %" PRIu64, bytes,
         sizeof h + h.body_bytes);
  }
  const bool grown = tables_.size() > 1;
  std::memcpy(h.magic, kMagic, sizeof h.magic);
  h.major = grown ? kGenerations : kOneGeneration;
  h.header_bytes = sizeof h;
  h.bits = static_cast<uint8_t>(bits_);
  h.slots = static_cast<uint8_t>(slots_);
  h.key_kind = key_kind;
  h.generations = grown ? static_cast<uint8_t>(tables_.size()) : uint8_t{0};
  h.buckets = buckets_;
  h.seed = seed_;
  h.num_segments = tables_.front()->view.num_segments;
  h.capacity = capacity_;
  h.threshold = threshold_;
  auto* const body = static_cast<char*>(out) + sizeof h;
  uint64_t end = 0;
  for (uint32_t i = 0; i < tables_.size(); ++i) {
    const Table& table = *tables_[i];
    const Extent at = extent_of(h.num_segments, buckets_, bits_, slots_, i);
    std::memset(body + end, 0, at.begin - end);
    std::memcpy(body + at.begin, table.view.words, at.bytes);
    end = at.begin + at.bytes;
    h.occupied += static_cast<uint64_t>(table.occupied.load(std::memory_order_relaxed));
  }
  h.body_hash = base::xxh64(body, h.body_bytes, 0);
  h.header_hash = base::xxh64(&h, offsetof(FileHeader, header_hash), 0);
  std::memcpy(out, &h, sizeof h);
}

Filter* Filter::load(const void* data, size_t bytes, uint8_t* key_kind) {
  const FileHeader h = read_header(data, bytes);
  const char* const body = static_cast<const char*>(data) + sizeof h;
  if (base::xxh64(body, h.body_bytes, 0) != h.body_hash) {
    fail(PYRT_ECORRUPT, "the filter is damaged");
  }
  std::unique_ptr<Filter> filter = with_geometry(h);
  uint64_t occupied = 0;
  for (uint32_t i = 0; i < generations_of(h); ++i) {
    const Extent at = extent_of(h.num_segments, h.buckets, h.bits, h.slots, i);
    auto table = filter->make_table(h.num_segments << i);
    std::memcpy(table->view.words, body + at.begin, at.bytes);
    const uint64_t here = filter->recount(*table);
    table->occupied.store(static_cast<int64_t>(here), std::memory_order_relaxed);
    occupied += here;
    filter->push_table(filter->tables_, std::move(table));
  }
  require_count(h, occupied);
  *key_kind = h.key_kind;
  return filter.release();
}

Filter* Filter::open_map(const char* path, bool verify, uint8_t* key_kind) {
  FileMap map(path);
  const FileHeader h = read_header(map.data(), map.bytes());
  const char* const body = static_cast<const char*>(map.data()) + sizeof h;
  if (verify && base::xxh64(body, h.body_bytes, 0) != h.body_hash) {
    fail(PYRT_ECORRUPT, "the filter is damaged");
  }
  std::unique_ptr<Filter> filter = with_geometry(h);
  uint64_t occupied = 0, left = h.occupied;
  for (uint32_t i = 0; i < generations_of(h); ++i) {
    const Extent at = extent_of(h.num_segments, h.buckets, h.bits, h.slots, i);
    auto table = filter->make_table(h.num_segments << i, body + at.begin);
    // Not counted, the keys are taken to be in the oldest generations: no more false positives can
    // come of them.
    const uint64_t most = at.bytes * 8 / h.bits;
    const uint64_t here = verify ? filter->recount(*table) : std::min(left, most);
    left -= std::min(left, here);
    occupied += here;
    table->occupied.store(static_cast<int64_t>(here), std::memory_order_relaxed);
    filter->push_table(filter->tables_, std::move(table));
  }
  require_count(h, occupied);
  filter->map_ = std::move(map);
  *key_kind = h.key_kind;
  return filter.release();
}

}  // namespace pyruntime::filter
