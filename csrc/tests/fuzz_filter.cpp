// Bytes that claim to be a filter: refused with a typed error, or a filter that answers.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "filter/filter.hpp"
#include "pyruntime/filter.h"

namespace {

bool typed(pyrt_status status) {
  return status == PYRT_ECORRUPT || status == PYRT_EVERSION || status == PYRT_ENOMEM;
}

// The same bytes as a file, of which only the header is checked: lookups stay inside it.
void map_unverified(const std::vector<uint8_t>& bytes, bool loads) {
  const int descriptor = memfd_create("filter", MFD_CLOEXEC);
  if (descriptor < 0) return;
  if (write(descriptor, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) {
    std::abort();
  }
  char path[64];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
  pyrt_filter* filter = nullptr;
  const pyrt_status status = pyrt_filter_open_map(path, 0, &filter, nullptr);
  close(descriptor);
  if (status != PYRT_OK) {
    if (!typed(status) || loads) std::abort();
    return;
  }
  uint64_t keys[64];
  uint8_t out[64];
  uint32_t counts[64];
  for (uint64_t i = 0; i < 64; ++i) keys[i] = i;
  if (pyrt_filter_contains(filter, keys, 64, out, nullptr) != PYRT_OK ||
      pyrt_filter_contains_bits(filter, keys, 64, out, nullptr) != PYRT_OK ||
      pyrt_filter_count(filter, keys, 64, counts) != PYRT_OK ||
      pyrt_filter_insert(filter, keys, 64, 0, out, nullptr) != PYRT_ESTATE) {
    std::abort();
  }
  pyrt_filter_destroy(filter);
}

}  // namespace

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
  map_unverified(bytes, status == PYRT_OK);
  if (status != PYRT_OK) {
    if (!typed(status)) std::abort();
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
    if (pyrt_filter_contains(filter, keys, 64, out, &present) != PYRT_OK) std::abort();
    uint64_t still = 0;
    uint32_t dropped = 0;
    if (pyrt_filter_compact(filter, &dropped) != PYRT_OK) std::abort();
    if (pyrt_filter_contains(filter, keys, 64, out, &still) != PYRT_OK) std::abort();
    if (still < present || pyrt_filter_check(filter) != PYRT_OK) std::abort();
  }
  pyrt_filter_destroy(filter);
  return 0;
}
