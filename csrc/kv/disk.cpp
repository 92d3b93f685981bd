#include "kv/disk.hpp"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

#include "base/crc32c.hpp"
#include "base/hash.hpp"
#include "base/status.hpp"

namespace pyruntime::kv {
namespace {

static_assert(std::endian::native == std::endian::little, "the file is little-endian");

using ull = unsigned long long;

constexpr uint64_t padded(uint64_t bytes) {
  return (bytes + kDiskPage - 1) / kDiskPage * kDiskPage;
}

constexpr uint64_t data_offset_of(uint64_t slots) {
  return kDiskPage + padded(slots * sizeof(DiskRecord));
}

constexpr uint64_t spare_of(uint64_t slots) { return std::clamp<uint64_t>(slots / 16, 1, 64); }

DiskKey key_at(const uint8_t* keys, uint64_t i) noexcept {
  DiskKey key;
  std::memcpy(key.data(), keys + i * key.size(), key.size());
  return key;
}

uint32_t payload_crc(const DiskKey& key, const void* data, uint64_t bytes) noexcept {
  return base::crc32c(data, bytes, base::crc32c(key.data(), key.size()));
}

DiskHeader header_of(const std::string& name, const DiskOptions& options) {
  const auto ull_of = [](uint64_t value) { return static_cast<ull>(value); };
  if (options.item_bytes < 1 || options.item_bytes > uint64_t{1} << 30u) {
    fail(PYRT_EINVAL, "item_bytes is %llu; it must be in 1..2^30", ull_of(options.item_bytes));
  }
  if (options.fingerprint.size() > kMaxFingerprint) {
    fail(PYRT_EINVAL, "the fingerprint has %zu bytes; it may have %u", options.fingerprint.size(),
         kMaxFingerprint);
  }
  const uint64_t slot_bytes = padded(options.item_bytes);
  uint64_t slots = std::min<uint64_t>(options.capacity_bytes / slot_bytes, kMaxDiskSlots);
  while (slots > 0 && data_offset_of(slots) + slots * slot_bytes > options.capacity_bytes) --slots;
  if (slots < 2) {
    fail(PYRT_EINVAL, "%s: capacity_bytes is %llu; two items of %llu bytes take %llu", name.c_str(),
         ull_of(options.capacity_bytes), ull_of(options.item_bytes),
         ull_of(data_offset_of(2) + 2 * slot_bytes));
  }
  DiskHeader h{};
  std::memcpy(h.magic, kDiskMagic, sizeof h.magic);
  h.version = kDiskVersion;
  h.record_bytes = sizeof(DiskRecord);
  h.item_bytes = options.item_bytes;
  h.num_slots = slots;
  h.num_spare = spare_of(slots);
  h.data_offset = data_offset_of(slots);
  h.fingerprint_bytes = static_cast<uint32_t>(options.fingerprint.size());
  std::memcpy(h.fingerprint, options.fingerprint.data(), options.fingerprint.size());
  h.crc = base::crc32c(&h, offsetof(DiskHeader, crc));
  return h;
}

void check_header(const char* name, const DiskHeader& h, const DiskHeader& wanted) {
  if (std::memcmp(h.magic, kDiskMagic, sizeof h.magic) != 0) {
    fail(PYRT_ECORRUPT, "%s is no file of KV blocks: it does not begin with PYRTKVD", name);
  }
  if (h.version != kDiskVersion) {
    fail(PYRT_EVERSION, "%s has format version %u; this library reads version %u", name, h.version,
         kDiskVersion);
  }
  const uint32_t crc = base::crc32c(&h, offsetof(DiskHeader, crc));
  if (crc != h.crc) {
    fail(PYRT_ECORRUPT, "%s: header checksum is %08x, expected %08x; delete the file", name, crc,
         h.crc);
  }
  if (h.fingerprint_bytes > kMaxFingerprint || h.num_slots < 2 || h.num_slots > kMaxDiskSlots) {
    fail(PYRT_ECORRUPT, "%s: the header's sizes are none of ours; delete the file", name);
  }
  if (h.fingerprint_bytes != wanted.fingerprint_bytes ||
      std::memcmp(h.fingerprint, wanted.fingerprint, h.fingerprint_bytes) != 0) {
    const auto shown = [](const DiskHeader& of) {
      return static_cast<int>(std::min<uint32_t>(of.fingerprint_bytes, 120));
    };
    fail(PYRT_EINVAL, "%s has blocks of '%.*s', not of '%.*s'; take another file", name, shown(h),
         reinterpret_cast<const char*>(h.fingerprint), shown(wanted),
         reinterpret_cast<const char*>(wanted.fingerprint));
  }
  if (h.item_bytes != wanted.item_bytes || h.num_slots != wanted.num_slots) {
    fail(PYRT_EINVAL,
         "%s has %llu slots for items of %llu bytes; asked for were %llu of %llu; delete it to "
         "change its size",
         name, static_cast<ull>(h.num_slots), static_cast<ull>(h.item_bytes),
         static_cast<ull>(wanted.num_slots), static_cast<ull>(wanted.item_bytes));
  }
  if (std::memcmp(&h, &wanted, sizeof h) != 0) {
    fail(PYRT_ECORRUPT, "%s: the header's sizes do not fit each other; delete the file", name);
  }
}

}  // namespace

Disk::Disk(const std::string& path, const DiskOptions& options)
    : Disk((header_of(path, options), open_disk_file(path)), path, options) {}

Disk::Disk(std::unique_ptr<DiskFile> file, const std::string& name, const DiskOptions& options)
    : name_(name), process_(getpid()), file_(std::move(file)) {
  header_ = header_of(name, options);
  slot_bytes_ = padded(header_.item_bytes);
  capacity_ = header_.num_slots - header_.num_spare;
  slots_.resize(header_.num_slots);
  buckets_.assign(std::bit_ceil(header_.num_slots + header_.num_slots / 2), kNoSlot);
  free_.reserve(header_.num_slots);
  const uint64_t file_bytes = file_.size();
  // The header reaches the disk before the file has its size: a file as long as it should be, but
  // without a header, is none of ours.
  if (file_bytes == 0) {
    std::vector<char> page(kDiskPage);
    std::memcpy(page.data(), &header_, sizeof header_);
    file_.write(0, page.data(), page.size());
    file_.sync();
  } else {
    DiskHeader found;
    if (!file_.read(0, &found, sizeof found)) {
      fail(PYRT_ECORRUPT, "%s has %llu bytes; a file of KV blocks has more", name.c_str(),
           static_cast<ull>(file_bytes));
    }
    check_header(name.c_str(), found, header_);
  }
  const uint64_t whole = header_.data_offset + header_.num_slots * slot_bytes_;
  read_records(file_bytes);
  if (file_bytes < whole) file_.resize(whole);
  stats_.capacity = capacity_;
  stats_.file_bytes = whole;
}

void Disk::read_records(uint64_t file_bytes) {
  std::vector<DiskRecord> table(header_.num_slots);
  const uint64_t bytes = table.size() * sizeof(DiskRecord);
  const uint64_t there = std::min(bytes, file_bytes - std::min<uint64_t>(file_bytes, kDiskPage));
  if (!file_.read(kDiskPage, table.data(), there)) {
    fail(PYRT_EIO, "%s became shorter while it was read", name_.c_str());
  }
  std::vector<uint32_t> valid;
  for (uint32_t i = 0; i < table.size(); ++i) {
    const DiskRecord& r = table[i];
    Slot& slot = slots_[i];
    slot = Slot{{}, 0, 0, kNoSlot, kNoSlot, kNoSlot, 0, State::free, false};
    if (r.crc != base::crc32c(&r, offsetof(DiskRecord, crc)) || r.slot != i || r.sequence == 0 ||
        r.sequence > UINT64_MAX / 2) {
      continue;
    }
    slot.doubt = true;  // until it is found to be right
    next_sequence_ = std::max(next_sequence_, r.sequence + 1);
    if (payload_offset(i) + header_.item_bytes > file_bytes) continue;
    slot.key = r.key;
    slot.sequence = r.sequence;
    slot.crc = r.payload_crc;
    valid.push_back(i);
  }
  // The latest first, so that of two records of a key the later is there already, and what is too
  // much is the oldest.
  std::sort(valid.begin(), valid.end(), [this](uint32_t a, uint32_t b) {
    return std::pair(slots_[a].sequence, a) > std::pair(slots_[b].sequence, b);
  });
  for (const uint32_t i : valid) {
    if (stats_.items == capacity_ || find(slots_[i].key) != kNoSlot) continue;
    slots_[i].doubt = false;
    link(i, false);
  }
  for (uint32_t i = static_cast<uint32_t>(slots_.size()); i-- > 0;) {
    if (slots_[i].state == State::free) free_.push_back(i);
  }
}

void Disk::require_this_process() const {
  if (getpid() != process_) fail(PYRT_ESTATE, "the disk tier belongs to the parent process");
}

uint64_t Disk::record_offset(uint32_t slot) const noexcept {
  return kDiskPage + uint64_t{slot} * sizeof(DiskRecord);
}

uint64_t Disk::payload_offset(uint32_t slot) const noexcept {
  return header_.data_offset + slot * slot_bytes_;
}

DiskRecord Disk::record_of(uint32_t slot) const noexcept {
  const Slot& s = slots_[slot];
  DiskRecord record{s.key, s.sequence, slot, s.crc, 0, 0, 0};
  record.crc = base::crc32c(&record, offsetof(DiskRecord, crc));
  return record;
}

// Index and order

uint32_t& Disk::bucket(const DiskKey& key) noexcept {
  return buckets_[base::xxh64(key.data(), key.size(), 0) & (buckets_.size() - 1)];
}

uint32_t Disk::find(const DiskKey& key) noexcept {
  uint32_t slot = bucket(key);
  while (slot != kNoSlot && slots_[slot].key != key) slot = slots_[slot].chain;
  return slot;
}

// Makes an item visible.
void Disk::link(uint32_t at, bool newest) noexcept {
  Slot& slot = slots_[at];
  uint32_t& first = bucket(slot.key);
  slot.chain = first;
  first = at;
  slot.state = State::present;
  slot.older = newest ? newest_ : kNoSlot;
  slot.newer = newest ? kNoSlot : oldest_;
  (slot.older == kNoSlot ? oldest_ : slots_[slot.older].newer) = at;
  (slot.newer == kNoSlot ? newest_ : slots_[slot.newer].older) = at;
  ++stats_.items;
}

void Disk::unlink(uint32_t at) noexcept {
  Slot& slot = slots_[at];
  uint32_t* link = &bucket(slot.key);
  while (*link != at) link = &slots_[*link].chain;
  *link = slot.chain;
  (slot.older == kNoSlot ? oldest_ : slots_[slot.older].newer) = slot.newer;
  (slot.newer == kNoSlot ? newest_ : slots_[slot.newer].older) = slot.older;
  --stats_.items;
}

void Disk::touch(uint32_t slot) noexcept {
  unlink(slot);
  link(slot, true);
}

void Disk::set_free(uint32_t slot) noexcept {
  slots_[slot].state = State::free;
  free_.push_back(slot);
}

// Writing

uint64_t Disk::put(const uint8_t* keys, uint64_t n, const void* data) {
  require_this_process();
  const std::scoped_lock turn(put_mutex_);
  n = std::min(n, capacity_);
  std::vector<uint64_t> order(n);
  for (uint64_t i = 0; i < n; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [keys](uint64_t a, uint64_t b) {
    return std::memcmp(keys + a * sizeof(DiskKey), keys + b * sizeof(DiskKey), sizeof(DiskKey)) < 0;
  });
  std::vector<char> again(n, 0);
  for (uint64_t i = 1; i < n; ++i) {
    again[order[i]] = key_at(keys, order[i]) == key_at(keys, order[i - 1]) ? 1 : 0;
  }
  std::vector<Item> fresh;
  fresh.reserve(n);
  {
    const std::scoped_lock lock(mutex_);
    for (uint64_t i = n; i-- > 0;) {
      const uint32_t slot = find(key_at(keys, i));
      if (slot != kNoSlot) {
        touch(slot);
      } else if (again[i] == 0) {
        fresh.push_back({i, next_sequence_ + (n - 1 - i), kNoSlot, 0});
      }
    }
    next_sequence_ += n;
  }
  std::reverse(fresh.begin(), fresh.end());
  const std::span<Item> all(fresh);
  for (size_t done = 0; done < all.size();) {
    const size_t some = std::min<size_t>(all.size() - done, header_.num_spare);
    try {
      put_round(all.subspan(done, some), keys, static_cast<const uint8_t*>(data));
    } catch (const Error&) {
      const std::scoped_lock lock(mutex_);
      ++stats_.failures;
      throw;
    }
    done += some;
  }
  match(keys, n);  // the first is the most recent
  return fresh.size();
}

void Disk::put_round(std::span<Item> items, const uint8_t* keys, const uint8_t* data) {
  std::vector<uint32_t> victims;
  std::vector<DiskRecord> records, restored;
  victims.reserve(items.size());
  records.reserve(2 * items.size());
  restored.reserve(items.size());
  take_slots(items);
  bool recording = false;
  try {
    clear_doubts(items);
    write_payloads(items, keys, data);
    sync();
    choose_victims(items.size(), victims);
    recording = true;
    {
      const std::scoped_lock lock(mutex_);
      for (const Item& item : items) {
        Slot& slot = slots_[item.slot];
        slot.key = key_at(keys, item.at);
        slot.sequence = item.sequence;
        slot.crc = item.crc;
        records.push_back(record_of(item.slot));
      }
    }
    for (const uint32_t victim : victims) {
      DiskRecord none{};
      none.slot = victim;
      records.push_back(none);
    }
    write_records(records);
    sync();
  } catch (...) {
    {
      const std::scoped_lock lock(mutex_);
      for (size_t i = items.size(); i-- > 0;) {
        Slot& slot = slots_[items[i].slot];
        slot.doubt = slot.doubt || recording;
        set_free(items[i].slot);
      }
      for (size_t i = victims.size(); i-- > 0;) {
        restored.push_back(record_of(victims[i]));
        link(victims[i], false);
      }
    }
    try {  // else they are missing after a restart
      if (!restored.empty()) write_records(restored);
    } catch (const Error&) {
    }
    throw;
  }
  const std::scoped_lock lock(mutex_);
  for (const uint32_t victim : victims) set_free(victim);
  for (const Item& item : items) link(item.slot, true);
  stats_.evicted += victims.size();
  stats_.stored += items.size();
}

void Disk::take_slots(std::span<Item> items) {
  Lock lock(mutex_);
  // Fewer than the spare ones only while a dropped item is still being read.
  unpinned_.wait(lock, [&] { return free_.size() >= items.size(); });
  std::vector<uint32_t>::iterator from = free_.end() - static_cast<std::ptrdiff_t>(items.size());
  std::sort(from, free_.end());
  for (Item& item : items) {
    item.slot = *from++;
    slots_[item.slot].state = State::taken;
  }
  free_.resize(free_.size() - items.size());
}

void Disk::clear_doubts(std::span<const Item> items) {
  std::vector<DiskRecord> none;
  for (const Item& item : items) {
    if (!slots_[item.slot].doubt) continue;  // taken slots are this thread's
    none.emplace_back();
    none.back().slot = item.slot;
  }
  if (none.empty()) return;
  write_records(none);
  sync();
  for (const Item& item : items) slots_[item.slot].doubt = false;
}

void Disk::write_payloads(std::span<Item> items, const uint8_t* keys, const uint8_t* data) {
  const uint64_t item_bytes = header_.item_bytes;
  for (size_t first = 0; first < items.size();) {
    size_t end = first;
    do {
      Item& item = items[end];
      item.crc = payload_crc(key_at(keys, item.at), data + item.at * item_bytes, item_bytes);
      ++end;
    } while (end < items.size() && item_bytes == slot_bytes_ &&
             items[end].slot == items[end - 1].slot + 1 && items[end].at == items[end - 1].at + 1);
    file_.write(payload_offset(items[first].slot), data + items[first].at * item_bytes,
                (end - first) * item_bytes);
    first = end;
  }
  const std::scoped_lock lock(mutex_);
  stats_.bytes_written += items.size() * item_bytes;
}

// Takes out of sight what must go for `count` further items.
void Disk::choose_victims(size_t count, std::vector<uint32_t>& victims) {
  Lock lock(mutex_);
  while (stats_.items + count > capacity_) {
    uint32_t victim = oldest_;
    while (victim != kNoSlot && slots_[victim].readers != 0) victim = slots_[victim].newer;
    if (victim == kNoSlot) {
      unpinned_.wait(lock);
      continue;
    }
    unlink(victim);
    slots_[victim].state = State::leaving;
    victims.push_back(victim);
  }
}

// Writes records at their slots; one without a sequence becomes all zeroes.
void Disk::write_records(std::vector<DiskRecord>& records) {
  std::sort(records.begin(), records.end(),
            [](const DiskRecord& a, const DiskRecord& b) { return a.slot < b.slot; });
  for (size_t first = 0; first < records.size();) {
    const uint32_t slot = records[first].slot;
    size_t end = first;
    do {
      if (records[end].sequence == 0) records[end].slot = 0;
      ++end;
    } while (end < records.size() && records[end].slot == slot + (end - first));
    file_.write(record_offset(slot), &records[first], (end - first) * sizeof(DiskRecord));
    first = end;
  }
}

void Disk::sync() {
  file_.sync();
  const std::scoped_lock lock(mutex_);
  ++stats_.syncs;
}

// Reading

void Disk::get(const uint8_t* keys, uint64_t n, void* out, DiskFound* found) {
  require_this_process();
  auto* const to = static_cast<uint8_t*>(out);
  const uint64_t item_bytes = header_.item_bytes;
  std::vector<Item> items;
  items.reserve(n);
  {
    const std::scoped_lock lock(mutex_);
    for (uint64_t i = n; i-- > 0;) {
      const uint32_t slot = find(key_at(keys, i));
      found[i] = slot == kNoSlot ? DiskFound::miss : DiskFound::hit;
      if (slot == kNoSlot) continue;
      touch(slot);
      ++slots_[slot].readers;
      items.push_back({i, slots_[slot].sequence, slot, slots_[slot].crc});
    }
  }
  std::reverse(items.begin(), items.end());
  bool failed = true;
  const auto release = [&] {
    const std::scoped_lock lock(mutex_);
    for (const Item& item : items) {
      Slot& slot = slots_[item.slot];
      if (--slot.readers == 0 && slot.state == State::dropped) set_free(item.slot);
    }
    uint64_t hits = 0;
    for (uint64_t i = 0; i < n; ++i) hits += found[i] == DiskFound::hit ? 1 : 0;
    if (failed) {
      ++stats_.failures;
    } else {
      stats_.hits += hits;
      stats_.misses += n - hits;
      stats_.bytes_read += items.size() * item_bytes;
    }
    unpinned_.notify_all();
  };
  try {
    read_items(items, keys, to, found);
    failed = false;
  } catch (...) {
    release();
    throw;
  }
  release();
  for (uint64_t i = 0; i < n; ++i) {
    if (found[i] != DiskFound::hit) std::memset(to + i * item_bytes, 0, item_bytes);
  }
}

void Disk::read_items(std::span<const Item> items, const uint8_t* keys, uint8_t* out,
                      DiskFound* found) {
  const uint64_t item_bytes = header_.item_bytes;
  for (size_t first = 0; first < items.size();) {
    size_t end = first + 1;
    while (end < items.size() && item_bytes == slot_bytes_ &&
           items[end].slot == items[end - 1].slot + 1 && items[end].at == items[end - 1].at + 1) {
      ++end;
    }
    const bool whole = file_.read(payload_offset(items[first].slot),
                                  out + items[first].at * item_bytes, (end - first) * item_bytes);
    for (; first < end; ++first) {
      const Item& item = items[first];
      const uint8_t* data = out + item.at * item_bytes;
      if (whole && payload_crc(key_at(keys, item.at), data, item_bytes) == item.crc) continue;
      found[item.at] = DiskFound::corrupt;
      drop(item.slot, item.sequence);
    }
  }
}

// Drops an item that is pinned by the caller; its slot is free once nobody reads it.
void Disk::drop(uint32_t at, uint64_t sequence) noexcept {
  {
    const std::scoped_lock lock(mutex_);
    Slot& slot = slots_[at];
    if (slot.state != State::present || slot.sequence != sequence) return;  // somebody else did
    unlink(at);
    slot.state = State::dropped;
    slot.doubt = true;
    ++stats_.corrupt;
  }
  try {  // else its record stays until the slot is used again, and the checksum tells again
    const DiskRecord none{};
    file_.write(record_offset(at), &none, sizeof none);
  } catch (const Error&) {
  }
}

uint64_t Disk::match(const uint8_t* keys, uint64_t n) {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  uint64_t there = 0;
  while (there < n && find(key_at(keys, there)) != kNoSlot) ++there;
  for (uint64_t i = there; i-- > 0;) touch(find(key_at(keys, i)));
  return there;
}

DiskStats Disk::stats() {
  require_this_process();
  const std::scoped_lock lock(mutex_);
  return stats_;
}

void Disk::check() {
  require_this_process();
  const std::scoped_lock turn(put_mutex_);
  const std::scoped_lock lock(mutex_);
  const auto bad = [this](const char* what, uint64_t value) {
    fail(PYRT_ECORRUPT, "%s: %s (%llu)", name_.c_str(), what, static_cast<ull>(value));
  };
  std::vector<uint32_t> seen(slots_.size(), 0);
  for (const uint32_t slot : free_) {
    if (slots_[slot].state != State::free || slots_[slot].readers != 0 || ++seen[slot] != 1) {
      bad("a free slot is in use, or twice in the list", slot);
    }
  }
  uint64_t present = 0;
  uint32_t before = kNoSlot;
  for (uint32_t slot = oldest_; slot != kNoSlot; before = slot, slot = slots_[slot].newer) {
    if (slots_[slot].state != State::present || slots_[slot].older != before ||
        find(slots_[slot].key) != slot || ++seen[slot] != 1) {
      bad("the order or the index is broken at a slot", slot);
    }
    ++present;
  }
  if (newest_ != before || present != stats_.items || present > capacity_) {
    bad("the number of items is wrong", present);
  }
  uint64_t chained = 0;
  for (uint32_t slot : buckets_) {
    for (; slot != kNoSlot && chained <= present; slot = slots_[slot].chain) ++chained;
  }
  if (chained != present) bad("the index has another number of items", chained);
  for (uint32_t slot = 0; slot < slots_.size(); ++slot) {
    const bool dropped = slots_[slot].state == State::dropped && slots_[slot].readers != 0;
    if (seen[slot] == 0 && !dropped) bad("a slot is lost", slot);
  }
}

}  // namespace pyruntime::kv
