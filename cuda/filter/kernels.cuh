// The cuckoo filter on a device, over the same core as on the CPU: same words, same answers.
//
// Inserting takes two passes. The first places each key where there is room without moving any and
// lists those (1 to 4 of 100 at 95 % load) that found none. The second gives each of them a warp:
// its lanes look behind every slot of the two buckets at once, then behind those of each bucket
// found there, and one lane executes the path. So no thread waits for another's long search.
//
// Calls on one filter are ordered by their stream; several kernels at once are as safe as threads
// on the CPU are (core.hpp).
#pragma once

#include "cuda/filter/device_functions.cuh"
#include "cuda/include/device.cuh"

namespace pyruntime::filter {

inline constexpr unsigned kThreads = 256;
inline constexpr uint64_t kMaxBlocks = 4096;  // grids stride, so this fills any GPU
inline constexpr int kDeviceAttempts = 64;
inline constexpr uint32_t kWholeWarp = 0xffffffffU;

__device__ inline uint64_t first_item() { return uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline uint64_t item_stride() { return uint64_t{gridDim.x} * blockDim.x; }

template <int W, int B>
__global__ void __launch_bounds__(kThreads)
    place_kernel(View view, const uint64_t* keys, uint64_t n, uint8_t* status, uint64_t* left) {
  for (uint64_t i = first_item(); i < n; i += item_stride()) {
    const Position p = locate<W>(view, keys[i]);
    if (insert_directly<OnDevice, W, B>(view, bucket_words<W, B>(view, p.segment, p.first),
                                        bucket_words<W, B>(view, p.segment, p.second),
                                        p.fingerprint)) {
      status[i] = kOk;
    } else {
      status[i] = kNotTried;
      left[1 + dev::atomic_ref<uint64_t>(left[0]).fetch_add(1, dev::relaxed)] = i;
    }
  }
}

template <int W, int B>
__device__ inline bool has_room(const View& view, uint64_t segment, uint32_t bucket) {
  return free_slots<OnDevice, W, B>(bucket_words<W, B>(view, segment, bucket)) > 0;
}

// What a lane knows of the slot it looks behind.
struct Victim {
  uint32_t bucket;
  uint32_t fingerprint;
  uint32_t other;
  int32_t lane;
};

template <int W, int B>
__device__ inline Victim victim_of(const View& view, uint64_t segment, uint32_t bucket, int lane) {
  const uint64_t* words = bucket_words<W, B>(view, segment, bucket);
  const uint32_t fingerprint = slot<OnDevice, W, B>(words, lane);
  return {bucket, fingerprint, other_bucket(bucket, fingerprint, view.buckets), lane};
}

// Tries to make room by one move or two, the whole warp together. 1: the key is in; 0: the table
// changed meanwhile, try again; -1: there is no room that near.
template <int W, int B>
__device__ inline int insert_by_warp(const View& view, const Position& p) {
  const unsigned lane = threadIdx.x % 32;
  const bool active = lane < 2 * B;
  const Victim own = victim_of<W, B>(view, p.segment, lane / B % 2 == 0 ? p.first : p.second,
                                     static_cast<int>(lane % B));
  // Freed meanwhile: then there is room without a move.
  const bool emptied = active && own.fingerprint == 0;
  if (__any_sync(kWholeWarp, emptied)) {
    int done = 0;
    if (lane == 0) {
      done = insert_directly<OnDevice, W, B>(view, bucket_words<W, B>(view, p.segment, p.first),
                                             bucket_words<W, B>(view, p.segment, p.second),
                                             p.fingerprint);
    }
    return __shfl_sync(kWholeWarp, done, 0);
  }
  const bool near_room = active && has_room<W, B>(view, p.segment, own.other);
  if (const uint32_t found = __ballot_sync(kWholeWarp, near_room); found != 0) {
    const int chosen = __ffs(static_cast<int>(found)) - 1;
    int done = 0;
    if (static_cast<int>(lane) == chosen) {
      const Move move{own.bucket, own.fingerprint, own.lane};
      done = execute_path<OnDevice, W, B>(view, p.segment, &move, 1, own.other, p.fingerprint);
    }
    return __shfl_sync(kWholeWarp, done, chosen);
  }
  for (int first = 0; first < 2 * B; ++first) {
    const uint32_t between = __shfl_sync(kWholeWarp, own.other, first);
    const Victim next = victim_of<W, B>(view, p.segment, between, static_cast<int>(lane % B));
    // A path must not come back to the pair of buckets it starts from.
    const bool room = lane < B && next.fingerprint != 0 && next.other != p.first &&
                      next.other != p.second && has_room<W, B>(view, p.segment, next.other);
    const uint32_t found = __ballot_sync(kWholeWarp, room);
    if (found == 0) continue;
    const int chosen = __ffs(static_cast<int>(found)) - 1;
    const Move start{__shfl_sync(kWholeWarp, own.bucket, first),
                     __shfl_sync(kWholeWarp, own.fingerprint, first),
                     __shfl_sync(kWholeWarp, own.lane, first)};
    int done = 0;
    if (static_cast<int>(lane) == chosen) {
      const Move moves[2] = {start, {next.bucket, next.fingerprint, next.lane}};
      done = execute_path<OnDevice, W, B>(view, p.segment, moves, 2, next.other, p.fingerprint);
    }
    return __shfl_sync(kWholeWarp, done, chosen);
  }
  return -1;
}

template <int W, int B>
__global__ void __launch_bounds__(kThreads)
    evict_kernel(View view, const uint64_t* keys, uint8_t* status, const uint64_t* left) {
  const uint64_t warps = item_stride() / 32;
  const uint64_t num = left[0];
  for (uint64_t i = first_item() / 32; i < num; i += warps) {
    const uint64_t k = left[1 + i];
    const Position p = locate<W>(view, keys[k]);
    int done = 0;
    int attempt = 0;
    for (; done == 0 && attempt < kDeviceAttempts; ++attempt) {
      done = insert_by_warp<W, B>(view, p);
    }
    if (threadIdx.x % 32 != 0) continue;
    if (attempt > 1) OnDevice::count(view, kRetries, static_cast<uint64_t>(attempt - 1));
    if (done == 1) {
      status[k] = kOk;
      continue;
    }
    const int copies =
        copies_in<OnDevice, W, B>(bucket_words<W, B>(view, p.segment, p.first), p.fingerprint) +
        copies_in<OnDevice, W, B>(bucket_words<W, B>(view, p.segment, p.second), p.fingerprint);
    status[k] = copies >= 2 * B ? kDupLimit : kFull;
  }
}

template <int W, int B>
__global__ void __launch_bounds__(kThreads)
    contains_kernel(View view, const uint64_t* keys, uint64_t n, uint8_t* out) {
  for (uint64_t i = first_item(); i < n; i += item_stride()) {
    out[i] = contains<OnDevice, W, B>(view, locate<W>(view, keys[i]));
  }
}

template <int W, int B>
__global__ void __launch_bounds__(kThreads)
    remove_kernel(View view, const uint64_t* keys, uint64_t n, uint8_t* status) {
  for (uint64_t i = first_item(); i < n; i += item_stride()) {
    status[i] = !remove<OnDevice, W, B>(view, locate<W>(view, keys[i]));
  }
}

}  // namespace pyruntime::filter
