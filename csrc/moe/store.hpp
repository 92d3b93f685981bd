// A store of nested experts on disk (.mxs, docs/mxs.md): opened and checked without reading data.
//
// Opening reads header, footer and index: a truncated, half-written, damaged or newer store, an
// index that points outside the file or twice to the same bytes, and an extent that has not the
// length its shape demands are refused with the file's name, what was expected and what was found.
// Extents are read with pread (a file that shrinks later gives an error, never a SIGBUS) and carry
// a CRC-32C that the reader checks once per load.
//
// Threads: an open store is immutable; all members may be called from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moe/layout.hpp"

namespace pyruntime::moe {

class Store {
 public:
  // Throws PYRT_ENOENT, PYRT_EIO, PYRT_ECORRUPT, PYRT_EVERSION.
  explicit Store(const std::string& path);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  const std::string& path() const noexcept { return path_; }
  int descriptor() const noexcept { return descriptor_; }  // for readers of their own; buffered
  const Header& header() const noexcept { return header_; }
  const std::vector<Record>& records() const noexcept { return records_; }
  bool sparse(int64_t layer) const noexcept;

  // Shape of gate, up or down.
  Shape shape(int matrix) const noexcept { return expert_shape(header_, matrix); }
  // Data bytes of one expert's extent at `level`.
  int64_t extent_bytes(int level) const noexcept {
    return matrix_offset(header_, level, kMatrices);
  }

  // The extent of an expert's plane; nullptr outside the store. O(1).
  const Record* find(int64_t layer, int64_t expert, int level) const noexcept;
  // The extent of a dense matrix; nullptr if there is none. O(log n).
  const Record* find_dense(int64_t layer, int64_t matrix) const noexcept;

  // Reads an extent's data into `out` (record.bytes) and checks it. Throws PYRT_EIO (also for a
  // short read), PYRT_ECORRUPT for a checksum that differs.
  void read(const Record& record, void* out) const;
  // Throws PYRT_ECORRUPT unless `data` has the record's checksum.
  void check(const Record& record, const void* data) const;
  // Reads every extent; throws at the first that is bad.
  void verify() const;

 private:
  void open();

  std::string path_;
  int descriptor_ = -1;
  Header header_{};
  std::vector<Record> records_;       // file order
  std::vector<uint32_t> places_;      // [layer slot, expert, level] -> record
  std::vector<int32_t> layer_slots_;  // layer -> slot of sparse layers, or -1
  std::vector<uint32_t> dense_;       // records of dense matrices by (layer, number)
};

// What a store is about; see Header.
struct StoreInfo {
  uint32_t num_layers;
  uint32_t num_experts;
  uint32_t hidden;
  uint32_t ffn;
  uint32_t levels;
  uint8_t bits[kMatrices][kMaxLevels];
  uint8_t model_hash[32];
};

// Numbers a writer of an extent knows beside its bytes.
struct Quality {
  float unit[kMatrices];
  float error[kMatrices];
  float energy[kMatrices];
};

// Writes a store: extents in any order, then commit(). The data go to a temporary file beside the
// target, which takes its name only once everything is on disk; what an interrupted writer leaves
// has another name and no commit mark. One thread at a time.
class StoreWriter {
 public:
  // Throws PYRT_EINVAL for sizes that make no store, PYRT_EIO.
  StoreWriter(const std::string& path, const StoreInfo& info);
  ~StoreWriter();  // without commit: removes the temporary file
  StoreWriter(const StoreWriter&) = delete;
  StoreWriter& operator=(const StoreWriter&) = delete;

  const Header& header() const noexcept { return header_; }
  // `data` has extent_bytes(level) bytes. Throws PYRT_EINVAL outside the store, PYRT_ESTATE for an
  // extent that is there already, PYRT_EIO.
  void add_plane(int64_t layer, int64_t expert, int level, const void* data, int64_t bytes,
                 const Quality& quality);
  void add_dense(int64_t layer, int64_t matrix, const Shape& shape, const void* data, int64_t bytes,
                 const Quality& quality);
  // Throws PYRT_ESTATE if a layer has some of its extents but not all.
  void commit();

 private:
  void put(Record record, const void* data);
  void write_at(const void* data, size_t size, uint64_t offset);

  std::string path_, temporary_;
  int descriptor_ = -1;
  Header header_{};
  uint64_t end_ = kPage;
  std::vector<Record> records_;
};

// Checks an index against a header as opening does; throws PYRT_ECORRUPT. `path` is for messages.
void check_index(const std::string& path, const Header& header, const std::vector<Record>& records);

}  // namespace pyruntime::moe
