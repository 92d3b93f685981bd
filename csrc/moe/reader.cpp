#include "moe/reader.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/status.hpp"

namespace pyruntime::moe {

FileReader::FileReader(const Store& store, bool direct) : store_(store) {
  if (!direct) return;
  // The very file that is open, even if its name has gone to another since.
  const std::string same = "/proc/self/fd/" + std::to_string(store.descriptor());
  descriptor_ = open(same.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
}

FileReader::~FileReader() {
  if (descriptor_ >= 0) close(descriptor_);
}

void FileReader::read(const Record& record, void* out, bool again) {
  if (descriptor_ < 0 || again) {
    store_.read(record, out);
    return;
  }
  const uint64_t bytes = padded(record.bytes);
  uint64_t done = 0;
  while (done < bytes) {
    const ssize_t got = pread(descriptor_, static_cast<char*>(out) + done, bytes - done,
                              static_cast<off_t>(record.offset + done));
    if (got < 0 && errno == EINTR) continue;
    // Some file systems take O_DIRECT at open and refuse it here.
    if (got < 0 && errno == EINVAL) {
      store_.read(record, out);
      return;
    }
    if (got < 0) fail(PYRT_EIO, "%s: %s", store_.path().c_str(), std::strerror(errno));
    done += static_cast<uint64_t>(got);
    if (got == 0 || (done < bytes && done % kPage != 0)) {
      fail(PYRT_EIO, "%s ends at %llu, inside an extent that ends at %llu", store_.path().c_str(),
           static_cast<unsigned long long>(record.offset + done),
           static_cast<unsigned long long>(record.offset + bytes));
    }
  }
  store_.check(record, out);
}

}  // namespace pyruntime::moe
