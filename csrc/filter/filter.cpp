#include "filter/filter.hpp"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "base/os_memory.hpp"
#include "base/status.hpp"
#include "base/thread_pool.hpp"

namespace pyruntime::filter {
namespace {

constexpr uint64_t kMaxCapacity = uint64_t{1} << 38;
constexpr int64_t kChunk = 1 << 16;  // keys of a task
constexpr char kMagic[8] = {'P', 'Y', 'R', 'T', 'C', 'K', 'F', '1'};
constexpr uint16_t kMajor = 1;

// How full a segment may be planned: fewer slots, more chance.
double design_load(uint64_t capacity) {
  if (capacity >= 60'000) return 0.95;
  return capacity >= 4'096 ? 0.90 : 0.82;
}

bool valid_shape(uint32_t bits, uint32_t slots) {
  return (bits == 8 || bits == 16) && (slots == 8 || slots == 16);
}

uint64_t words_of(uint64_t num_segments, uint32_t buckets, uint32_t bits, uint32_t slots) {
  return num_segments * buckets * (bits * slots / 64);
}

template <class Body>
uint64_t in_parallel(size_t n, const Body& body) {
  if (n <= static_cast<size_t>(kChunk)) return body(size_t{0}, n);
  std::atomic<uint64_t> total{0};
  base::ThreadPool::process().parallel_for(
      static_cast<int64_t>(n), kChunk, [&](int64_t begin, int64_t end) {
        const uint64_t some = body(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
        total.fetch_add(some, std::memory_order_relaxed);
      });
  return total.load(std::memory_order_relaxed);
}

}  // namespace

Filter::Filter(const Options& options) {
  if (options.capacity < 1 || options.capacity > kMaxCapacity) {
    fail(PYRT_EINVAL, "capacity is %" PRIu64 "; it must be in 1..2^38", options.capacity);
  }
  if (!valid_shape(options.bits, options.slots)) {
    fail(PYRT_EINVAL, "bits is %u and slots %u; each must be 8 or 16", options.bits, options.slots);
  }
  bits_ = options.bits;
  slots_ = options.slots;
  capacity_ = options.capacity;
  const double wanted = static_cast<double>(capacity_) / design_load(capacity_);
  const auto num_slots = static_cast<uint64_t>(std::ceil(wanted)) + 2 * slots_;
  view_.num_segments = (num_slots + kMaxSegmentSlots - 1) / kMaxSegmentSlots;
  const uint64_t per_segment = (num_slots + view_.num_segments - 1) / view_.num_segments;
  const uint64_t pairs = (per_segment + 2 * slots_ - 1) / (2 * slots_);
  view_.buckets = static_cast<uint32_t>(std::min<uint64_t>(2 * pairs, kMaxSegmentSlots / slots_));
  view_.threshold = slots_ == 16 ? 4 : 3;
  view_.seed = options.seed;
  allocate();
}

void Filter::allocate() {
  body_bytes_ = words_of(view_.num_segments, view_.buckets, bits_, slots_) * sizeof(uint64_t);
  const uint64_t epochs_at = (body_bytes_ + 63) / 64 * 64;
  const uint64_t counters_at = (epochs_at + view_.num_segments * sizeof(uint32_t) + 63) / 64 * 64;
  const bool huge = body_bytes_ >= 4 * base::os::kHugePageBytes / 2;
  const uint64_t page = huge ? base::os::kHugePageBytes : base::os::page_bytes();
  mapped_bytes_ = (counters_at + kNumCounters * sizeof(uint64_t) + page - 1) / page * page;
  base_ = base::os::reserve(mapped_bytes_, page);
  if (base_ == nullptr || !base::os::commit(base_, mapped_bytes_)) {
    if (base_ != nullptr) base::os::unreserve(base_, mapped_bytes_);
    base_ = nullptr;
    fail(PYRT_ENOMEM, "the system refuses %" PRIu64 " bytes", mapped_bytes_);
  }
  if (huge) base::os::advise_huge(base_, mapped_bytes_, true);
  auto* bytes = static_cast<char*>(base_);
  view_.words = reinterpret_cast<uint64_t*>(bytes);
  view_.epochs = reinterpret_cast<uint32_t*>(bytes + epochs_at);
  view_.counters = reinterpret_cast<uint64_t*>(bytes + counters_at);
  kernels_ = &kernels(simd::level(), static_cast<int>(bits_), static_cast<int>(slots_));
}

Filter::~Filter() {
  if (base_ != nullptr) base::os::unreserve(base_, mapped_bytes_);
}

uint64_t Filter::insert(const uint64_t* keys, size_t n, uint8_t* status, bool unique) {
  const std::shared_lock lock(gate_);
  std::vector<uint8_t> own;
  if (status == nullptr) {
    own.resize(n);
    status = own.data();
  }
  const uint64_t stored = in_parallel(n, [&](size_t at, size_t count) {
    return kernels_->insert(view_, keys + at, count, status + at, unique);
  });
  occupied_.fetch_add(static_cast<int64_t>(stored), std::memory_order_relaxed);
  if (stored == n) return stored;
  for (size_t i = 0; i < n; ++i) {
    if (status[i] != kFull) continue;
    uint32_t copies = 0;
    kernels_->count(view_, keys + i, 1, &copies);
    if (copies >= 2 * slots_) status[i] = kDupLimit;
  }
  return stored;
}

uint64_t Filter::remove(const uint64_t* keys, size_t n, uint8_t* status) {
  const std::shared_lock lock(gate_);
  std::vector<uint8_t> own;
  if (status == nullptr) {
    own.resize(n);
    status = own.data();
  }
  const uint64_t removed = in_parallel(n, [&](size_t at, size_t count) {
    return kernels_->remove(view_, keys + at, count, status + at);
  });
  occupied_.fetch_sub(static_cast<int64_t>(removed), std::memory_order_relaxed);
  return removed;
}

uint64_t Filter::contains(const uint64_t* keys, size_t n, uint8_t* out) const {
  const std::shared_lock lock(gate_);
  return in_parallel(n, [&](size_t at, size_t count) {
    return kernels_->contains(view_, keys + at, count, out + at);
  });
}

void Filter::count(const uint64_t* keys, size_t n, uint32_t* out) const {
  const std::shared_lock lock(gate_);
  std::fill_n(out, n, 0U);
  in_parallel(n, [&](size_t at, size_t count) {
    kernels_->count(view_, keys + at, count, out + at);
    return uint64_t{0};
  });
}

void Filter::clear() {
  const std::unique_lock lock(gate_);
  std::memset(base_, 0, mapped_bytes_);
  occupied_.store(0, std::memory_order_relaxed);
}

Info Filter::info() const {
  const std::shared_lock lock(gate_);
  Info i{};
  i.capacity = capacity_;
  i.occupied =
      static_cast<uint64_t>(std::max<int64_t>(occupied_.load(std::memory_order_relaxed), 0));
  i.num_slots = view_.num_segments * view_.buckets * slots_;
  i.bytes = mapped_bytes_;
  i.seed = view_.seed;
  i.num_segments = view_.num_segments;
  i.bits = bits_;
  i.slots = slots_;
  i.buckets = view_.buckets;
  i.moves = __atomic_load_n(view_.counters + kMoves, __ATOMIC_RELAXED);
  i.retries = __atomic_load_n(view_.counters + kRetries, __ATOMIC_RELAXED);
  i.max_path = __atomic_load_n(view_.counters + kMaxPath, __ATOMIC_RELAXED);
  const double load = static_cast<double>(i.occupied) / static_cast<double>(i.num_slots);
  const double values = std::exp2(bits_) - 1;
  i.expected_fpr = 1 - std::pow(1 - 1 / values, 2.0 * slots_ * load);
  return i;
}

uint64_t Filter::recount() const {
  uint64_t occupied = 0;
  const uint64_t words = body_bytes_ / sizeof(uint64_t);
  for (uint64_t i = 0; i < words; ++i) {
    const uint64_t word = __atomic_load_n(view_.words + i, __ATOMIC_RELAXED);
    const uint64_t empty = bits_ == 16 ? zero_lanes<16, 8>(word) : zero_lanes<8, 8>(word);
    occupied += 64 / bits_ - static_cast<uint32_t>(count_bits(empty));
  }
  return occupied;
}

void Filter::check() const {
  const std::unique_lock lock(gate_);
  const uint64_t found = recount();
  const auto counted = static_cast<uint64_t>(occupied_.load(std::memory_order_relaxed));
  if (found != counted) {
    fail(PYRT_ECORRUPT, "%" PRIu64 " slots are occupied; %" PRIu64 " were counted", found, counted);
  }
}

uint64_t Filter::words_hash() const {
  const std::unique_lock lock(gate_);
  return base::xxh64(view_.words, body_bytes_, 0);
}

void Filter::read_words(void* out) const {
  const std::unique_lock lock(gate_);
  std::memcpy(out, view_.words, body_bytes_);
}

void Filter::write_words(const void* words) {
  const std::unique_lock lock(gate_);
  std::memcpy(view_.words, words, body_bytes_);
  occupied_.store(static_cast<int64_t>(recount()), std::memory_order_relaxed);
}

void Filter::save(void* out, uint8_t key_kind) const {
  const std::unique_lock lock(gate_);
  FileHeader h{};
  std::memcpy(h.magic, kMagic, sizeof h.magic);
  h.major = kMajor;
  h.header_bytes = sizeof h;
  h.bits = static_cast<uint8_t>(bits_);
  h.slots = static_cast<uint8_t>(slots_);
  h.key_kind = key_kind;
  h.buckets = view_.buckets;
  h.seed = view_.seed;
  h.num_segments = view_.num_segments;
  h.capacity = capacity_;
  h.occupied = static_cast<uint64_t>(occupied_.load(std::memory_order_relaxed));
  h.body_bytes = body_bytes_;
  h.threshold = view_.threshold;
  auto* to = static_cast<char*>(out);
  std::memcpy(to + sizeof h, view_.words, body_bytes_);
  h.body_hash = base::xxh64(to + sizeof h, body_bytes_, 0);
  h.header_hash = base::xxh64(&h, offsetof(FileHeader, header_hash), 0);
  std::memcpy(to, &h, sizeof h);
}

Filter* Filter::load(const void* data, size_t bytes, uint8_t* key_kind) {
  FileHeader h;
  if (bytes < sizeof h) {
    fail(PYRT_ECORRUPT, "a filter has a header of %zu bytes; there are %zu", sizeof h, bytes);
  }
  std::memcpy(&h, data, sizeof h);
  if (std::memcmp(h.magic, kMagic, sizeof h.magic) != 0) {
    fail(PYRT_ECORRUPT, "this is no filter: its magic differs");
  }
  if (h.major != kMajor) {
    fail(PYRT_EVERSION, "the filter's format is %u; this library reads %u", h.major, kMajor);
  }
  const uint64_t hash = base::xxh64(&h, offsetof(FileHeader, header_hash), 0);
  if (hash != h.header_hash) fail(PYRT_ECORRUPT, "the filter's header is damaged");
  const bool sane = h.header_bytes == sizeof h && valid_shape(h.bits, h.slots) && h.buckets >= 2 &&
                    h.buckets % 2 == 0 && h.buckets <= kMaxSegmentSlots / h.slots &&
                    h.num_segments >= 1 && h.num_segments <= kMaxSegments && h.threshold >= 1 &&
                    h.threshold <= h.slots && h.key_kind <= 2 && h.capacity >= 1 &&
                    h.capacity <= kMaxCapacity;
  if (!sane) fail(PYRT_ECORRUPT, "the filter's header has values that no filter has");
  const uint64_t body = words_of(h.num_segments, h.buckets, h.bits, h.slots) * sizeof(uint64_t);
  if (h.body_bytes != body || bytes != sizeof h + body) {
    fail(PYRT_ECORRUPT, "the filter should have %" PRIu64 " bytes; there are %zu", sizeof h + body,
         bytes);
  }
  const char* words = static_cast<const char*>(data) + sizeof h;
  if (base::xxh64(words, body, 0) != h.body_hash) fail(PYRT_ECORRUPT, "the filter is damaged");
  std::unique_ptr<Filter> filter(new Filter());
  filter->bits_ = h.bits;
  filter->slots_ = h.slots;
  filter->capacity_ = h.capacity;
  filter->view_.num_segments = h.num_segments;
  filter->view_.buckets = h.buckets;
  filter->view_.threshold = h.threshold;
  filter->view_.seed = h.seed;
  filter->allocate();
  std::memcpy(filter->view_.words, words, body);
  const uint64_t occupied = filter->recount();
  if (occupied != h.occupied) {
    fail(PYRT_ECORRUPT, "the filter has %" PRIu64 " keys; its header says %" PRIu64, occupied,
         h.occupied);
  }
  filter->occupied_.store(static_cast<int64_t>(occupied), std::memory_order_relaxed);
  *key_kind = h.key_kind;
  return filter.release();
}

void hash_strings(uint64_t seed, const char* data, const int64_t* offsets, size_t n,
                  uint64_t* keys) {
  for (size_t i = 0; i < n; ++i) {
    keys[i] =
        base::xxh64(data + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i]), seed);
  }
}

}  // namespace pyruntime::filter
