// The parser of .mxs files on any bytes. Two ways in: the input as a whole file, and the input as
// changes (place, value) to a well-formed store whose checksums are then made right again, so that
// the checks behind them are reached. Opening must give a documented status; what opens must read.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "base/crc32c.hpp"
#include "base/status.hpp"
#include "moe/store.hpp"

namespace moe = pyruntime::moe;

namespace {

std::vector<uint8_t> seed_store() {
  const std::string path = "/tmp/pyrt-fuzz-moe-" + std::to_string(getpid());
  moe::StoreInfo info{};
  info.num_layers = 2;
  info.num_experts = 2;
  info.hidden = info.ffn = 16;
  info.levels = 2;
  for (auto& bits : info.bits) {
    bits[0] = 4;
    bits[1] = 8;
  }
  {
    moe::StoreWriter writer(path, info);
    for (int level = 0; level < 2; ++level) {
      const std::vector<char> data(
          static_cast<size_t>(moe::matrix_offset(writer.header(), level, moe::kMatrices)), 1);
      for (int expert = 0; expert < 2; ++expert) {
        writer.add_plane(1, expert, level, data.data(), static_cast<int64_t>(data.size()), {});
      }
    }
    const moe::Shape dense{3, 5, 1, {8}};
    const std::vector<char> data(static_cast<size_t>(moe::plane_bytes(dense, 0)), 2);
    writer.add_dense(0, 1, dense, data.data(), static_cast<int64_t>(data.size()), {});
    writer.commit();
  }
  std::vector<uint8_t> bytes;
  if (FILE* file = std::fopen(path.c_str(), "rb")) {
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) {
      bytes.push_back(static_cast<uint8_t>(c));
    }
    std::fclose(file);
  }
  unlink(path.c_str());
  return bytes;
}

void repair(std::vector<uint8_t>& bytes) {
  moe::Header header;
  moe::Footer footer;
  std::memcpy(&header, bytes.data(), sizeof header);
  header.crc = pyruntime::base::crc32c(&header, offsetof(moe::Header, crc));
  std::memcpy(bytes.data(), &header, sizeof header);
  const size_t at = bytes.size() - sizeof footer;
  std::memcpy(&footer, bytes.data() + at, sizeof footer);
  if (header.index_offset <= at) {
    footer.index_crc =
        pyruntime::base::crc32c(bytes.data() + header.index_offset, at - header.index_offset);
  }
  footer.crc = pyruntime::base::crc32c(&footer, offsetof(moe::Footer, crc));
  std::memcpy(bytes.data() + at, &footer, sizeof footer);
}

void open_bytes(const uint8_t* data, size_t size) {
  const int descriptor = memfd_create("mxs", MFD_CLOEXEC);
  if (descriptor < 0) return;
  size_t at = 0;
  while (at < size) {
    const ssize_t put = write(descriptor, data + at, size - at);
    if (put <= 0) break;
    at += static_cast<size_t>(put);
  }
  try {
    const moe::Store store("/proc/self/fd/" + std::to_string(descriptor));
    const moe::Header& h = store.header();
    for (const moe::Record& r : store.records()) {
      std::vector<char> out(r.bytes);
      try {
        store.read(r, out.data());
      } catch (const pyruntime::Error& error) {
        if (error.status() != PYRT_ECORRUPT) std::abort();
      }
    }
    for (uint32_t layer = 0; layer < h.num_layers; ++layer) {
      const bool there = store.find(layer, 0, 0) != nullptr;
      if (there != (store.sparse(layer) && h.num_experts > 0)) std::abort();
    }
  } catch (const pyruntime::Error& error) {
    if (error.status() != PYRT_ECORRUPT && error.status() != PYRT_EVERSION) {
      std::fprintf(stderr, "fuzz_moe_store: %s\n", error.what());
      std::abort();
    }
  }
  close(descriptor);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<uint8_t> seed = seed_store();
  if (size == 0) return 0;
  if (data[0] % 4 == 0) {
    open_bytes(data + 1, size - 1);
    return 0;
  }
  // Places count through the header, the index and the footer; the extents' bytes matter little.
  std::vector<uint8_t> bytes = seed;
  moe::Header header;
  std::memcpy(&header, bytes.data(), sizeof header);
  const size_t tail = bytes.size() - header.index_offset;
  for (size_t i = 1; i + 2 < size && i < 64; i += 3) {
    const size_t place = (data[i] | size_t{data[i + 1]} << 8) % (sizeof header + tail);
    const size_t at = place < sizeof header ? place : header.index_offset + (place - sizeof header);
    bytes[at] = data[i + 2];
  }
  if (data[0] % 4 != 1) repair(bytes);
  if (data[0] % 4 == 3 && size > 2) bytes.resize(bytes.size() - data[1] % 64);
  open_bytes(bytes.data(), bytes.size());
  return 0;
}
