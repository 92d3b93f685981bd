#include <cstring>
#include <random>

#include "cuda/tests/support/device.hpp"
#include "pool/cuda.hpp"

using namespace pyruntime;

namespace {

class PoolKernels : public dev::KernelTest {};

struct Shape {
  uint64_t object_bytes, stride, packed_stride;
  uint32_t per_unit;
  uint64_t unit_bytes;
  uint64_t base_offset;  // moves every object off its natural alignment
};

// Scattered objects and packed rows with a copy of each on the host to compare with.
class Copy {
 public:
  Copy(const Shape& shape, uint64_t num_objects, uint64_t n, uint64_t seed) : shape_(shape) {
    std::mt19937_64 random(seed);
    const uint64_t units = (num_objects + shape.per_unit - 1) / shape.per_unit;
    objects_.resize(shape.base_offset + units * shape.unit_bytes);
    packed_.resize(n == 0 ? 0 : (n - 1) * shape.packed_stride + shape.object_bytes);
    for (auto* bytes : {&objects_, &packed_}) {
      for (uint8_t& byte : *bytes) byte = static_cast<uint8_t>(random());
    }
    std::vector<uint32_t> all(num_objects);
    for (uint32_t i = 0; i < num_objects; ++i) all[i] = i;
    std::shuffle(all.begin(), all.end(), random);
    indices_.assign(all.begin(), all.begin() + static_cast<ptrdiff_t>(n));
    args_ = {};
    args_.struct_size = sizeof args_;
    args_.per_unit = shape.per_unit;
    args_.object_bytes = shape.object_bytes;
    args_.stride = shape.stride;
    args_.unit_bytes = shape.unit_bytes;
    args_.num_objects = num_objects;
    args_.n = n;
    args_.packed_stride = shape.packed_stride;
  }

  std::vector<uint32_t>& indices() { return indices_; }

  // Runs the launcher and compares every byte, also those that must not change.
  void check(bool gather) {
    dev::Array<uint8_t> objects(objects_), packed(packed_);
    dev::Array<uint32_t> indices(indices_);
    args_.base = objects.address() + shape_.base_offset;
    args_.packed = packed.address();
    args_.indices = indices.address();
    ASSERT_EQ(
        gather ? pyrt_cuda_pool_gather(&args_, nullptr) : pyrt_cuda_pool_scatter(&args_, nullptr),
        0);
    ASSERT_EQ(dev::synchronize(), 0);
    for (uint64_t row = 0; row < args_.n; ++row) {
      if (indices_[row] >= args_.num_objects) continue;
      uint8_t* object = objects_.data() + shape_.base_offset +
                        indices_[row] / shape_.per_unit * shape_.unit_bytes +
                        indices_[row] % shape_.per_unit * shape_.stride;
      uint8_t* line = packed_.data() + row * shape_.packed_stride;
      if (gather) {
        std::memcpy(line, object, shape_.object_bytes);
      } else {
        std::memcpy(object, line, shape_.object_bytes);
      }
    }
    EXPECT_TRUE(objects.host() == objects_);
    EXPECT_TRUE(packed.host() == packed_);
  }

 private:
  Shape shape_;
  pyrt_pool_device_copy args_;
  std::vector<uint8_t> objects_, packed_;
  std::vector<uint32_t> indices_;
};

const Shape kShapes[] = {
    {64, 64, 64, 16, 1024, 0},              // 16-byte words, several rows per block
    {100, 104, 100, 9, 1000, 0},            // 4-byte words
    {33, 36, 48, 10, 400, 0},               // 4-byte words and a tail
    {13, 13, 13, 7, 100, 0},                // bytes
    {48, 48, 64, 5, 256, 3},                // bytes, because of the base
    {5000, 5056, 5000, 3, 16384, 0},        // 4-byte words, a block per row
    {40000, 40960, 40000, 1, 65536, 0},     // 16-byte words, a row in three pieces
    {16384 + 7, 16400, 16400, 2, 32800, 0}  // a piece of a few bytes
};

TEST_F(PoolKernels, EveryByteIsWhereItBelongs) {
  uint64_t seed = 1;
  for (const Shape& shape : kShapes) {
    const uint64_t n = shape.object_bytes > 1000 ? 5 : 60;
    for (const bool gather : {true, false}) {
      SCOPED_TRACE(shape.object_bytes);
      Copy(shape, 2 * n, n, seed++).check(gather);
    }
  }
}

TEST_F(PoolKernels, NoRowsAndOneRow) {
  for (const bool gather : {true, false}) {
    Copy(kShapes[0], 10, 0, 5).check(gather);
    Copy(kShapes[0], 10, 1, 6).check(gather);
  }
}

TEST_F(PoolKernels, IndicesOutOfRangeAreLeftAlone) {
  for (const bool gather : {true, false}) {
    Copy copy(kShapes[1], 40, 20, 7);
    copy.indices()[3] = 40;
    copy.indices()[7] = 0xffffffff;
    copy.check(gather);
  }
}

}  // namespace
