// Making room: the breadth-first search of CPU inserts. The CUDA kernels search by warps instead
// (cuda/filter/kernels.cuh) and execute paths with the same core.hpp.
#pragma once

#include <cstring>

#include "filter/core.hpp"

namespace pyruntime::filter {

// Buckets a search looks at. More find little more room: the load at the first failure grows by
// less than 0.2 % from 512 to 4096.
inline constexpr int kMaxNodes = 512;
// Searches of one insert whose path another thread spoilt before the key counts as not placeable.
inline constexpr int kMaxAttempts = 64;

// Finds the shortest path from the pair of buckets to a free slot. Returns the number of moves and
// fills `moves` (in order, the pair's bucket first) and the bucket with room; -1 if there is none.
template <class Exec, int W, int B>
int search_path(const View& view, const Position& p, Move* moves, uint32_t* free_bucket) {
  struct Node {
    uint32_t bucket;
    int32_t parent;
    int32_t lane;  // of the parent, whose fingerprint would come here
    uint32_t fingerprint;
  };
  Node nodes[kMaxNodes];
  uint64_t seen[kMaxSegmentSlots / B / 64];
  const size_t seen_bytes = (view.buckets + 63) / 64 * sizeof(uint64_t);
  std::memset(seen, 0, seen_bytes);
  int num = 0;
  const auto add = [&](uint32_t bucket, int parent, int lane, uint32_t fingerprint) {
    seen[bucket / 64] |= uint64_t{1} << bucket % 64;
    nodes[num++] = {bucket, parent, lane, fingerprint};
  };
  const auto path_to = [&](int node) {
    int length = 0;
    for (int i = node; nodes[i].parent >= 0; i = nodes[i].parent) ++length;
    *free_bucket = nodes[node].bucket;
    int at = length;
    for (int i = node; nodes[i].parent >= 0; i = nodes[i].parent) {
      moves[--at] = {nodes[nodes[i].parent].bucket, nodes[i].fingerprint, nodes[i].lane};
    }
    return length;
  };
  const auto has_room = [&](uint32_t bucket) {
    const uint64_t* words = bucket_words<W, B>(view, p.segment, bucket);
    uint64_t free = 0;
    for (int i = 0; i < Shape<W, B>::kWords; ++i) free |= zero_lanes<W, B>(Exec::load(words + i));
    return free != 0;
  };
  add(p.first, -1, 0, 0);
  add(p.second, -1, 0, 0);
  for (int i = 0; i < num; ++i) {
    if (i < 2 && has_room(nodes[i].bucket)) return path_to(i);
    const uint64_t* words = bucket_words<W, B>(view, p.segment, nodes[i].bucket);
    for (int lane = 0; lane < B; ++lane) {
      const uint32_t fingerprint = slot<Exec, W, B>(words, lane);
      if (fingerprint == 0) continue;  // freed meanwhile: the next search sees it
      const uint32_t to = other_bucket(nodes[i].bucket, fingerprint, view.buckets);
      if (seen[to / 64] >> to % 64 & 1) continue;
      if (num == kMaxNodes) return -1;
      add(to, i, lane, fingerprint);
      if (has_room(to)) return path_to(num - 1);
    }
  }
  return -1;
}

// Finds a slot of the pair of buckets whose fingerprint has room in its other bucket: what
// search_path would find first, for the most part, but without a branch by slot.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool near_move(const View& view, const Position& p, Move* move,
                              uint32_t* free_bucket) {
  const uint32_t pair[] = {p.first, p.second};
  for (const uint32_t bucket : pair) {
    const uint64_t* const words = bucket_words<W, B>(view, p.segment, bucket);
    uint32_t room = 0;
    for (int lane = 0; lane < B; ++lane) {
      const uint32_t fingerprint = slot<Exec, W, B>(words, lane);
      const uint64_t* const behind =
          bucket_words<W, B>(view, p.segment, other_bucket(bucket, fingerprint, view.buckets));
      uint64_t free = 0;
      for (int i = 0; i < Shape<W, B>::kWords; ++i) {
        free |= zero_lanes<W, B>(Exec::load(behind + i));
      }
      room |= static_cast<uint32_t>((free != 0) & (fingerprint != 0)) << lane;
    }
    if (room == 0) continue;
    const int lane = first_lane<1>(room);
    const uint32_t fingerprint = slot<Exec, W, B>(words, lane);
    if (fingerprint == 0) continue;  // freed meanwhile
    *move = {bucket, fingerprint, lane};
    *free_bucket = other_bucket(bucket, fingerprint, view.buckets);
    return true;
  }
  return false;
}

// For a key whose two buckets were full.
template <class Exec, int W, int B>
__attribute__((noinline)) Status insert_by_eviction(const View& view, const Position& p) {
  Move moves[kMaxNodes];
  for (int attempt = 0; attempt < kMaxAttempts; ++attempt) {
    uint32_t free_bucket = 0;
    const int length = near_move<Exec, W, B>(view, p, moves, &free_bucket)
                           ? 1
                           : search_path<Exec, W, B>(view, p, moves, &free_bucket);
    if (length < 0) return count<Exec, W, B>(view, p) >= 2 * B ? kDupLimit : kFull;
    if (execute_path<Exec, W, B>(view, p.segment, moves, length, free_bucket, p.fingerprint)) {
      return kOk;
    }
    Exec::count(view, kRetries, 1);
  }
  return kFull;
}

template <class Exec, int W, int B>
PYRT_FILTER_FN Status insert(const View& view, const Position& p) {
  uint64_t* const first = bucket_words<W, B>(view, p.segment, p.first);
  uint64_t* const second = bucket_words<W, B>(view, p.segment, p.second);
  if (insert_directly<Exec, W, B>(view, first, second, p.fingerprint)) return kOk;
  return insert_by_eviction<Exec, W, B>(view, p);
}

}  // namespace pyruntime::filter
