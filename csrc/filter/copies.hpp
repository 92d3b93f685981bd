// All that is in a table, for what moves it to another.
#pragma once

#include "filter/core.hpp"
#include "filter/exec.hpp"

namespace pyruntime::filter {

// body(where it is) for every copy of a table, always in the same order, until that returns false.
template <int W, int B, class Body>
bool for_each_copy(const View& view, const Body& body) {
  for (uint64_t segment = 0; segment < view.num_segments; ++segment) {
    for (uint32_t bucket = 0; bucket < view.buckets; ++bucket) {
      const uint64_t* const words = bucket_words<W, B>(view, segment, bucket);
      for (int lane = 0; lane < B; ++lane) {
        const uint32_t fingerprint = slot<Shared, W, B>(words, lane);
        if (fingerprint == 0) continue;
        const uint32_t other = other_bucket(bucket, fingerprint, view.buckets);
        if (!body(Position{segment, bucket, other, fingerprint})) return false;
      }
    }
  }
  return true;
}

}  // namespace pyruntime::filter
