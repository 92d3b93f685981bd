#include <algorithm>
#include <random>

#include "cuda/filter/device_functions.cuh"
#include "cuda/tests/support/device.hpp"
#include "filter/cuda.hpp"
#include "filter/filter.hpp"

using namespace pyruntime;
using filter::View;

namespace {

// A user's kernel over device_functions.cuh.
enum Call { kContains, kInsert, kDelete };
template <int W, int B>
__global__ void call_kernel(View view, int which, const uint64_t* keys, uint64_t n, uint8_t* out) {
  const uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  if (which == kContains) out[i] = filter::contains_u64<W, B>(view, keys[i]);
  if (which == kInsert) out[i] = filter::insert_u64<W, B>(view, keys[i]);
  if (which == kDelete) out[i] = filter::delete_u64<W, B>(view, keys[i]);
}

class FilterKernels : public dev::KernelTest {};

std::vector<uint64_t> keys_of(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint64_t> keys(n);
  for (uint64_t& key : keys) key = random();
  return keys;
}

// A table of two segments on the device, and the same one read on the CPU.
class Table {
 public:
  Table(int bits, int slots, uint32_t buckets)
      : bits_(bits),
        slots_(slots),
        buckets_(buckets),
        words_(std::vector<uint64_t>(size_t{2} * buckets * bits * slots / 64)),
        epochs_(std::vector<uint32_t>(2)),
        counters_(std::vector<uint64_t>(filter::kNumCounters)) {}

  size_t num_slots() const { return size_t{2} * buckets_ * slots_; }
  View view() {
    return {reinterpret_cast<uint64_t*>(words_.address()),
            reinterpret_cast<uint32_t*>(epochs_.address()),
            reinterpret_cast<uint64_t*>(counters_.address()),
            2,
            5,
            buckets_,
            slots_ == 16 ? 4U : 3U};
  }
  std::vector<uint8_t> insert(const std::vector<uint64_t>& keys) {
    dev::Array<uint64_t> in(keys), left(std::vector<uint64_t>(keys.size() + 1, ~uint64_t{0}));
    dev::Array<uint8_t> status(std::vector<uint8_t>(keys.size(), 99));
    const View v = view();
    EXPECT_EQ(pyrt_cuda_filter_insert(&v, bits_, slots_, at<const uint64_t>(in), keys.size(),
                                      at<uint8_t>(status), at<uint64_t>(left), nullptr),
              0);
    EXPECT_EQ(dev::synchronize(), 0);
    return status.host();
  }
  std::vector<uint8_t> contains(const std::vector<uint64_t>& keys) {
    dev::Array<uint64_t> in(keys);
    dev::Array<uint8_t> out(std::vector<uint8_t>(keys.size(), 99));
    const View v = view();
    EXPECT_EQ(pyrt_cuda_filter_contains(&v, bits_, slots_, at<const uint64_t>(in), keys.size(),
                                        at<uint8_t>(out), nullptr),
              0);
    EXPECT_EQ(dev::synchronize(), 0);
    return out.host();
  }
  std::vector<uint8_t> remove(const std::vector<uint64_t>& keys) {
    dev::Array<uint64_t> in(keys);
    dev::Array<uint8_t> status(std::vector<uint8_t>(keys.size(), 99));
    const View v = view();
    EXPECT_EQ(pyrt_cuda_filter_remove(&v, bits_, slots_, at<const uint64_t>(in), keys.size(),
                                      at<uint8_t>(status), nullptr),
              0);
    EXPECT_EQ(dev::synchronize(), 0);
    return status.host();
  }
  std::vector<uint8_t> call(Call which, const std::vector<uint64_t>& keys) {
    dev::Array<uint64_t> in(keys);
    dev::Array<uint8_t> out(std::vector<uint8_t>(keys.size(), 99));
    const auto launch = [&](auto kernel) {
      return PYRT_LAUNCH(kernel, dim3(static_cast<unsigned>(keys.size() + 127) / 128), dim3(128),
                         nullptr, view(), int{which}, at<const uint64_t>(in), uint64_t{keys.size()},
                         at<uint8_t>(out));
    };
    const int error = bits_ == 16
                          ? (slots_ == 8 ? launch(call_kernel<16, 8>) : launch(call_kernel<16, 16>))
                          : (slots_ == 8 ? launch(call_kernel<8, 8>) : launch(call_kernel<8, 16>));
    EXPECT_EQ(error, 0);
    EXPECT_EQ(dev::synchronize(), 0);
    return out.host();
  }
  size_t occupied() {
    size_t count = 0;
    for (const uint64_t word : words_.host()) {
      const uint64_t empty =
          bits_ == 16 ? filter::zero_lanes<16, 8>(word) : filter::zero_lanes<8, 8>(word);
      count += static_cast<size_t>(64 / bits_ - filter::count_bits(empty));
    }
    return count;
  }
  // What the CPU's kernels find in these words.
  std::vector<uint8_t> on_cpu(const std::vector<uint64_t>& keys) {
    std::vector<uint64_t> words = words_.host();
    std::vector<uint32_t> epochs(2);
    std::vector<uint64_t> counters(filter::kNumCounters);
    View v = view();
    v.words = words.data();
    v.epochs = epochs.data();
    v.counters = counters.data();
    std::vector<uint8_t> out(keys.size());
    for (size_t i = 0; i < keys.size(); ++i) out[i] = one_on_cpu(v, keys[i]);
    return out;
  }

 private:
  struct Plain {
    static constexpr bool kConcurrent = false;
    PYRT_HOST_DEVICE static uint64_t load(const uint64_t* word) { return *word; }
    PYRT_HOST_DEVICE static void at(filter::Step) {}
    PYRT_HOST_DEVICE static void settle() {}
    PYRT_HOST_DEVICE static uint32_t epoch(const uint32_t* epoch) { return *epoch; }
  };
  bool one_on_cpu(const View& v, uint64_t key) const {
    using namespace filter;
    if (bits_ == 16) {
      return slots_ == 8 ? filter::contains<Plain, 16, 8>(v, locate<16>(v, key))
                         : filter::contains<Plain, 16, 16>(v, locate<16>(v, key));
    }
    return slots_ == 8 ? filter::contains<Plain, 8, 8>(v, locate<8>(v, key))
                       : filter::contains<Plain, 8, 16>(v, locate<8>(v, key));
  }
  template <class T, class A>
  static T* at(const A& array) {
    return reinterpret_cast<T*>(array.address());
  }

  int bits_, slots_;
  uint32_t buckets_;
  dev::Array<uint64_t> words_;
  dev::Array<uint32_t> epochs_;
  dev::Array<uint64_t> counters_;
};

TEST_F(FilterKernels, FillsLikeTheCpuFindsEverythingAndTakesItOut) {
  for (const int bits : {8, 16}) {
    for (const int slots : {8, 16}) {
      SCOPED_TRACE(bits * 100 + slots);
      Table table(bits, slots, 512 / static_cast<uint32_t>(slots));
      const auto keys = keys_of(table.num_slots() * 92 / 100, 1);
      const auto status = table.insert(keys);
      EXPECT_EQ(status, std::vector<uint8_t>(keys.size(), filter::kOk));
      EXPECT_EQ(table.occupied(), keys.size());
      EXPECT_EQ(table.contains(keys), std::vector<uint8_t>(keys.size(), 1));
      EXPECT_EQ(table.on_cpu(keys), std::vector<uint8_t>(keys.size(), 1));
      const auto absent = keys_of(3000, 2);
      const auto answers = table.contains(absent);
      EXPECT_EQ(answers, table.on_cpu(absent));
      EXPECT_LT(std::count(answers.begin(), answers.end(), 1), bits == 16 ? 12 : 500);
      const std::vector<uint64_t> half(keys.begin(), keys.begin() + keys.size() / 2);
      EXPECT_EQ(table.remove(half), std::vector<uint8_t>(half.size(), 0));
      EXPECT_EQ(table.occupied(), keys.size() - half.size());
      const std::vector<uint64_t> rest(keys.begin() + keys.size() / 2, keys.end());
      EXPECT_EQ(table.contains(rest), std::vector<uint8_t>(rest.size(), 1));
    }
  }
}

TEST_F(FilterKernels, FunctionsInAKernelOfTheUserAgreeWithTheCpu) {
  for (const int bits : {8, 16}) {
    for (const int slots : {8, 16}) {
      SCOPED_TRACE(bits * 100 + slots);
      Table table(bits, slots, 512 / static_cast<uint32_t>(slots));
      const auto keys = keys_of(table.num_slots() * 9 / 10, 4);
      const auto stored = table.call(kInsert, keys);
      std::vector<uint64_t> in;
      for (size_t i = 0; i < keys.size(); ++i) {
        ASSERT_LE(stored[i], 1);
        if (stored[i] == 1) in.push_back(keys[i]);
      }
      EXPECT_GT(in.size(), keys.size() * 9 / 10);
      EXPECT_EQ(table.occupied(), in.size());
      EXPECT_EQ(table.on_cpu(in), std::vector<uint8_t>(in.size(), 1));
      const auto asked = keys_of(3000, 5);
      EXPECT_EQ(table.call(kContains, asked), table.on_cpu(asked));
      EXPECT_EQ(table.call(kContains, in), std::vector<uint8_t>(in.size(), 1));
      EXPECT_EQ(table.call(kDelete, in), std::vector<uint8_t>(in.size(), 1));
      EXPECT_EQ(table.occupied(), 0u);
      EXPECT_EQ(table.call(kDelete, in), std::vector<uint8_t>(in.size(), 0));
    }
  }
}

TEST_F(FilterKernels, WhatFindsNoRoomLeavesNoTrace) {
  Table table(16, 8, 32);
  const auto keys = keys_of(table.num_slots() * 13 / 10, 3);
  const auto status = table.insert(keys);
  size_t in = 0;
  std::vector<uint64_t> stored;
  for (size_t i = 0; i < keys.size(); ++i) {
    ASSERT_TRUE(status[i] == filter::kOk || status[i] == filter::kFull) << int{status[i]};
    if (status[i] == filter::kOk) stored.push_back(keys[i]);
    in += status[i] == filter::kOk;
  }
  EXPECT_EQ(table.occupied(), in);
  EXPECT_GT(in, table.num_slots() * 95 / 100);
  EXPECT_EQ(table.contains(stored), std::vector<uint8_t>(stored.size(), 1));
}

TEST_F(FilterKernels, ManyCopiesReachTheLimit) {
  Table table(16, 8, 64);
  const auto status = table.insert(std::vector<uint64_t>(20, 7));
  EXPECT_EQ(std::count(status.begin(), status.end(), filter::kOk), 16);
  EXPECT_EQ(std::count(status.begin(), status.end(), filter::kDupLimit), 4);
  EXPECT_EQ(table.insert({}).size(), 0u);
}

}  // namespace
