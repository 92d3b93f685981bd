// Faults the shim or a sanitizer must find, and their sound twins, which must pass under the same
// sanitizer: `planted_shim NAME`.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/include/atomic.cuh"
#include "cuda/tests/support/device.hpp"

using namespace pyruntime;

namespace {

__global__ void write_past_the_end(int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) out[i] = i;  // should be <
}

__global__ void write_past_dynamic_shared(int* out) {
  PYRT_DYNAMIC_SHARED(int, row);
  row[threadIdx.x + 1] = 1;  // the last thread's is outside
  __syncthreads();
  if (threadIdx.x == 0) *out = row[1];
}

// Out of line: UBSan, which ends the process first, must not see the array's size.
[[gnu::noinline]] __device__ int read_at(const int* row, int i) { return row[i]; }

__global__ void use_the_stack(int* out) {
  int local[8];
  for (int i = 0; i < 8; ++i) local[i] = i;
  __syncthreads();
  out[threadIdx.x] = read_at(local, 8);
}

__global__ void reverse(int* values, bool with_barrier) {
  __shared__ int row[64];
  row[threadIdx.x] = values[threadIdx.x];
  if (with_barrier) __syncthreads();
  values[threadIdx.x] = row[63 - threadIdx.x];
}

// A race one barrier away from sound: thread t reads what its neighbour writes after the barrier.
__global__ void read_after_barrier(int* out) {
  __shared__ int row[65];
  row[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x + 1];
  row[threadIdx.x] = 2;
  __syncthreads();
}

__global__ void count(int* total, bool atomically) {
  if (atomically) {
    atomicAdd(total, 1);
  } else {
    *total = *total + 1;
  }
}

__global__ void exchange_in_warp(int* out, bool with_barrier) {
  __shared__ int row[32];
  row[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) {
    __syncwarp();
  } else {
    __ballot_sync(0xffffffff, 1);  // waits for every lane, and orders nothing
  }
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}

__global__ void publish(int* data, unsigned* flag, int* out, bool with_release) {
  dev::atomic_ref<unsigned> ready(*flag);
  if (blockIdx.x == 0) {
    *data = 7;
    ready.store(1, with_release ? dev::release : dev::relaxed);
  } else {
    while (ready.load(dev::acquire) == 0) dev::pause();
    *out = *data;
  }
}

__global__ void skip_a_barrier(int* out) {
  if (threadIdx.x != 5) {
    __syncthreads();
  } else {
    __ballot_sync(0xffffffff, 1);
  }
  *out = 1;
}

__global__ void mismatched_masks() {
  if (threadIdx.x < 16) {
    __syncwarp(0xffffffff);
  } else {
    __syncwarp(0xffff0000);
    __syncwarp(0xffff0000 | 1);
  }
}

__global__ void outside_own_mask() { __syncwarp(1); }

__global__ void different_operations() {
  if (threadIdx.x < 16) {
    __ballot_sync(0xffffffff, 1);
  } else {
    __shfl_sync(0xffffffff, 1, 0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "";
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  dev::Array<int> values(64), one(1);
  dev::Array<unsigned> flag(1);
  int* v = values.data();
  int* o = one.data();
  if (is("past_the_end")) return PYRT_LAUNCH(write_past_the_end, 2, 64, nullptr, v, 64);
  if (is("past_dynamic_shared")) {
    return PYRT_LAUNCH_SHARED(write_past_dynamic_shared, 1, 32, 32 * sizeof(int), nullptr, o);
  }
  if (is("past_the_stack")) return PYRT_LAUNCH(use_the_stack, 1, 64, nullptr, v);
  if (is("no_barrier")) return PYRT_LAUNCH(reverse, 1, 64, nullptr, v, false);
  if (is("barrier")) return PYRT_LAUNCH(reverse, 1, 64, nullptr, v, true);
  if (is("race_after_barrier")) return PYRT_LAUNCH(read_after_barrier, 1, 64, nullptr, v);
  if (is("plain_count")) return PYRT_LAUNCH(count, 3, 1, nullptr, o, false);
  if (is("plain_count_in_block")) return PYRT_LAUNCH(count, 1, 3, nullptr, o, false);
  if (is("atomic_count")) return PYRT_LAUNCH(count, 9, 40, nullptr, o, true);
  if (is("no_warp_barrier")) return PYRT_LAUNCH(exchange_in_warp, 1, 32, nullptr, v, false);
  if (is("warp_barrier")) return PYRT_LAUNCH(exchange_in_warp, 1, 32, nullptr, v, true);
  if (is("relaxed_publish")) return PYRT_LAUNCH(publish, 2, 1, nullptr, v, flag.data(), o, false);
  if (is("release_publish")) return PYRT_LAUNCH(publish, 2, 1, nullptr, v, flag.data(), o, true);
  if (is("skipped_barrier")) return PYRT_LAUNCH(skip_a_barrier, 1, 32, nullptr, o);
  if (is("mismatched_masks")) return PYRT_LAUNCH(mismatched_masks, 1, 32, nullptr);
  if (is("outside_own_mask")) return PYRT_LAUNCH(outside_own_mask, 1, 2, nullptr);
  if (is("different_operations")) return PYRT_LAUNCH(different_operations, 1, 32, nullptr);
  std::fprintf(stderr, "unknown fault '%s'\n", name);
  return 0;
}
