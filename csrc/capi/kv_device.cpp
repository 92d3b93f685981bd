#include <cstring>

#include "capi/cuda_loader.hpp"
#include "capi/error.hpp"
#include "kv/cuda.hpp"

using namespace pyruntime;

namespace {

[[noreturn]] void wrong(const char* side, const char* name, uint64_t value, const char* allowed) {
  fail(PYRT_EINVAL, "%s%s is %llu; it must be %s", side, name,
       static_cast<unsigned long long>(value), allowed);
}

void check_layout(const pyrt_kv_device_copy& c, const pyrt_kv_layout& layout, const char* side) {
  if (layout.base == 0) fail(PYRT_EINVAL, "%sbase must not be NULL", side);
  if (layout.num_blocks == 0) return;  // every block is outside it and left alone
  // The last byte of the last block, with room: none of the products can wrap.
  using Wide = unsigned __int128;
  const Wide end = Wide{layout.base} + Wide{layout.num_blocks - 1} * layout.block_stride +
                   Wide{c.num_layers - 1} * layout.layer_stride +
                   Wide{c.num_parts - 1} * layout.part_stride + c.block_bytes;
  if (end > UINTPTR_MAX) wrong(side, "num_blocks", layout.num_blocks, "as many as fit into memory");
  if (layout.num_blocks > UINT32_MAX) wrong(side, "num_blocks", layout.num_blocks, "below 2^32");
  const auto distance = [&](const char* name, uint64_t value, uint64_t times) {
    if (times > 1 && value < c.block_bytes) wrong(side, name, value, "at least block_bytes");
  };
  distance("block_stride", layout.block_stride, layout.num_blocks);
  distance("layer_stride", layout.layer_stride, c.num_layers);
  distance("part_stride", layout.part_stride, c.num_parts);
}

pyrt_kv_device_copy checked(const pyrt_kv_device_copy* given) {
  capi::require(given, "copy");
  pyrt_kv_device_copy c{};
  if (given->struct_size < sizeof c) {
    fail(PYRT_EINVAL, "struct_size is %u; it must be at least %zu", given->struct_size, sizeof c);
  }
  std::memcpy(&c, given, sizeof c);
  if (c.num_layers < 1 || c.num_layers > 65536) wrong("", "num_layers", c.num_layers, "in 1..2^16");
  if (c.num_parts < 1 || c.num_parts > 16) wrong("", "num_parts", c.num_parts, "in 1..16");
  if (c.block_bytes < 1 || c.block_bytes > uint64_t{1} << 30) {
    wrong("", "block_bytes", c.block_bytes, "in 1..2^30");
  }
  if (c.num_blocks > UINT32_MAX) wrong("", "num_blocks", c.num_blocks, "below 2^32");
  if (c.num_runs > c.num_blocks) wrong("", "num_runs", c.num_runs, "at most num_blocks");
  if (c.num_blocks == 0) return c;
  if (c.num_runs == 0) wrong("", "num_runs", c.num_runs, "at least 1");
  check_layout(c, c.from, "from.");
  check_layout(c, c.to, "to.");
  if (c.runs == 0) fail(PYRT_EINVAL, "runs must not be NULL");
  if (c.runs % alignof(pyrt_kv_run) != 0) wrong("", "runs", c.runs, "4-byte aligned");
  return c;
}

}  // namespace

extern "C" pyrt_status pyrt_kv_copy_async(const pyrt_kv_device_copy* copy,
                                          uintptr_t stream) noexcept {
  return capi::guard([&] {
    const pyrt_kv_device_copy c = checked(copy);
    PYRT_CUDA_CALL(pyrt_cuda_kv_copy, &c, reinterpret_cast<void*>(stream));
  });
}
