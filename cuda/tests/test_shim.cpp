// The device features kernels may use, checked on what runs them: the shim here, a GPU under nvcc.
#include <numeric>

#include "cuda/include/atomic.cuh"
#include "cuda/tests/support/device.hpp"

#if !defined(__CUDACC__)
#include "cuda/tests/support/planted.hpp"
#endif

using namespace pyruntime;

namespace {

class Device : public dev::KernelTest {};

std::vector<uint32_t> iota(uint32_t n) {
  std::vector<uint32_t> values(n);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

// Runs the body under several orders of the block's threads; a GPU has one, its own.
template <class Body>
void under_schedules(Body body) {
#if defined(__CUDACC__)
  body();
#else
  for (const uint64_t seed : {0, 1, 2, 3}) {
    shim::set_schedule(seed);
    body();
  }
  shim::set_schedule(0);
#endif
}

__global__ void coordinates(uint32_t* out) {
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      blockIdx.z * 100000 + blockIdx.y * 10000 + blockIdx.x * 1000 + threadIdx.z * 100 +
      threadIdx.y * 10 + threadIdx.x;
}

TEST_F(Device, GridsHaveThreeDimensions) {
  dev::Array<uint32_t> out(2 * 3 * 2 * 4 * 3 * 2);
  ASSERT_EQ(PYRT_LAUNCH(coordinates, dim3(2, 3, 2), dim3(4, 3, 2), nullptr, out.data()), 0);
  ASSERT_EQ(dev::synchronize(), 0);
  const auto got = out.host();
  size_t i = 0;
  for (uint32_t bz = 0; bz < 2; ++bz)
    for (uint32_t by = 0; by < 3; ++by)
      for (uint32_t bx = 0; bx < 2; ++bx)
        for (uint32_t tz = 0; tz < 2; ++tz)
          for (uint32_t ty = 0; ty < 3; ++ty)
            for (uint32_t tx = 0; tx < 4; ++tx) {
              ASSERT_EQ(got[i++], bz * 100000 + by * 10000 + bx * 1000 + tz * 100 + ty * 10 + tx);
            }
}

// Tree reduction with __syncthreads, dynamic shared memory, and blocks whose last warp is partial.
__global__ void block_sums(const uint32_t* in, uint32_t* sums) {
  PYRT_DYNAMIC_SHARED(uint32_t, row);
  const uint32_t t = threadIdx.x, n = blockDim.x;
  row[t] = in[blockIdx.x * n + t];
  for (uint32_t width = n; width > 1;) {
    __syncthreads();
    const uint32_t half = (width + 1) / 2;
    if (t + half < width) row[t] += row[t + half];
    width = half;
  }
  if (t == 0) sums[blockIdx.x] = row[0];
}

TEST_F(Device, BarriersOrderSharedMemory) {
  constexpr uint32_t kBlocks = 10, kThreads = 77;
  dev::Array<uint32_t> in(iota(kBlocks * kThreads)), sums(kBlocks);
  under_schedules([&] {
    ASSERT_EQ(PYRT_LAUNCH_SHARED(block_sums, kBlocks, kThreads, kThreads * sizeof(uint32_t),
                                 nullptr, in.data(), sums.data()),
              0);
    ASSERT_EQ(dev::synchronize(), 0);
    const auto got = sums.host();
    for (uint32_t b = 0; b < kBlocks; ++b) {
      EXPECT_EQ(got[b], kThreads * (b * kThreads) + kThreads * (kThreads - 1) / 2);
    }
  });
}

__global__ void barrier_votes(uint32_t* out) {
  const uint32_t t = threadIdx.x;
  if (t >= 40) return;  // threads that left are not waited for
  out[t * 3] = static_cast<uint32_t>(__syncthreads_count(t % 3 == 0));
  out[t * 3 + 1] = __syncthreads_or(t == 39) != 0;
  out[t * 3 + 2] = __syncthreads_and(t != 7) != 0;
}

TEST_F(Device, BarriersCountVotesOfThreadsThatDidNotReturn) {
  dev::Array<uint32_t> out(120);
  under_schedules([&] {
    ASSERT_EQ(PYRT_LAUNCH(barrier_votes, 1, 50, nullptr, out.data()), 0);
    ASSERT_EQ(dev::synchronize(), 0);
    const auto got = out.host();
    for (uint32_t t = 0; t < 40; ++t) {
      ASSERT_EQ(got[t * 3], 14u);
      ASSERT_EQ(got[t * 3 + 1], 1u);
      ASSERT_EQ(got[t * 3 + 2], 0u);
    }
  });
}

constexpr int kWarpResults = 12;

__global__ void warp_operations(uint32_t* out) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t* mine = out + (blockIdx.x * blockDim.x + threadIdx.x) * kWarpResults;
  constexpr uint32_t kAll = 0xffffffff;
  mine[0] = __shfl_sync(kAll, lane * 10, 3);
  mine[1] = __shfl_sync(kAll, lane * 10, 3, 8);
  mine[2] = __shfl_up_sync(kAll, lane, 2);
  mine[3] = __shfl_down_sync(kAll, lane, 5);
  mine[4] = __shfl_xor_sync(kAll, lane, 17);
  mine[5] = __shfl_up_sync(kAll, lane, 1, 4);
  mine[6] = __shfl_down_sync(kAll, lane, 3, 16);
  mine[7] = __ballot_sync(kAll, lane % 5 == 0);
  mine[8] = __match_any_sync(kAll, lane % 7);
  mine[9] = static_cast<uint32_t>(__any_sync(kAll, lane == 31)) |
            static_cast<uint32_t>(__all_sync(kAll, lane < 31)) << 1;
  mine[10] = __reduce_add_sync(kAll, lane);
  // The halves of the warp diverge and meet in operations of their own, a different number each.
  uint32_t sum = 0;
  if (lane < 16) {
    for (int i = 0; i < 3; ++i) sum += __reduce_max_sync(0x0000ffff, lane + i);
  } else {
    sum = __reduce_min_sync(0xffff0000, lane);
  }
  mine[11] = sum;
}

TEST_F(Device, WarpOperations) {
  constexpr uint32_t kThreads = 96, kBlocks = 2;
  dev::Array<uint32_t> out(kBlocks * kThreads * kWarpResults);
  under_schedules([&] {
    ASSERT_EQ(PYRT_LAUNCH(warp_operations, kBlocks, kThreads, nullptr, out.data()), 0);
    ASSERT_EQ(dev::synchronize(), 0);
    const auto got = out.host();
    for (uint32_t t = 0; t < kBlocks * kThreads; ++t) {
      const uint32_t lane = t % 32;
      uint32_t ballot = 0, same = 0;
      for (uint32_t i = 0; i < 32; ++i) {
        ballot |= uint32_t{i % 5 == 0} << i;
        same |= uint32_t{i % 7 == lane % 7} << i;
      }
      const uint32_t expected[kWarpResults] = {
          30,
          ((lane & ~7u) + 3) * 10,
          lane < 2 ? lane : lane - 2,
          lane + 5 > 31 ? lane : lane + 5,
          lane ^ 17,
          lane % 4 == 0 ? lane : lane - 1,
          lane % 16 + 3 > 15 ? lane : lane + 3,
          ballot,
          same,
          1,
          496,
          lane < 16 ? 15u + 16 + 17 : 16u,
      };
      for (int i = 0; i < kWarpResults; ++i) {
        ASSERT_EQ(got[t * kWarpResults + i], expected[i]) << "lane " << lane << ", result " << i;
      }
    }
  });
}

// A hash set by atomicCAS, as the lookup structures have it: the sum of what was inserted first.
__global__ void insert(const uint32_t* keys, uint32_t n, uint32_t* table, uint32_t mask,
                       uint32_t* inserted) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t key = keys[i] + 1;  // 0 is empty
  for (uint32_t slot = key * 2654435761u & mask;; slot = (slot + 1) & mask) {
    const uint32_t before = atomicCAS(&table[slot], 0u, key);
    if (before == 0) atomicAdd(inserted, 1u);
    if (before == 0 || before == key) return;
  }
}

TEST_F(Device, AtomicsAcrossBlocks) {
  constexpr uint32_t kKeys = 3000, kSlots = 4096;
  std::vector<uint32_t> keys = iota(kKeys);
  for (uint32_t& key : keys) key %= 1000;
  dev::Array<uint32_t> in(keys), table(kSlots), inserted(1);
  ASSERT_EQ(PYRT_LAUNCH(insert, (kKeys + 63) / 64, 64, nullptr, in.data(), kKeys, table.data(),
                        kSlots - 1, inserted.data()),
            0);
  ASSERT_EQ(dev::synchronize(), 0);
  EXPECT_EQ(inserted.host()[0], 1000u);
  uint64_t sum = 0;
  for (const uint32_t key : table.host()) sum += key;
  EXPECT_EQ(sum, 1000u * 1001 / 2);
}

__global__ void atomic_operations(int32_t* v, float* f) {
  const int t = static_cast<int>(threadIdx.x);
  atomicMin(&v[0], t - 20);
  atomicMax(&v[1], t);
  atomicOr(&v[2], 1 << (t % 8));
  atomicAnd(&v[3], ~(1 << (t % 8)));
  atomicXor(&v[4], t);
  atomicSub(&v[5], 1);
  atomicAdd(f, 0.5f);
  dev::block_atomic_ref<int32_t>(v[6]).fetch_add(2, dev::relaxed);
}

TEST_F(Device, AtomicOperations) {
  dev::Array<int32_t> v(std::vector<int32_t>{0, 0, 0, 0xfff, 0, 0, 0});
  dev::Array<float> f(1);
  ASSERT_EQ(PYRT_LAUNCH(atomic_operations, 1, 64, nullptr, v.data(), f.data()), 0);
  ASSERT_EQ(dev::synchronize(), 0);
  EXPECT_EQ(v.host(), (std::vector<int32_t>{-20, 63, 0xff, 0xf00, 0, -64, 128}));
  EXPECT_EQ(f.host()[0], 32.0f);
}

__global__ void integer_intrinsics(uint64_t* out) {
  out[0] = static_cast<uint64_t>(__popc(0xf0f0u)) * 100 + __popcll(~0ull);
  out[1] = static_cast<uint64_t>(__clz(1)) * 100 + __clzll(1ll << 40);
  out[2] = static_cast<uint64_t>(__ffs(8)) * 100 + __ffsll(1ll << 50) + (__ffs(0) << 20);
  out[3] = __brev(1u) + __brevll(1ull);
  out[4] = __umulhi(0x80000000u, 6u) + __umul64hi(1ull << 63, 10ull);
  out[5] = __ldg(&out[0]) + static_cast<uint64_t>(dev::min(3, 4) + dev::max(3, 4));
}

TEST_F(Device, IntegerIntrinsics) {
  dev::Array<uint64_t> out(6);
  ASSERT_EQ(PYRT_LAUNCH(integer_intrinsics, 1, 1, nullptr, out.data()), 0);
  ASSERT_EQ(dev::synchronize(), 0);
  EXPECT_EQ(out.host(),
            (std::vector<uint64_t>{864, 3123, 451, 0x80000000u + (1ull << 63), 8, 871}));
}

__global__ void nothing() {}

TEST_F(Device, LaunchesOutsideTheLimitsAreRefused) {
  constexpr int kInvalidConfiguration = 9;
  EXPECT_EQ(PYRT_LAUNCH(nothing, 1, 1025, nullptr), kInvalidConfiguration);
  EXPECT_EQ(PYRT_LAUNCH(nothing, 1, 0, nullptr), kInvalidConfiguration);
  EXPECT_EQ(PYRT_LAUNCH(nothing, 0, 1, nullptr), kInvalidConfiguration);
  EXPECT_EQ(PYRT_LAUNCH(nothing, dim3(1, 65536), 1, nullptr), kInvalidConfiguration);
  EXPECT_EQ(PYRT_LAUNCH(nothing, 1, 1, nullptr), 0);
  EXPECT_EQ(dev::synchronize(), 0);
}

#if !defined(__CUDACC__)

struct Fault {
  const char* name;
  const char* report;
};

void expect_found(const Fault& fault) {
  const planted::Outcome outcome = planted::run("planted_shim", fault.name);
  EXPECT_TRUE(outcome.failed) << fault.name << " passed: " << outcome.output;
  EXPECT_TRUE(outcome.says(fault.report)) << fault.name << " gave " << outcome.output;
}

TEST(Planted, TheShimFindsWhatCannotGoOn) {
  expect_found({"skipped_barrier", "wait at a block barrier"});
  expect_found({"mismatched_masks", "waits in a warp operation with mask 0xffff0001"});
  expect_found({"outside_own_mask", "not in the mask"});
  expect_found({"different_operations", "different warp operations"});
}

TEST(Planted, AddressSanitizerFindsThem) {
  if (!planted::kAddress) GTEST_SKIP() << "not built with AddressSanitizer";
  expect_found({"past_the_end", "use-after-poison"});
  expect_found({"past_dynamic_shared", "heap-buffer-overflow"});
  expect_found({"past_the_stack", "stack-buffer-overflow"});
}

TEST(Planted, ThreadSanitizerFindsThem) {
  if (!planted::kThread) GTEST_SKIP() << "not built with ThreadSanitizer";
  for (const char* name : {"no_barrier", "race_after_barrier", "plain_count",
                           "plain_count_in_block", "no_warp_barrier", "relaxed_publish"}) {
    expect_found({name, "data race"});
  }
}

TEST(Planted, TheirSoundTwinsPass) {
  for (const char* name : {"barrier", "atomic_count", "warp_barrier", "release_publish"}) {
    const planted::Outcome outcome = planted::run("planted_shim", name);
    EXPECT_FALSE(outcome.failed) << name << " gave " << outcome.output;
    EXPECT_EQ(outcome.output, "") << name;
  }
}

#endif

}  // namespace
