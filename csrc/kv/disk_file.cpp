#include "kv/disk_file.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/status.hpp"

namespace pyruntime::kv {
namespace {

using ull = unsigned long long;

constexpr uint64_t kMostAtOnce = uint64_t{1} << 30;

class PosixFile final : public DiskFile {
 public:
  explicit PosixFile(const std::string& path) : path_(path) {
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (descriptor_ < 0) {
      fail(errno == ENOENT ? PYRT_ENOENT : PYRT_EIO, "%s: %s", path.c_str(), std::strerror(errno));
    }
    try {
      struct stat found{};
      if (fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode)) {
        fail(PYRT_EIO, "%s is not a regular file", path.c_str());
      }
      if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK) refuse("locking", 0);
        fail(PYRT_ESTATE, "%s is in use, by this process or another one", path.c_str());
      }
    } catch (...) {
      ::close(descriptor_);
      throw;
    }
  }

  // No unlock: it would end the parent's lock when a forked child closes its copy.
  ~PosixFile() override { ::close(descriptor_); }

  uint64_t size() override {
    struct stat found{};
    if (fstat(descriptor_, &found) != 0) refuse("asking for the size", 0);
    return static_cast<uint64_t>(found.st_size);
  }

  void resize(uint64_t bytes) override {
    if (ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) refuse("resizing", bytes);
  }

  bool read(uint64_t offset, void* out, uint64_t bytes) override {
    auto* to = static_cast<char*>(out);
    while (bytes > 0) {
      const ssize_t got =
          pread(descriptor_, to, std::min(bytes, kMostAtOnce), static_cast<off_t>(offset));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) refuse("reading", offset);
      if (got == 0) return false;
      to += got;
      bytes -= static_cast<uint64_t>(got);
      offset += static_cast<uint64_t>(got);
    }
    return true;
  }

  void write(uint64_t offset, const void* data, uint64_t bytes) override {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t put =
          pwrite(descriptor_, from, std::min(bytes, kMostAtOnce), static_cast<off_t>(offset));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) refuse("writing", offset);
      from += put;
      bytes -= static_cast<uint64_t>(put);
      offset += static_cast<uint64_t>(put);
    }
  }

  void sync() override {
    if (fdatasync(descriptor_) != 0) refuse("syncing", 0);
  }

 private:
  [[noreturn]] void refuse(const char* what, uint64_t offset) const {
    const bool full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG;
    fail(full ? PYRT_EFULL : PYRT_EIO, "%s: %s at offset %llu: %s", path_.c_str(), what,
         static_cast<ull>(offset), std::strerror(errno));
  }

  std::string path_;
  int descriptor_ = -1;
};

}  // namespace

std::unique_ptr<DiskFile> open_disk_file(const std::string& path) {
  return std::make_unique<PosixFile>(path);
}

void FaultyFile::fail(int64_t n, DiskFault fault) noexcept {
  fault_.store(fault, std::memory_order_relaxed);
  countdown_.store(n, std::memory_order_relaxed);
}

bool FaultyFile::due(bool reading) noexcept {
  if ((fault_.load(std::memory_order_relaxed) == DiskFault::read) != reading) return false;
  if (countdown_.load(std::memory_order_relaxed) == 0) return false;
  return countdown_.fetch_sub(1, std::memory_order_relaxed) == 1;
}

void FaultyFile::fault(const char* what) {
  const bool full = fault_.load(std::memory_order_relaxed) == DiskFault::space;
  pyruntime::fail(full ? PYRT_EFULL : PYRT_EIO, "%s failed, as a test asked for", what);
}

void FaultyFile::resize(uint64_t bytes) {
  if (stopped_.load(std::memory_order_relaxed)) fault("resizing");
  file_->resize(bytes);
}

bool FaultyFile::read(uint64_t offset, void* out, uint64_t bytes) {
  if (due(true)) fault("reading");
  return file_->read(offset, out, bytes);
}

void FaultyFile::write(uint64_t offset, const void* data, uint64_t bytes) {
  if (stopped_.load(std::memory_order_relaxed)) fault("writing");
  if (due(false)) {
    if (fault_.load(std::memory_order_relaxed) == DiskFault::stop) {
      stopped_.store(true, std::memory_order_relaxed);
      file_->write(offset, data, bytes / 2);
    }
    fault("writing");
  }
  file_->write(offset, data, bytes);
}

void FaultyFile::sync() {
  if (stopped_.load(std::memory_order_relaxed)) fault("syncing");
  if (due(false)) {
    if (fault_.load(std::memory_order_relaxed) == DiskFault::stop) {
      stopped_.store(true, std::memory_order_relaxed);
    }
    fault("syncing");
  }
  file_->sync();
}

}  // namespace pyruntime::kv
