#include <cstring>
#include <random>

#include "cuda/tests/support/device.hpp"
#include "kv/cuda.hpp"

using namespace pyruntime;

namespace {

class KvKernels : public dev::KernelTest {};

// Two buffers with their layouts, and the same copy made on the host.
class Copy {
 public:
  Copy(uint32_t layers, uint32_t parts, uint64_t block_bytes, uint64_t seed)
      : random_(seed), block_bytes_(block_bytes) {
    args_ = {};
    args_.struct_size = sizeof args_;
    args_.num_layers = layers;
    args_.num_parts = parts;
    args_.block_bytes = block_bytes;
  }

  // [layers, parts, blocks, block bytes], as an engine keeps its cache.
  void paged(bool from, uint64_t blocks) {
    pyrt_kv_layout& layout = from ? args_.from : args_.to;
    layout.block_stride = block_bytes_;
    layout.part_stride = blocks * layout.block_stride;
    layout.layer_stride = args_.num_parts * layout.part_stride;
    layout.num_blocks = blocks;
    fill(from, args_.num_layers * layout.layer_stride);
  }

  // [blocks, layers, parts, block bytes], as a staging buffer or a lower tier has them; `gap` bytes
  // between blocks.
  void packed(bool from, uint64_t blocks, uint64_t gap) {
    pyrt_kv_layout& layout = from ? args_.from : args_.to;
    layout.part_stride = block_bytes_;
    layout.layer_stride = args_.num_parts * layout.part_stride;
    layout.block_stride = args_.num_layers * layout.layer_stride + gap;
    layout.num_blocks = blocks;
    fill(from, blocks * layout.block_stride);
  }

  void run(uint32_t from, uint32_t to, uint32_t count) {
    runs_.push_back({static_cast<uint32_t>(args_.num_blocks), from, to, count});
    args_.num_blocks += count;
  }

  void check() {
    dev::Array<uint8_t> from(from_), to(to_);
    dev::Array<pyrt_kv_run> runs(runs_);
    args_.from.base = from.address();
    args_.to.base = to.address();
    args_.runs = runs.address();
    args_.num_runs = runs_.size();
    ASSERT_EQ(pyrt_cuda_kv_copy(&args_, nullptr), 0);
    ASSERT_EQ(dev::synchronize(), 0);
    for (const pyrt_kv_run& run : runs_) {
      for (uint64_t i = 0; i < run.count; ++i) {
        if (run.from + i >= args_.from.num_blocks || run.to + i >= args_.to.num_blocks) continue;
        for (uint32_t layer = 0; layer < args_.num_layers; ++layer) {
          for (uint32_t part = 0; part < args_.num_parts; ++part) {
            std::memcpy(to_.data() + offset(args_.to, run.to + i, layer, part),
                        from_.data() + offset(args_.from, run.from + i, layer, part), block_bytes_);
          }
        }
      }
    }
    EXPECT_TRUE(to.host() == to_);
    EXPECT_TRUE(from.host() == from_);
  }

 private:
  static uint64_t offset(const pyrt_kv_layout& l, uint64_t block, uint64_t layer, uint64_t part) {
    return block * l.block_stride + layer * l.layer_stride + part * l.part_stride;
  }

  void fill(bool from, uint64_t bytes) {
    std::vector<uint8_t>& buffer = from ? from_ : to_;
    buffer.resize(bytes);
    for (uint8_t& byte : buffer) byte = static_cast<uint8_t>(random_());
  }

  std::mt19937_64 random_;
  uint64_t block_bytes_;
  pyrt_kv_device_copy args_;
  std::vector<uint8_t> from_, to_;
  std::vector<pyrt_kv_run> runs_;
};

TEST_F(KvKernels, GatherAndScatterRuns) {
  uint64_t seed = 1;
  for (const uint64_t block_bytes : {16, 100, 13, 2048}) {
    for (const bool gather : {true, false}) {
      SCOPED_TRACE(block_bytes);
      Copy copy(3, 2, block_bytes, seed++);
      copy.paged(gather, 40);
      copy.packed(!gather, 12, block_bytes % 16 == 0 ? 32 : 7);
      const uint32_t places[][3] = {{5, 0, 4}, {30, 4, 1}, {0, 6, 3}, {39, 11, 1}};
      for (const auto& [paged, packed, count] : places) {
        gather ? copy.run(paged, packed, count) : copy.run(packed, paged, count);
      }
      copy.check();
    }
  }
}

TEST_F(KvKernels, ManySingleBlocks) {
  Copy copy(2, 2, 64, 9);
  copy.paged(true, 64);
  copy.packed(false, 64, 0);
  for (uint32_t i = 0; i < 64; ++i) copy.run(i * 37 % 64, i, 1);
  copy.check();
}

TEST_F(KvKernels, OnePartAndBetweenCaches) {
  Copy copy(4, 1, 96, 10);
  copy.paged(true, 10);
  copy.paged(false, 20);
  copy.run(2, 11, 5);
  copy.check();
}

TEST_F(KvKernels, BlocksOutsideAreLeftAlone) {
  Copy copy(2, 2, 32, 11);
  copy.paged(true, 8);
  copy.packed(false, 8, 0);
  copy.run(6, 0, 4);           // its last two sources are outside
  copy.run(0, 7, 3);           // its last two targets are
  copy.run(0xffffffff, 4, 1);  // far away
  copy.run(3, 0xfffffff0, 32);
  copy.check();
}

TEST_F(KvKernels, Nothing) {
  Copy copy(2, 2, 32, 12);
  copy.paged(true, 8);
  copy.packed(false, 8, 0);
  copy.check();
}

}  // namespace
