#include "moe/store.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <tuple>

#include "base/crc32c.hpp"
#include "base/status.hpp"

namespace pyruntime::moe {
namespace {

constexpr uint64_t kMaxRecords = uint64_t{1} << 24;
constexpr uint32_t kNone = UINT32_MAX;

using ull = unsigned long long;

void read_at(int descriptor, const std::string& path, void* out, uint64_t size, uint64_t offset) {
  auto* to = static_cast<char*>(out);
  while (size > 0) {
    const ssize_t got = pread(descriptor, to, std::min<uint64_t>(size, uint64_t{1} << 30),
                              static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      fail(PYRT_EIO, "%s: reading at offset %llu: %s", path.c_str(), static_cast<ull>(offset),
           std::strerror(errno));
    }
    if (got == 0) {
      fail(PYRT_EIO, "%s ends at offset %llu, where %llu more bytes were expected", path.c_str(),
           static_cast<ull>(offset), static_cast<ull>(size));
    }
    to += got;
    size -= static_cast<uint64_t>(got);
    offset += static_cast<uint64_t>(got);
  }
}

void check_header(const std::string& path, const Header& h, uint64_t actual) {
  const char* name = path.c_str();
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) {
    fail(PYRT_ECORRUPT, "%s is not a store of experts: it does not begin with PYRTMXS", name);
  }
  if (h.version != kVersion) {
    fail(PYRT_EVERSION, "%s has format version %u; this library reads version %u", name, h.version,
         kVersion);
  }
  const uint32_t crc = base::crc32c(&h, offsetof(Header, crc));
  if (crc != h.crc) {
    fail(PYRT_ECORRUPT, "%s: header checksum is %08x, expected %08x", name, crc, h.crc);
  }
  if (h.header_bytes != sizeof(Header) || h.record_bytes != sizeof(Record) || h.page != kPage) {
    fail(PYRT_ECORRUPT, "%s: header, record and page sizes are %u, %u, %u; expected %zu, %zu, %u",
         name, h.header_bytes, h.record_bytes, h.page, sizeof(Header), sizeof(Record), kPage);
  }
  if (h.file_bytes != actual) {
    fail(PYRT_ECORRUPT, "%s has %llu bytes; its header says %llu: it is truncated or half-written",
         name, static_cast<ull>(actual), static_cast<ull>(h.file_bytes));
  }
  bool fits = h.num_records <= kMaxRecords && h.index_offset >= kPage &&
              h.index_offset % kPage == 0 && h.index_offset <= actual &&
              h.num_records * sizeof(Record) + sizeof(Footer) == actual - h.index_offset;
  fits = fits && h.num_layers >= 1 && h.num_layers <= 4096 && h.num_experts <= 4096;
  for (int matrix = 0; matrix < kMatrices && h.num_experts > 0; ++matrix) {
    fits = fits && h.levels <= kMaxLevels && valid(expert_shape(h, matrix));
  }
  if (!fits) fail(PYRT_ECORRUPT, "%s: the header's sizes do not fit each other", name);
}

}  // namespace

void check_index(const std::string& path, const Header& h, const std::vector<Record>& records) {
  const char* name = path.c_str();
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  std::vector<std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>> keys;
  for (size_t i = 0; i < records.size(); ++i) {
    const Record& r = records[i];
    uint64_t expected = 0;
    bool known = r.layer < h.num_layers && r.flags == 0;
    if (r.kind == kExpertPlane) {
      known = known && r.expert < h.num_experts && r.level < h.levels;
      if (known) {
        expected = static_cast<uint64_t>(matrix_offset(h, static_cast<int>(r.level), kMatrices));
      }
    } else if (r.kind == kDenseMatrix) {
      known = known && r.level == 0 && r.dense_levels <= kMaxLevels && valid(dense_shape(r));
      for (int level = 0; known && level < static_cast<int>(r.dense_levels); ++level) {
        expected += static_cast<uint64_t>(plane_bytes(dense_shape(r), level));
      }
    } else {
      known = false;
    }
    if (!known) fail(PYRT_ECORRUPT, "%s: index record %zu is not of this store", name, i);
    if (r.bytes != expected || r.offset % kPage != 0 || r.offset < kPage ||
        r.offset > h.index_offset || padded(r.bytes) > h.index_offset - r.offset) {
      fail(PYRT_ECORRUPT,
           "%s: index record %zu (layer %u, expert %u, level %u) has %llu bytes at %llu; expected "
           "%llu bytes inside %u..%llu",
           name, i, r.layer, r.expert, r.level, static_cast<ull>(r.bytes),
           static_cast<ull>(r.offset), static_cast<ull>(expected), kPage,
           static_cast<ull>(h.index_offset));
    }
    spans.emplace_back(r.offset, r.offset + padded(r.bytes));
    keys.emplace_back(r.kind, r.layer, r.expert, r.level);
  }
  std::sort(spans.begin(), spans.end());
  std::sort(keys.begin(), keys.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) {
      fail(PYRT_ECORRUPT, "%s: two extents overlap at offset %llu", name,
           static_cast<ull>(spans[i].first));
    }
  }
  if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) {
    fail(PYRT_ECORRUPT, "%s: the index has an extent twice", name);
  }
  std::vector<uint64_t> counts(h.num_layers, 0);
  for (const Record& r : records) counts[r.layer] += r.kind == kExpertPlane;
  for (size_t layer = 0; layer < counts.size(); ++layer) {
    const uint64_t whole = uint64_t{h.num_experts} * h.levels;
    if (counts[layer] != 0 && counts[layer] != whole) {
      fail(PYRT_ECORRUPT, "%s: layer %zu has %llu of %llu extents", name, layer,
           static_cast<ull>(counts[layer]), static_cast<ull>(whole));
    }
  }
}

Store::Store(const std::string& path) : path_(path) {
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) {
    fail(errno == ENOENT ? PYRT_ENOENT : PYRT_EIO, "%s: %s", path.c_str(), std::strerror(errno));
  }
  try {
    open();
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

Store::~Store() { ::close(descriptor_); }

void Store::open() {
  struct stat status{};
  if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    fail(PYRT_EIO, "%s is not a regular file", path_.c_str());
  }
  const auto actual = static_cast<uint64_t>(status.st_size);
  if (actual < kPage + sizeof(Footer)) {
    fail(PYRT_ECORRUPT, "%s has %llu bytes; a store has at least %zu", path_.c_str(),
         static_cast<ull>(actual), kPage + sizeof(Footer));
  }
  read_at(descriptor_, path_, &header_, sizeof header_, 0);
  check_header(path_, header_, actual);
  Footer footer;
  read_at(descriptor_, path_, &footer, sizeof footer, actual - sizeof footer);
  if (footer.commit != kCommitMark || footer.crc != base::crc32c(&footer, offsetof(Footer, crc)) ||
      footer.file_bytes != actual) {
    fail(PYRT_ECORRUPT, "%s has no commit mark at offset %llu: it was not finished", path_.c_str(),
         static_cast<ull>(actual - sizeof footer));
  }
  records_.resize(header_.num_records);
  read_at(descriptor_, path_, records_.data(), records_.size() * sizeof(Record),
          header_.index_offset);
  const uint32_t crc = base::crc32c(records_.data(), records_.size() * sizeof(Record));
  if (crc != footer.index_crc) {
    fail(PYRT_ECORRUPT, "%s: index checksum at offset %llu is %08x, expected %08x", path_.c_str(),
         static_cast<ull>(header_.index_offset), crc, footer.index_crc);
  }
  check_index(path_, header_, records_);
  layer_slots_.assign(header_.num_layers, -1);
  int32_t slots = 0;
  for (const Record& r : records_) {
    if (r.kind == kExpertPlane && layer_slots_[r.layer] < 0) layer_slots_[r.layer] = slots++;
  }
  const size_t per_layer = size_t{header_.num_experts} * header_.levels;
  places_.assign(static_cast<size_t>(slots) * per_layer, kNone);
  for (size_t i = 0; i < records_.size(); ++i) {
    const Record& r = records_[i];
    if (r.kind == kDenseMatrix) {
      dense_.push_back(static_cast<uint32_t>(i));
    } else {
      places_[static_cast<size_t>(layer_slots_[r.layer]) * per_layer +
              size_t{r.expert} * header_.levels + r.level] = static_cast<uint32_t>(i);
    }
  }
  std::sort(dense_.begin(), dense_.end(), [this](uint32_t a, uint32_t b) {
    return std::tie(records_[a].layer, records_[a].expert) <
           std::tie(records_[b].layer, records_[b].expert);
  });
}

bool Store::sparse(int64_t layer) const noexcept {
  return layer >= 0 && layer < static_cast<int64_t>(layer_slots_.size()) &&
         layer_slots_[static_cast<size_t>(layer)] >= 0;
}

const Record* Store::find(int64_t layer, int64_t expert, int level) const noexcept {
  if (!sparse(layer) || expert < 0 || expert >= int64_t{header_.num_experts} || level < 0 ||
      level >= static_cast<int>(header_.levels)) {
    return nullptr;
  }
  const auto slot = static_cast<size_t>(layer_slots_[static_cast<size_t>(layer)]);
  const size_t place = (slot * header_.num_experts + static_cast<size_t>(expert)) * header_.levels +
                       static_cast<size_t>(level);
  return places_[place] == kNone ? nullptr : &records_[places_[place]];
}

const Record* Store::find_dense(int64_t layer, int64_t matrix) const noexcept {
  const auto key = std::make_pair(layer, matrix);
  const auto at = std::lower_bound(dense_.begin(), dense_.end(), key, [this](uint32_t i, auto k) {
    return std::make_pair(int64_t{records_[i].layer}, int64_t{records_[i].expert}) < k;
  });
  if (at == dense_.end()) return nullptr;
  const Record& r = records_[*at];
  return r.layer == layer && r.expert == matrix ? &r : nullptr;
}

void Store::read(const Record& record, void* out) const {
  read_at(descriptor_, path_, out, record.bytes, record.offset);
  check(record, out);
}

void Store::check(const Record& record, const void* data) const {
  const uint32_t crc = base::crc32c(data, record.bytes);
  if (crc != record.crc) {
    fail(PYRT_ECORRUPT,
         "%s: %s of layer %u, %s %u, level %u at offset %llu has checksum %08x, expected %08x",
         path_.c_str(), record.kind == kDenseMatrix ? "dense matrix" : "plane", record.layer,
         record.kind == kDenseMatrix ? "number" : "expert", record.expert, record.level,
         static_cast<ull>(record.offset), crc, record.crc);
  }
}

void Store::verify() const {
  std::vector<char> data;
  for (const Record& r : records_) {
    data.resize(r.bytes);
    read(r, data.data());
  }
}

}  // namespace pyruntime::moe
