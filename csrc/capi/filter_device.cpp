#include <cstring>

#include "capi/cuda_loader.hpp"
#include "capi/error.hpp"
#include "filter/cuda.hpp"
#include "filter/filter.hpp"
#include "pyruntime/filter.h"

using pyruntime::fail;
using pyruntime::capi::guard;
using pyruntime::capi::require;
namespace filter = pyruntime::filter;

namespace {

const filter::Filter* of(const pyrt_filter* handle) {
  return reinterpret_cast<const filter::Filter*>(handle);
}

void require_address(uintptr_t address, uintptr_t alignment, const char* name) {
  if (address == 0) fail(PYRT_EINVAL, "%s must not be NULL", name);
  if (address % alignment != 0) {
    fail(PYRT_EINVAL, "%s must be aligned to %llu bytes", name,
         static_cast<unsigned long long>(alignment));
  }
}

struct Call {
  filter::View view;
  int bits, slots;
};

Call checked(const pyrt_filter_device* device, uintptr_t keys, uint64_t n, uintptr_t bytes) {
  require(device, "device");
  pyrt_filter_device d{};
  if (device->struct_size < sizeof d) {
    fail(PYRT_EINVAL, "device.struct_size is %u; it must be at least %zu", device->struct_size,
         sizeof d);
  }
  std::memcpy(&d, device, sizeof d);
  const bool shape = (d.bits == 8 || d.bits == 16) && (d.slots == 8 || d.slots == 16);
  const bool sane = shape && d.threshold >= 1 && d.threshold <= d.slots && d.buckets >= 2 &&
                    d.buckets % 2 == 0 && d.buckets <= filter::kMaxSegmentSlots / d.slots &&
                    d.num_segments >= 1 && d.num_segments <= filter::kMaxSegments &&
                    d.words_bytes == d.num_segments * d.buckets * (d.bits * d.slots / 8);
  if (!sane) fail(PYRT_EINVAL, "device has values that pyrt_filter_device_layout never gives");
  require_address(d.words, 16, "device.words");
  require_address(d.epochs, 4, "device.epochs");
  require_address(d.counters, 8, "device.counters");
  if (n > uint64_t{1} << 47) {
    fail(PYRT_EINVAL, "n is %llu; no address space holds that many keys",
         static_cast<unsigned long long>(n));
  }
  if (n > 0) {
    require_address(keys, 8, "keys");
    require_address(bytes, 1, "status or out");
  }
  return {{reinterpret_cast<uint64_t*>(d.words), reinterpret_cast<uint32_t*>(d.epochs),
           reinterpret_cast<uint64_t*>(d.counters), d.num_segments, d.seed, d.buckets, d.threshold,
           nullptr},
          static_cast<int>(d.bits),
          static_cast<int>(d.slots)};
}

void require_words(const filter::Filter* f, const void* words, uint64_t bytes) {
  require(words, "words");
  if (bytes != f->words_bytes()) {
    fail(PYRT_EINVAL, "bytes is %llu; the filter's words have %llu",
         static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(f->words_bytes()));
  }
}

}  // namespace

extern "C" {

pyrt_status pyrt_filter_device_layout(const pyrt_filter* handle, pyrt_filter_device* out) noexcept {
  return guard([&] {
    require(handle, "filter");
    require(out, "out");
    if (out->struct_size < sizeof *out) {
      fail(PYRT_EINVAL, "out.struct_size is %u; it must be at least %zu", out->struct_size,
           sizeof *out);
    }
    const filter::Filter* f = of(handle);
    const filter::View v = f->view();
    *out = {sizeof *out,    f->bits(), f->slots(),       v.threshold, v.buckets, 0,
            v.num_segments, v.seed,    f->words_bytes(), 0,           0,         0};
  });
}

pyrt_status pyrt_filter_read_words(const pyrt_filter* handle, void* words,
                                   uint64_t bytes) noexcept {
  return guard([&] {
    require(handle, "filter");
    require_words(of(handle), words, bytes);
    of(handle)->read_words(words);
  });
}

pyrt_status pyrt_filter_write_words(pyrt_filter* handle, const void* words,
                                    uint64_t bytes) noexcept {
  return guard([&] {
    require(handle, "filter");
    require_words(of(handle), words, bytes);
    reinterpret_cast<filter::Filter*>(handle)->write_words(words);
  });
}

pyrt_status pyrt_filter_device_insert_async(const pyrt_filter_device* device, uintptr_t keys,
                                            uint64_t n, uintptr_t status, uintptr_t scratch,
                                            uintptr_t stream) noexcept {
  return guard([&] {
    const Call c = checked(device, keys, n, status);
    if (n == 0) return;
    require_address(scratch, 8, "scratch");
    PYRT_CUDA_CALL(pyrt_cuda_filter_insert, &c.view, c.bits, c.slots,
                   reinterpret_cast<const uint64_t*>(keys), n, reinterpret_cast<uint8_t*>(status),
                   reinterpret_cast<uint64_t*>(scratch), reinterpret_cast<void*>(stream));
  });
}

pyrt_status pyrt_filter_device_contains_async(const pyrt_filter_device* device, uintptr_t keys,
                                              uint64_t n, uintptr_t out,
                                              uintptr_t stream) noexcept {
  return guard([&] {
    const Call c = checked(device, keys, n, out);
    if (n == 0) return;
    PYRT_CUDA_CALL(pyrt_cuda_filter_contains, &c.view, c.bits, c.slots,
                   reinterpret_cast<const uint64_t*>(keys), n, reinterpret_cast<uint8_t*>(out),
                   reinterpret_cast<void*>(stream));
  });
}

pyrt_status pyrt_filter_device_remove_async(const pyrt_filter_device* device, uintptr_t keys,
                                            uint64_t n, uintptr_t status,
                                            uintptr_t stream) noexcept {
  return guard([&] {
    const Call c = checked(device, keys, n, status);
    if (n == 0) return;
    PYRT_CUDA_CALL(pyrt_cuda_filter_remove, &c.view, c.bits, c.slots,
                   reinterpret_cast<const uint64_t*>(keys), n, reinterpret_cast<uint8_t*>(status),
                   reinterpret_cast<void*>(stream));
  });
}

}  // extern "C"
