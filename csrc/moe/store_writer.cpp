#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/crc32c.hpp"
#include "base/status.hpp"
#include "moe/store.hpp"

namespace pyruntime::moe {

StoreWriter::StoreWriter(const std::string& path, const StoreInfo& info)
    : path_(path), temporary_(path + ".part-" + std::to_string(getpid())) {
  std::memcpy(header_.magic, kMagic, sizeof kMagic);
  header_.version = kVersion;
  header_.header_bytes = sizeof(Header);
  header_.record_bytes = sizeof(Record);
  header_.page = kPage;
  header_.num_layers = info.num_layers;
  header_.num_experts = info.num_experts;
  header_.hidden = info.hidden;
  header_.ffn = info.ffn;
  header_.levels = info.levels;
  std::memcpy(header_.bits, info.bits, sizeof header_.bits);
  std::memcpy(header_.model_hash, info.model_hash, sizeof header_.model_hash);
  if (info.num_layers < 1 || info.num_layers > 4096 || info.num_experts > 4096) {
    fail(PYRT_EINVAL, "num_layers is %u and num_experts %u; they must be in 1..4096 and 0..4096",
         info.num_layers, info.num_experts);
  }
  for (int matrix = 0; matrix < kMatrices && info.num_experts > 0; ++matrix) {
    if (info.levels > kMaxLevels || !valid(expert_shape(header_, matrix))) {
      fail(PYRT_EINVAL,
           "matrix %d: %u x %u at %u levels is no shape of a store; widths rise by 2, 4 or 8 bits "
           "to at most 8",
           matrix, info.ffn, info.hidden, info.levels);
    }
  }
  descriptor_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail(PYRT_EIO, "%s: %s", temporary_.c_str(), std::strerror(errno));
}

StoreWriter::~StoreWriter() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
    ::unlink(temporary_.c_str());
  }
}

void StoreWriter::write_at(const void* data, size_t size, uint64_t offset) {
  const auto* from = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t put = pwrite(descriptor_, from, std::min<size_t>(size, size_t{1} << 30),
                               static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) {
      fail(PYRT_EIO, "%s: writing at offset %llu: %s", temporary_.c_str(),
           static_cast<unsigned long long>(offset), std::strerror(errno));
    }
    from += put;
    size -= static_cast<size_t>(put);
    offset += static_cast<uint64_t>(put);
  }
}

void StoreWriter::put(Record record, const void* data) {
  if (descriptor_ < 0) fail(PYRT_ESTATE, "the store is committed already");
  record.offset = end_;
  record.crc = base::crc32c(data, record.bytes);
  write_at(data, record.bytes, end_);
  records_.push_back(record);
  end_ += padded(record.bytes);
}

void StoreWriter::add_plane(int64_t layer, int64_t expert, int level, const void* data,
                            int64_t bytes, const Quality& quality) {
  if (layer < 0 || layer >= int64_t{header_.num_layers} || expert < 0 ||
      expert >= int64_t{header_.num_experts} || level < 0 ||
      level >= static_cast<int>(header_.levels)) {
    fail(PYRT_EINVAL, "layer %lld, expert %lld, level %d is outside the store",
         static_cast<long long>(layer), static_cast<long long>(expert), level);
  }
  const int64_t expected = matrix_offset(header_, level, kMatrices);
  if (bytes != expected) {
    fail(PYRT_EINVAL, "the plane has %lld bytes; level %d takes %lld",
         static_cast<long long>(bytes), level, static_cast<long long>(expected));
  }
  Record r{};
  r.kind = kExpertPlane;
  r.layer = static_cast<uint32_t>(layer);
  r.expert = static_cast<uint32_t>(expert);
  r.level = static_cast<uint32_t>(level);
  r.bytes = static_cast<uint64_t>(bytes);
  std::memcpy(r.unit, quality.unit, sizeof r.unit);
  std::memcpy(r.error, quality.error, sizeof r.error);
  std::memcpy(r.energy, quality.energy, sizeof r.energy);
  put(r, data);
}

void StoreWriter::add_dense(int64_t layer, int64_t matrix, const Shape& shape, const void* data,
                            int64_t bytes, const Quality& quality) {
  if (layer < 0 || layer >= int64_t{header_.num_layers} || matrix < 0 || matrix > 0xffff) {
    fail(PYRT_EINVAL, "dense matrix %lld of layer %lld is outside the store",
         static_cast<long long>(matrix), static_cast<long long>(layer));
  }
  int64_t expected = 0;
  if (!valid(shape)) fail(PYRT_EINVAL, "the dense matrix has no valid shape");
  for (int level = 0; level < shape.levels; ++level) expected += plane_bytes(shape, level);
  if (bytes != expected) {
    fail(PYRT_EINVAL, "the dense matrix has %lld bytes; its shape takes %lld",
         static_cast<long long>(bytes), static_cast<long long>(expected));
  }
  Record r{};
  r.kind = kDenseMatrix;
  r.layer = static_cast<uint32_t>(layer);
  r.expert = static_cast<uint32_t>(matrix);
  r.bytes = static_cast<uint64_t>(bytes);
  r.rows = static_cast<uint32_t>(shape.rows);
  r.columns = static_cast<uint32_t>(shape.columns);
  r.dense_levels = static_cast<uint32_t>(shape.levels);
  std::memcpy(r.dense_bits, shape.bits, sizeof r.dense_bits);
  std::memcpy(r.unit, quality.unit, sizeof r.unit);
  std::memcpy(r.error, quality.error, sizeof r.error);
  std::memcpy(r.energy, quality.energy, sizeof r.energy);
  put(r, data);
}

void StoreWriter::commit() {
  if (descriptor_ < 0) fail(PYRT_ESTATE, "the store is committed already");
  header_.index_offset = end_;
  header_.num_records = records_.size();
  header_.file_bytes = end_ + records_.size() * sizeof(Record) + sizeof(Footer);
  header_.crc = base::crc32c(&header_, offsetof(Header, crc));
  try {
    check_index(temporary_, header_, records_);
  } catch (const Error& error) {
    throw Error(PYRT_ESTATE, error.what());
  }
  Footer footer{};
  footer.file_bytes = header_.file_bytes;
  footer.index_crc = base::crc32c(records_.data(), records_.size() * sizeof(Record));
  footer.crc = base::crc32c(&footer, offsetof(Footer, crc));
  footer.commit = kCommitMark;
  write_at(records_.data(), records_.size() * sizeof(Record), end_);
  write_at(&header_, sizeof header_, 0);
  const auto sync = [&] {
    if (fsync(descriptor_) != 0) {
      fail(PYRT_EIO, "%s: %s", temporary_.c_str(), std::strerror(errno));
    }
  };
  sync();  // the commit mark must not reach the disk before what it vouches for
  write_at(&footer, sizeof footer, header_.file_bytes - sizeof footer);
  sync();
  if (rename(temporary_.c_str(), path_.c_str()) != 0) {
    fail(PYRT_EIO, "renaming %s to %s: %s", temporary_.c_str(), path_.c_str(),
         std::strerror(errno));
  }
  ::close(descriptor_);
  descriptor_ = -1;
}

}  // namespace pyruntime::moe
