// Reads planes from an open store straight into the memory they are computed from.
//
// Direct: the store's file opened once more with O_DIRECT; extents, their padding and the cache's
// memory are page-aligned, so nothing is copied and the page cache is left to others. Where the
// file system refuses that, or it is not wanted, plain pread. Either way an extent is read by
// pread: a file that shrinks gives an error, never a SIGBUS.
#pragma once

#include <string>

#include "moe/store.hpp"

namespace pyruntime::moe {

// What a cache reads from; tests put faulty ones in its place. Any thread may call.
class Reader {
 public:
  virtual ~Reader() = default;
  // Reads and checks an extent into out[padded(record.bytes)], page-aligned. Throws PYRT_EIO,
  // PYRT_ECORRUPT. `again`: the bytes were bad; read them another way if there is one.
  virtual void read(const Record& record, void* out, bool again) = 0;
  virtual const char* name() const noexcept = 0;
};

class FileReader final : public Reader {
 public:
  FileReader(const Store& store, bool direct);
  ~FileReader() override;
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  void read(const Record& record, void* out, bool again) override;
  const char* name() const noexcept override { return descriptor_ < 0 ? "buffered" : "direct"; }

 private:
  const Store& store_;
  int descriptor_ = -1;  // with O_DIRECT, or none
};

}  // namespace pyruntime::moe
