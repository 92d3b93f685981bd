#include "filter/filter.hpp"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <mutex>
#include <shared_mutex>

#include "base/os_memory.hpp"
#include "base/status.hpp"
#include "base/thread_pool.hpp"

namespace pyruntime::filter {
namespace {

constexpr int64_t kChunk = 1 << 16;        // keys of a task
constexpr size_t kCascade = 1024;          // keys that go through the generations together
constexpr uint8_t kAbsent = 0, kGone = 1;  // results of `contains` and `remove` that an older
                                           // generation may still change

// How full a segment may be planned: fewer slots, more chance.
double design_load(uint64_t keys) {
  if (keys >= 60'000) return 0.95;
  return keys >= 4'096 ? 0.90 : 0.82;
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

// Buffers of the threads of one call.
class Buffers {
 public:
  explicit Buffers(const SortPlan& plan) : plan_(plan) {}
  std::unique_ptr<Sorted> take() {
    {
      const std::lock_guard lock(mutex_);
      if (idle_ != nullptr) {
        std::unique_ptr<Sorted> found = std::move(idle_);
        idle_ = std::move(found->behind);
        return found;
      }
    }
    return Sorted::make(plan_);
  }
  void give(std::unique_ptr<Sorted> sorted) {
    const std::lock_guard lock(mutex_);
    sorted->behind = std::move(idle_);
    idle_ = std::move(sorted);
  }

 private:
  const SortPlan plan_;
  std::mutex mutex_;
  std::unique_ptr<Sorted> idle_;
};

// As in_parallel, but where it pays on sorted chunks: group(sorted, number, at) for each group,
// then finish(sorted, at, count). Without memory to sort in it is body(at, count) as well.
template <class Body, class Group, class Finish>
uint64_t in_groups(const Kernels& kernels, const SortLimits& limits, const Table& table,
                   const uint64_t* keys, size_t n, const Body& body, const Group& group,
                   const Finish& finish) {
  base::ThreadPool& pool = base::ThreadPool::process();
  const auto threads = static_cast<uint64_t>(pool.size());
  const SortPlan plan =
      plan_sort(limits, table.words_bytes, table.view.num_segments, n, static_cast<int>(threads));
  if (plan.chunk == 0) return in_parallel(n, body);
  Buffers buffers(plan);
  std::atomic<uint64_t> total{0};
  pool.parallel_for(
      static_cast<int64_t>(n), static_cast<int64_t>(plan.chunk), [&](int64_t begin, int64_t end) {
        const auto at = static_cast<size_t>(begin), count = static_cast<size_t>(end - begin);
        uint64_t some = 0;
        if (auto sorted = buffers.take()) {
          sorted->clear();
          kernels.sort(table.view, keys + at, count, *sorted);
          // Threads at work on neighbouring chunks are in different places of the table.
          const uint64_t start = at / plan.chunk % threads * plan.groups / threads;
          for (uint32_t i = 0; i < plan.groups; ++i) {
            some += group(*sorted, static_cast<uint32_t>((start + i) % plan.groups), at);
          }
          finish(*sorted, at, count);
          buffers.give(std::move(sorted));
        } else {
          some = body(at, count);
        }
        total.fetch_add(some, std::memory_order_relaxed);
      });
  return total.load(std::memory_order_relaxed);
}

void nothing(Sorted&, size_t, size_t) {}

// Bytes of 0 or 1 as bits; the last byte's are filled up with 0. Writes to marks[n .. n + 7].
void pack(uint8_t* marks, size_t n, uint8_t* out) {
  std::memset(marks + n, 0, (8 - n % 8) % 8);
  for (size_t i = 0; i < n; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, marks + i, sizeof eight);
    // Byte i of eight, 0 or 1, becomes bit i of the product's highest byte.
    out[i / 8] = static_cast<uint8_t>(eight * 0x0102040810204080ULL >> 56);
  }
}

// run(table, keys, n, results) on one generation after the other, the newest first, each time on
// the keys whose result is still `open`.
template <class Iterator, class Run>
void cascade(Iterator table, Iterator end, const uint64_t* keys, size_t n, uint8_t* results,
             uint8_t open, const Run& run) {
  uint64_t left[kCascade];
  uint8_t theirs[kCascade];
  uint16_t places[kCascade];
  for (size_t begin = 0; begin < n; begin += kCascade) {
    const size_t here = std::min(kCascade, n - begin);
    uint8_t* const block = results + begin;
    run(**table, keys + begin, here, block);
    size_t num = 0;
    for (size_t i = 0; i < here; ++i) {
      if (block[i] != open) continue;
      places[num] = static_cast<uint16_t>(i);
      left[num++] = keys[begin + i];
    }
    for (Iterator older = std::next(table); older != end && num > 0; ++older) {
      run(**older, left, num, theirs);
      size_t still = 0;
      for (size_t i = 0; i < num; ++i) {
        block[places[i]] = theirs[i];
        if (theirs[i] != open) continue;
        places[still] = places[i];
        left[still++] = left[i];
      }
      num = still;
    }
  }
}

}  // namespace

bool valid_shape(uint32_t bits, uint32_t slots) {
  return (bits == 8 || bits == 16) && (slots == 8 || slots == 16);
}

Table::~Table() {
  if (base != nullptr) base::os::unreserve(base, mapped_bytes);
}

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
  seed_ = options.seed;
  threshold_ = slots_ == 16 ? 4 : 3;
  const double wanted = static_cast<double>(capacity_) / design_load(capacity_);
  const auto num_slots = static_cast<uint64_t>(std::ceil(wanted)) + 2 * slots_;
  const uint64_t num_segments = (num_slots + kMaxSegmentSlots - 1) / kMaxSegmentSlots;
  const uint64_t per_segment = (num_slots + num_segments - 1) / num_segments;
  const uint64_t pairs = (per_segment + 2 * slots_ - 1) / (2 * slots_);
  buckets_ = static_cast<uint32_t>(std::min<uint64_t>(2 * pairs, kMaxSegmentSlots / slots_));
  kernels_ = &kernels(simd::level(), static_cast<int>(bits_), static_cast<int>(slots_));
  push_table(tables_, make_table(num_segments));
}

std::unique_ptr<Table> Filter::make_table(uint64_t num_segments, const void* words) const {
  auto table = std::make_unique<Table>();
  table->words_bytes = extent_of(num_segments, buckets_, bits_, slots_, 0).bytes;
  const uint64_t own_bytes = words == nullptr ? table->words_bytes : 0;
  const uint64_t epochs_at = (own_bytes + 63) / 64 * 64;
  const uint64_t counters_at = (epochs_at + num_segments * sizeof(uint32_t) + 63) / 64 * 64;
  const bool huge = own_bytes >= 4 * base::os::kHugePageBytes / 2;
  const uint64_t page = huge ? base::os::kHugePageBytes : base::os::page_bytes();
  const uint64_t bytes = (counters_at + kNumCounters * sizeof(uint64_t) + page - 1) / page * page;
  table->base = base::os::reserve(bytes, page);
  table->mapped_bytes = bytes;
  if (table->base == nullptr || !base::os::commit(table->base, bytes)) {
    fail(PYRT_ENOMEM, "the system refuses %" PRIu64 " bytes", bytes);
  }
  if (huge) base::os::advise_huge(table->base, bytes, true);
  auto* at = static_cast<char*>(table->base);
  // Lookups write nothing, and what would is refused.
  table->view.words = words == nullptr ? reinterpret_cast<uint64_t*>(at)
                                       : static_cast<uint64_t*>(const_cast<void*>(words));
  table->view.epochs = reinterpret_cast<uint32_t*>(at + epochs_at);
  table->view.counters = reinterpret_cast<uint64_t*>(at + counters_at);
  table->view.num_segments = num_segments;
  table->view.seed = seed_;
  table->view.buckets = buckets_;
  table->view.threshold = threshold_;
  return table;
}

void Filter::push_table(Tables& tables, std::unique_ptr<Table> table) const {
  table->planned = plan(table->view.num_segments, tables.size());
  if (!tables.empty()) table->view.older = &tables.back()->view;
  tables.push_back(std::move(table));
}

void Filter::require_writable() const {
  if (map_.data() != nullptr) {
    fail(PYRT_ESTATE, "the filter is a mapped file: it can only be read; load it to change it");
  }
}

uint64_t Filter::insert(const uint64_t* keys, size_t n, uint8_t* status, bool unique) {
  const std::shared_lock lock(gate_);
  require_writable();
  std::vector<uint8_t> own;
  if (status == nullptr) {
    own.resize(n);
    status = own.data();
  }
  if (tables_.size() > 1) {
    return in_parallel(n, [&](size_t at, size_t count) {
      return insert_into_generations(keys + at, count, status + at, unique);
    });
  }
  Table& table = *tables_.front();
  const uint64_t stored = in_groups(
      *kernels_, sort_limits_, table, keys, n,
      [&](size_t at, size_t count) {
        return kernels_->insert(table.view, keys + at, count, status + at, unique);
      },
      [&](const Sorted& sorted, uint32_t group, size_t at) {
        return kernels_->insert_group(table.view, sorted, group, status + at, unique);
      },
      nothing);
  table.occupied.fetch_add(static_cast<int64_t>(stored), std::memory_order_relaxed);
  if (stored == n) return stored;
  for (size_t i = 0; i < n; ++i) {
    if (status[i] != kFull) continue;
    uint32_t copies = 0;
    kernels_->count(table.view, keys + i, 1, &copies);
    if (copies >= 2 * slots_) status[i] = kDupLimit;
  }
  return stored;
}

uint64_t Filter::insert_into_generations(const uint64_t* keys, size_t n, uint8_t* status,
                                         bool unique) {
  uint64_t stored = 0;
  uint64_t left[kCascade];
  uint8_t theirs[kCascade];
  uint16_t places[kCascade];
  for (size_t begin = 0; begin < n; begin += kCascade) {
    const size_t here = std::min(kCascade, n - begin);
    const uint64_t* const block = keys + begin;
    uint8_t* const result = status + begin;
    std::fill_n(result, here, kAbsent);
    if (unique) {
      cascade(tables_.rbegin(), tables_.rend(), block, here, result, kAbsent,
              [&](const Table& table, const uint64_t* some, size_t num, uint8_t* out) {
                kernels_->contains(table.view, some, num, out);
              });
    }
    size_t num = 0;
    for (size_t i = 0; i < here; ++i) {
      if (result[i] != kAbsent) {
        result[i] = kExists;
        continue;
      }
      places[num] = static_cast<uint16_t>(i);
      left[num++] = block[i];
    }
    const auto roomy = std::find_if(tables_.rbegin(), tables_.rend(), [](const auto& table) {
      return table->occupied.load(std::memory_order_relaxed) < static_cast<int64_t>(table->planned);
    });
    Table& table = roomy == tables_.rend() ? *tables_.back() : **roomy;
    const uint64_t some = kernels_->insert(table.view, left, num, theirs, unique);
    table.occupied.fetch_add(static_cast<int64_t>(some), std::memory_order_relaxed);
    for (size_t i = 0; i < num; ++i) {
      const auto mark = static_cast<Status>(theirs[i]);
      const bool failed = mark == kFull || mark == kDupLimit;
      result[places[i]] = failed ? insert_anywhere(left[i], unique) : mark;
      stored += result[places[i]] == kOk;
    }
  }
  return stored;
}

// For a key that found no room where it should have. If there is none at all, what the newest says
// counts: many copies of one key must not look like a filter that has to grow.
Status Filter::insert_anywhere(uint64_t key, bool unique) {
  if (unique && contains_one(key)) return kExists;
  Status newest = kOk;
  for (auto table = tables_.rbegin(); table != tables_.rend(); ++table) {
    uint8_t status = kFull;
    if (kernels_->insert((*table)->view, &key, 1, &status, false) != 0) {
      (*table)->occupied.fetch_add(1, std::memory_order_relaxed);
      return kOk;
    }
    if (newest == kOk) newest = static_cast<Status>(status);
  }
  return newest;
}

bool Filter::contains_one(uint64_t key) const {
  return std::any_of(tables_.rbegin(), tables_.rend(), [&](const auto& table) {
    uint8_t found = 0;
    return kernels_->contains(table->view, &key, 1, &found) != 0;
  });
}

uint64_t Filter::remove(const uint64_t* keys, size_t n, uint8_t* status) {
  const std::shared_lock lock(gate_);
  require_writable();
  std::vector<uint8_t> own;
  if (status == nullptr) {
    own.resize(n);
    status = own.data();
  }
  const auto from = [&](Table& table, const uint64_t* some, size_t num, uint8_t* out) {
    const uint64_t removed = kernels_->remove(table.view, some, num, out);
    table.occupied.fetch_sub(static_cast<int64_t>(removed), std::memory_order_relaxed);
    return removed;
  };
  if (tables_.size() == 1) {
    Table& table = *tables_.front();
    // Never sorted for: the entries cost more than the lines of the table that they save.
    const uint64_t removed = in_parallel(n, [&](size_t at, size_t count) {
      return kernels_->remove(table.view, keys + at, count, status + at);
    });
    table.occupied.fetch_sub(static_cast<int64_t>(removed), std::memory_order_relaxed);
    return removed;
  }
  return in_parallel(n, [&](size_t at, size_t count) {
    uint64_t removed = 0;
    cascade(tables_.rbegin(), tables_.rend(), keys + at, count, status + at, kGone,
            [&](Table& table, const uint64_t* some, size_t num, uint8_t* out) {
              removed += from(table, some, num, out);
            });
    return removed;
  });
}

uint64_t Filter::contains_here(const uint64_t* keys, size_t n, uint8_t* out) const {
  if (tables_.size() == 1) return kernels_->contains(tables_.front()->view, keys, n, out);
  uint64_t present = 0;
  cascade(tables_.rbegin(), tables_.rend(), keys, n, out, kAbsent,
          [&](const Table& table, const uint64_t* some, size_t num, uint8_t* to) {
            present += kernels_->contains(table.view, some, num, to);
          });
  return present;
}

uint64_t Filter::contains(const uint64_t* keys, size_t n, uint8_t* out) const {
  const std::shared_lock lock(gate_);
  const auto plain = [&](size_t at, size_t count) {
    return contains_here(keys + at, count, out + at);
  };
  if (tables_.size() > 1) return in_parallel(n, plain);
  const Table& table = *tables_.front();
  return in_groups(
      *kernels_, sort_limits_, table, keys, n, plain,
      [&](const Sorted& sorted, uint32_t group, size_t at) {
        return kernels_->contains_group(table.view, sorted, group, out + at);
      },
      nothing);
}

uint64_t Filter::contains_bits(const uint64_t* keys, size_t n, uint8_t* out) const {
  static_assert(kChunk % 8 == 0 && kCascade % 8 == 0);
  const std::shared_lock lock(gate_);
  const auto plain = [&](size_t at, size_t count) {
    uint64_t present = 0;
    uint8_t marks[kCascade];
    for (size_t begin = 0; begin < count; begin += kCascade) {
      const size_t here = std::min(kCascade, count - begin);
      present += contains_here(keys + at + begin, here, marks);
      pack(marks, here, out + (at + begin) / 8);
    }
    return present;
  };
  if (tables_.size() > 1) return in_parallel(n, plain);
  const Table& table = *tables_.front();
  return in_groups(
      *kernels_, sort_limits_, table, keys, n, plain,
      [&](Sorted& sorted, uint32_t group, size_t) {
        return kernels_->contains_group(table.view, sorted, group, sorted.marks());
      },
      [&](Sorted& sorted, size_t at, size_t count) { pack(sorted.marks(), count, out + at / 8); });
}

void Filter::count(const uint64_t* keys, size_t n, uint32_t* out) const {
  const std::shared_lock lock(gate_);
  std::fill_n(out, n, 0U);
  const auto plain = [&](size_t at, size_t count) {
    for (const auto& table : tables_) kernels_->count(table->view, keys + at, count, out + at);
    return uint64_t{0};
  };
  if (tables_.size() > 1) {
    in_parallel(n, plain);
    return;
  }
  const Table& table = *tables_.front();
  in_groups(
      *kernels_, sort_limits_, table, keys, n, plain,
      [&](const Sorted& sorted, uint32_t group, size_t at) {
        kernels_->count_group(table.view, sorted, group, out + at);
        return uint64_t{0};
      },
      nothing);
}

void Filter::grow(uint32_t seen) {
  const std::unique_lock lock(gate_);
  require_writable();
  if (seen != 0 && tables_.size() > seen) return;
  const uint64_t num_segments = 2 * tables_.back()->view.num_segments;
  if (num_segments > kMaxSegments) {
    fail(PYRT_EFULL, "a generation of %" PRIu64 " segments would be more than 2^24", num_segments);
  }
  push_table(tables_, make_table(num_segments));
}

void Filter::drop_generations() {
  while (tables_.size() > 1) tables_.pop_back();
}

void Filter::clear() {
  const std::unique_lock lock(gate_);
  require_writable();
  drop_generations();
  Table& table = *tables_.front();
  std::memset(table.base, 0, table.mapped_bytes);
  table.occupied.store(0, std::memory_order_relaxed);
}

// Distinct keys that fit a generation for sure. The first is as large as its capacity asks. The
// others have as many slots per key, but spread their keys over more segments, and small segments
// differ: the fullest of them must still be within its design load.
uint64_t Filter::plan(uint64_t num_segments, size_t generation) const {
  if (generation == 0) return capacity_;
  const auto segments = static_cast<double>(num_segments);
  const double room = (buckets_ - 2.0) * slots_;
  const double fits = room * (room >= 60'000 ? 0.97 : design_load(buckets_ * slots_));
  // The mean m for which m + z * sqrt(m) fits; z is exceeded by a segment of one table in a
  // million.
  const double z = std::sqrt(2 * std::log(segments * 1e6));
  const double root = (std::sqrt(z * z + 4 * fits) - z) / 2;
  const auto keys = static_cast<uint64_t>(segments * root * root);
  return std::min(keys, capacity_ << generation);
}

Info Filter::info() const {
  const std::shared_lock lock(gate_);
  Info i{};
  int64_t occupied = 0;
  double miss = 1;
  const double values = std::exp2(bits_) - 1;
  for (const auto& each : tables_) {
    const Table& table = *each;
    const int64_t here = table.occupied.load(std::memory_order_relaxed);
    const uint64_t num_slots = table.view.num_segments * buckets_ * slots_;
    const uint64_t* counters = table.view.counters;
    i.capacity += table.planned;
    i.num_slots += num_slots;
    i.bytes += table.mapped_bytes + (map_.data() == nullptr ? 0 : table.words_bytes);
    i.moves += __atomic_load_n(counters + kMoves, __ATOMIC_RELAXED);
    i.retries += __atomic_load_n(counters + kRetries, __ATOMIC_RELAXED);
    i.max_path = std::max(i.max_path, __atomic_load_n(counters + kMaxPath, __ATOMIC_RELAXED));
    occupied += here;
    const double load =
        static_cast<double>(std::max<int64_t>(here, 0)) / static_cast<double>(num_slots);
    miss *= std::pow(1 - 1 / values, 2.0 * slots_ * load);
  }
  i.occupied = static_cast<uint64_t>(std::max<int64_t>(occupied, 0));
  i.seed = seed_;
  i.num_segments = tables_.front()->view.num_segments;
  i.bits = bits_;
  i.slots = slots_;
  i.buckets = buckets_;
  i.generations = static_cast<uint32_t>(tables_.size());
  i.expected_fpr = 1 - miss;
  return i;
}

uint64_t Filter::recount(const Table& table) const {
  uint64_t occupied = 0;
  const uint64_t words = table.words_bytes / sizeof(uint64_t);
  for (uint64_t i = 0; i < words; ++i) {
    const uint64_t word = __atomic_load_n(table.view.words + i, __ATOMIC_RELAXED);
    const uint64_t empty = bits_ == 16 ? zero_lanes<16, 8>(word) : zero_lanes<8, 8>(word);
    occupied += 64 / bits_ - static_cast<uint32_t>(count_bits(empty));
  }
  return occupied;
}

void Filter::check() const {
  const std::unique_lock lock(gate_);
  uint64_t found = 0;
  int64_t counted = 0;
  for (const auto& table : tables_) {
    found += recount(*table);
    counted += table->occupied.load(std::memory_order_relaxed);
  }
  if (static_cast<int64_t>(found) != counted) {
    fail(PYRT_ECORRUPT, "%" PRIu64 " slots are occupied; %" PRId64 " were counted", found, counted);
  }
}

uint64_t Filter::words_hash() const {
  const std::unique_lock lock(gate_);
  uint64_t hash = 0;
  for (const auto& table : tables_) hash = base::xxh64(table->view.words, table->words_bytes, hash);
  return hash;
}

void Filter::require_one_generation() const {
  if (tables_.size() > 1) {
    fail(PYRT_EUNSUPPORTED, "the filter has grown to %zu generations; a device takes one",
         tables_.size());
  }
}

View Filter::view() const {
  const std::shared_lock lock(gate_);
  require_one_generation();
  return tables_.front()->view;
}

uint64_t Filter::words_bytes() const {
  const std::shared_lock lock(gate_);
  return tables_.front()->words_bytes;
}

void Filter::read_words(void* out) const {
  const std::unique_lock lock(gate_);
  require_one_generation();
  std::memcpy(out, tables_.front()->view.words, tables_.front()->words_bytes);
}

void Filter::write_words(const void* words) {
  const std::unique_lock lock(gate_);
  require_writable();
  drop_generations();
  Table& table = *tables_.front();
  std::memcpy(table.view.words, words, table.words_bytes);
  table.occupied.store(static_cast<int64_t>(recount(table)), std::memory_order_relaxed);
}

void hash_strings(uint64_t seed, const char* data, const int64_t* offsets, size_t n,
                  uint64_t* keys) {
  for (size_t i = 0; i < n; ++i) {
    keys[i] =
        base::xxh64(data + offsets[i], static_cast<size_t>(offsets[i + 1] - offsets[i]), seed);
  }
}

}  // namespace pyruntime::filter
