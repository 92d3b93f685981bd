#include <cstring>

#include "capi/cuda_loader.hpp"
#include "capi/error.hpp"
#include "pool/cuda.hpp"

using namespace pyruntime;

namespace {

// The fields of a device copy, those beyond the caller's struct_size as zero.
pyrt_pool_device_copy checked(const pyrt_pool_device_copy* given) {
  capi::require(given, "copy");
  pyrt_pool_device_copy c{};
  if (given->struct_size < sizeof c) {
    fail(PYRT_EINVAL, "struct_size is %u; it must be at least %zu", given->struct_size, sizeof c);
  }
  std::memcpy(&c, given, sizeof c);
  const auto wrong = [](const char* name, uint64_t value, const char* allowed) {
    fail(PYRT_EINVAL, "%s is %llu; it must be %s", name, static_cast<unsigned long long>(value),
         allowed);
  };
  constexpr uint64_t kMaxBytes = uint64_t{1} << 30;
  if (c.object_bytes == 0 || c.object_bytes > kMaxBytes) {
    wrong("object_bytes", c.object_bytes, "in 1..2^30");
  }
  if (c.per_unit == 0) wrong("per_unit", c.per_unit, "at least 1");
  if (c.stride < c.object_bytes || c.stride > 4 * kMaxBytes) {
    wrong("stride", c.stride, "in object_bytes..2^32");
  }
  if (c.unit_bytes / c.per_unit < c.stride) {
    wrong("unit_bytes", c.unit_bytes, "at least per_unit * stride");
  }
  if (c.n > UINT32_MAX) wrong("n", c.n, "below 2^32");
  if (c.packed_stride < c.object_bytes || c.packed_stride > 4 * kMaxBytes) {
    wrong("packed_stride", c.packed_stride, "in object_bytes..2^32");
  }
  if (c.n == 0) return c;
  const auto address = [&](uintptr_t value, const char* name, uint64_t bytes) {
    if (value == 0) fail(PYRT_EINVAL, "%s must not be NULL", name);
    if (bytes > UINTPTR_MAX - value) wrong(name, value, "an address below the end of memory");
  };
  const uint64_t last_unit = c.num_objects == 0 ? 0 : (c.num_objects - 1) / c.per_unit;
  if (last_unit >= (uint64_t{1} << 62) / c.unit_bytes) {
    wrong("num_objects", c.num_objects, "as many as fit into memory");
  }
  address(c.base, "base", (last_unit + 1) * c.unit_bytes);
  address(c.packed, "packed", c.n * c.packed_stride);
  address(c.indices, "indices", c.n * sizeof(uint32_t));
  if (c.indices % alignof(uint32_t) != 0) wrong("indices", c.indices, "4-byte aligned");
  return c;
}

}  // namespace

extern "C" {

pyrt_status pyrt_pool_gather_async(const pyrt_pool_device_copy* copy, uintptr_t stream) noexcept {
  return capi::guard([&] {
    const pyrt_pool_device_copy c = checked(copy);
    PYRT_CUDA_CALL(pyrt_cuda_pool_gather, &c, reinterpret_cast<void*>(stream));
  });
}

pyrt_status pyrt_pool_scatter_async(const pyrt_pool_device_copy* copy, uintptr_t stream) noexcept {
  return capi::guard([&] {
    const pyrt_pool_device_copy c = checked(copy);
    PYRT_CUDA_CALL(pyrt_cuda_pool_scatter, &c, reinterpret_cast<void*>(stream));
  });
}

}  // extern "C"
