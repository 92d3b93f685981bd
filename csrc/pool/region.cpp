#include "pool/region.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/log.hpp"
#include "base/status.hpp"

namespace pyruntime::pool {
namespace {

constexpr size_t kCacheLine = 64;
constexpr uint32_t kMinUnitShift = 21;  // 2 MiB
constexpr uint32_t kMaxUnitShift = 31;  // offsets inside a unit stay below 2^32

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

Geometry Geometry::of(size_t object_bytes, size_t align, bool guard) {
  constexpr size_t kMaxObject = size_t{1} << 30;
  if (object_bytes < 1 || object_bytes > kMaxObject) {
    fail(PYRT_EINVAL, "object_bytes is %zu; a pool takes 1..%zu", object_bytes, kMaxObject);
  }
  if (align != 0 && (!std::has_single_bit(align) || align > base::os::kHugePageBytes)) {
    fail(PYRT_EINVAL, "align is %zu; it must be 0 or a power of two up to 2 MiB", align);
  }
  Geometry g;
  g.object_bytes = object_bytes;
  if (guard) {
    const size_t page = base::os::page_bytes();
    g.stride = round_up(round_up(object_bytes, page) + page, std::max(align, page));
  } else {
    const size_t natural = std::min(kCacheLine, std::max<size_t>(8, std::bit_ceil(object_bytes)));
    g.stride = round_up(object_bytes, align != 0 ? align : natural);
    g.stride = std::max<size_t>(g.stride, 2);  // the reciprocal of 1 would need 65 bits
    if (align == 0 && g.stride % 512 == 0) g.stride += kCacheLine;
  }
  for (uint32_t shift = kMinUnitShift; shift <= kMaxUnitShift; ++shift) {
    const size_t bytes = size_t{1} << shift;
    if (bytes < g.stride) continue;
    g.unit_shift = shift;
    g.unit_bytes = bytes;
    g.per_unit = static_cast<uint32_t>(bytes / g.stride);
    if (bytes - g.per_unit * g.stride <= bytes / 16) break;
  }
  g.reciprocal = ~uint64_t{0} / g.stride + 1;
  g.used_bytes = uint64_t{g.per_unit} * g.stride;
  return g;
}

Region::Region(const Geometry& geometry, uint64_t max_units, const Options& options)
    : geometry_(geometry), options_(options), max_units_(max_units) {
  if (max_units > (uint64_t{1} << 47) >> geometry.unit_shift) {
    fail(PYRT_ENOMEM, "the pool would span %llu units of %zu bytes, more than an address space",
         static_cast<unsigned long long>(max_units), geometry.unit_bytes);
  }
  base_ = static_cast<char*>(
      base::os::reserve(reserved_bytes(), std::max(geometry.unit_bytes, base::os::kHugePageBytes)));
  if (base_ == nullptr) {
    fail(PYRT_ENOMEM, "cannot reserve %zu bytes of address space for the pool", reserved_bytes());
  }
}

Region::~Region() { base::os::unreserve(base_, reserved_bytes()); }

bool Region::commit_next() {
  const uint64_t unit = committed_units_.load(std::memory_order_relaxed);
  if (unit == max_units_) return false;
  char* address = unit_address(unit);
  const size_t bytes = geometry_.unit_bytes;
  bool huge = false;
  if (options_.pages == Pages::hugetlb) {
    huge = base::os::commit_hugetlb(address, bytes);
    if (!huge && fallbacks_.fetch_add(1, std::memory_order_relaxed) == 0) {
      base::log(base::LogLevel::warning,
                "pool: no free hugetlb pages; using transparent huge pages instead");
    }
  }
  if (!huge && !options_.lazy && !base::os::commit(address, bytes)) return false;
  if (!huge && !base::os::advise_huge(address, bytes, options_.pages != Pages::small)) {
    fallbacks_.fetch_add(1, std::memory_order_relaxed);
  }
  if (options_.node >= 0) {
    if (const int error = base::os::prefer_node(address, bytes, options_.node)) {
      if (fallbacks_.fetch_add(1, std::memory_order_relaxed) == 0) {
        base::log(base::LogLevel::warning, "pool: node %d refused (%s); using any node",
                  options_.node, std::strerror(error));
      }
    }
  }
  if (options_.exclude_from_fork) base::os::exclude_from_fork(address, bytes);
  committed_units_.store(unit + 1, std::memory_order_release);
  return true;
}

void Region::park(uint64_t unit) {
  // Without NOHUGEPAGE the kernel's daemon could fill a parked unit again.
  base::os::advise_huge(unit_address(unit), geometry_.unit_bytes, false);
  base::os::discard(unit_address(unit), geometry_.unit_bytes);
}

void Region::revive(uint64_t unit) {
  if (options_.pages != Pages::small) {
    base::os::advise_huge(unit_address(unit), geometry_.unit_bytes, true);
  }
}

int Region::prefault_unit(uint64_t unit, const std::atomic<bool>& stop) {
  for (size_t at = 0; at < geometry_.unit_bytes; at += base::os::kHugePageBytes) {
    if (stop.load(std::memory_order_relaxed)) return ECANCELED;
    if (const int error = base::os::populate(unit_address(unit) + at, base::os::kHugePageBytes)) {
      return error;
    }
  }
  return 0;
}

void Region::collapse_missing() {
  if (options_.pages == Pages::small || options_.pages == Pages::hugetlb) return;
  if (huge_bytes() >= committed_bytes()) return;
  for (size_t at = 0; at < committed_bytes(); at += base::os::kHugePageBytes) {
    if (base::os::collapse(base_ + at, base::os::kHugePageBytes) != 0) {
      fallbacks_.fetch_add(1, std::memory_order_relaxed);
    }
  }
}

size_t Region::huge_bytes() const { return base::os::huge_bytes(base_, committed_bytes()); }

}  // namespace pyruntime::pool
