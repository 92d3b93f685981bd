#include <algorithm>
#include <cstring>

#include "capi/error.hpp"
#include "kv/disk.hpp"
#include "pyruntime/kv_tiers.h"

using namespace pyruntime;

struct pyrt_kv_disk : kv::Disk {
  using Disk::Disk;
};

namespace {

static_assert(static_cast<uint8_t>(kv::DiskFound::miss) == PYRT_KV_DISK_MISS);
static_assert(static_cast<uint8_t>(kv::DiskFound::hit) == PYRT_KV_DISK_HIT);
static_assert(static_cast<uint8_t>(kv::DiskFound::corrupt) == PYRT_KV_DISK_CORRUPT);
static_assert(static_cast<uint32_t>(kv::DiskFault::io) == PYRT_KV_DISK_FAIL_IO);
static_assert(static_cast<uint32_t>(kv::DiskFault::space) == PYRT_KV_DISK_FAIL_SPACE);
static_assert(static_cast<uint32_t>(kv::DiskFault::stop) == PYRT_KV_DISK_FAIL_STOP);
static_assert(static_cast<uint32_t>(kv::DiskFault::read) == PYRT_KV_DISK_FAIL_READ);

void require_keys(const uint8_t* keys, uint64_t n, uint64_t item_bytes) {
  constexpr uint64_t kMost = uint64_t{1} << 32;
  if (n > 0) capi::require(keys, "keys");
  if (n > kMost) {
    fail(PYRT_EINVAL, "n is %llu; it must be at most 2^32", static_cast<unsigned long long>(n));
  }
  capi::require_extents({static_cast<int64_t>(n), static_cast<int64_t>(item_bytes)}, "the items");
}

}  // namespace

extern "C" {

void pyrt_kv_disk_options_init(pyrt_kv_disk_options* options) noexcept {
  if (options == nullptr) return;
  *options = {sizeof *options, 0, 0, 0, nullptr};
}

pyrt_status pyrt_kv_disk_open(const char* path, const pyrt_kv_disk_options* options,
                              pyrt_kv_disk** out) noexcept {
  return capi::guard([&] {
    capi::require(path, "path");
    capi::require(options, "options");
    capi::require(out, "out");
    if (options->struct_size < sizeof *options) {
      fail(PYRT_EINVAL, "struct_size is %u; it must be at least %zu", options->struct_size,
           sizeof *options);
    }
    kv::DiskOptions wanted;
    wanted.item_bytes = options->item_bytes;
    wanted.capacity_bytes = options->capacity_bytes;
    if (options->fingerprint_bytes > kv::kMaxFingerprint) {
      fail(PYRT_EINVAL, "fingerprint_bytes is %u; it must be at most %u",
           options->fingerprint_bytes, kv::kMaxFingerprint);
    }
    if (options->fingerprint_bytes > 0) {
      capi::require(options->fingerprint, "fingerprint");
      wanted.fingerprint.assign(static_cast<const char*>(options->fingerprint),
                                options->fingerprint_bytes);
    }
    *out = new pyrt_kv_disk(path, wanted);
  });
}

void pyrt_kv_disk_close(pyrt_kv_disk* disk) noexcept { delete disk; }

pyrt_status pyrt_kv_disk_put(pyrt_kv_disk* disk, const uint8_t* keys, uint64_t n, const void* data,
                             uint64_t* stored) noexcept {
  return capi::guard([&] {
    capi::require(disk, "disk");
    require_keys(keys, n, disk->item_bytes());
    if (n > 0) capi::require(data, "data");
    const uint64_t fresh = disk->put(keys, n, data);
    if (stored != nullptr) *stored = fresh;
  });
}

pyrt_status pyrt_kv_disk_get(pyrt_kv_disk* disk, const uint8_t* keys, uint64_t n, void* out,
                             uint8_t* found) noexcept {
  return capi::guard([&] {
    capi::require(disk, "disk");
    require_keys(keys, n, disk->item_bytes());
    if (n > 0) capi::require(out, "out");
    if (n > 0) capi::require(found, "found");
    disk->get(keys, n, out, reinterpret_cast<kv::DiskFound*>(found));
  });
}

pyrt_status pyrt_kv_disk_match(pyrt_kv_disk* disk, const uint8_t* keys, uint64_t n,
                               uint64_t* out) noexcept {
  return capi::guard([&] {
    capi::require(disk, "disk");
    require_keys(keys, n, 1);
    capi::require(out, "out");
    *out = disk->match(keys, n);
  });
}

pyrt_status pyrt_kv_disk_fail_io(pyrt_kv_disk* disk, int64_t n, uint32_t fault) noexcept {
  return capi::guard([&] {
    capi::require(disk, "disk");
    if (n < 0) fail(PYRT_EINVAL, "n is %lld; it must not be negative", static_cast<long long>(n));
    if (fault > PYRT_KV_DISK_FAIL_READ) fail(PYRT_EINVAL, "fault is %u; it must be in 0..3", fault);
    disk->fail_io(n, static_cast<kv::DiskFault>(fault));
  });
}

pyrt_status pyrt_kv_disk_get_statistics(pyrt_kv_disk* disk, pyrt_kv_disk_statistics* out) noexcept {
  return capi::guard([&] {
    capi::require(disk, "disk");
    capi::require(out, "out");
    const kv::DiskStats s = disk->stats();
    const pyrt_kv_disk_statistics full = {
        out->struct_size, 0,           s.capacity, s.items,    s.hits,       s.misses,
        s.corrupt,        s.stored,    s.evicted,  s.failures, s.bytes_read, s.bytes_written,
        s.syncs,          s.file_bytes};
    std::memcpy(out, &full, std::min<size_t>(full.struct_size, sizeof full));
  });
}

pyrt_status pyrt_kv_disk_check(pyrt_kv_disk* disk) noexcept {
  return capi::guard([&] {
    capi::require(disk, "disk");
    disk->check();
  });
}

}  // extern "C"
