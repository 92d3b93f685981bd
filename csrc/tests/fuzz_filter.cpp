// Bytes that claim to be a filter: refused with a typed error, or a filter that answers.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "filter/filter.hpp"
#include "pyruntime/filter.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using pyruntime::filter::FileHeader;
  std::vector<uint8_t> bytes(data, data + size);
  if (size >= sizeof(FileHeader) && (data[size - 1] & 1) != 0) {
    // Half of the inputs get right checksums, so that what is behind them is reached.
    FileHeader h;
    std::memcpy(&h, bytes.data(), sizeof h);
    std::memcpy(h.magic, "PYRTCKF1", 8);
    h.major = 1 + (data[size - 1] >> 1 & 1);
    h.body_hash = pyruntime::base::xxh64(bytes.data() + sizeof h, size - sizeof h, 0);
    h.header_hash = pyruntime::base::xxh64(&h, offsetof(FileHeader, header_hash), 0);
    std::memcpy(bytes.data(), &h, sizeof h);
  }
  if (bytes.empty()) return 0;
  pyrt_filter* filter = nullptr;
  uint32_t kind = 0;
  const pyrt_status status = pyrt_filter_load(bytes.data(), bytes.size(), &filter, &kind);
  if (status != PYRT_OK) {
    if (status != PYRT_ECORRUPT && status != PYRT_EVERSION && status != PYRT_ENOMEM) std::abort();
    return 0;
  }
  uint64_t keys[64];
  for (uint64_t i = 0; i < 64; ++i) keys[i] = i;
  uint8_t out[64];
  uint64_t stored = 0, present = 0;
  if (pyrt_filter_insert(filter, keys, 64, 0, out, &stored) != PYRT_OK) std::abort();
  if (pyrt_filter_contains(filter, keys, 64, out, &present) != PYRT_OK) std::abort();
  if (present < stored || pyrt_filter_check(filter) != PYRT_OK) std::abort();
  if (pyrt_filter_grow(filter, 0) == PYRT_OK) {
    if (pyrt_filter_insert(filter, keys, 64, 0, nullptr, nullptr) != PYRT_OK) std::abort();
    if (pyrt_filter_remove(filter, keys, 64, nullptr, nullptr) != PYRT_OK) std::abort();
    if (pyrt_filter_check(filter) != PYRT_OK) std::abort();
  }
  pyrt_filter_destroy(filter);
  return 0;
}
