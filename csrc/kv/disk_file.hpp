// The file under the disk tier: positioned reads and writes, one lock, and faults for tests.
//
// All members throw Error: PYRT_EFULL when the disk has no room, PYRT_EIO for everything else that
// the system reports. Any thread may call; calls for different parts of the file run beside each
// other. An interface, so that tests can put a simulated disk in the file's place, which forgets
// what was not synced.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace pyruntime::kv {

class DiskFile {
 public:
  virtual ~DiskFile() = default;
  virtual uint64_t size() = 0;
  virtual void resize(uint64_t bytes) = 0;  // what is new reads as zeroes
  // False when the file ends before `bytes` bytes.
  virtual bool read(uint64_t offset, void* out, uint64_t bytes) = 0;
  virtual void write(uint64_t offset, const void* data, uint64_t bytes) = 0;
  // Returns once everything written before is on the disk.
  virtual void sync() = 0;
};

// Opens or creates a file for its owner alone, with mode 0600: KV blocks are other people's text.
// The lock ends with the file. Throws PYRT_ENOENT without the folder, PYRT_EIO, and PYRT_ESTATE
// while the file is open elsewhere, in this process or another.
std::unique_ptr<DiskFile> open_disk_file(const std::string& path);

// What goes wrong, in tests.
enum class DiskFault : uint32_t {
  io = 0,     // one write or sync fails
  space = 1,  // one write or sync finds the disk full
  stop = 2,   // one write is half done, and nothing is written or synced from then on
  read = 3,   // one read fails
};

// Passes everything on, but for the faults it was told.
class FaultyFile final : public DiskFile {
 public:
  explicit FaultyFile(std::unique_ptr<DiskFile> file) : file_(std::move(file)) {}

  // The n-th such call from now, 1-based, goes wrong; 0: none.
  void fail(int64_t n, DiskFault fault) noexcept;

  uint64_t size() override { return file_->size(); }
  void resize(uint64_t bytes) override;
  bool read(uint64_t offset, void* out, uint64_t bytes) override;
  void write(uint64_t offset, const void* data, uint64_t bytes) override;
  void sync() override;

 private:
  bool due(bool reading) noexcept;
  void fault(const char* what);

  std::unique_ptr<DiskFile> file_;
  std::atomic<int64_t> countdown_{0};
  std::atomic<DiskFault> fault_{DiskFault::io};
  std::atomic<bool> stopped_{false};
};

}  // namespace pyruntime::kv
