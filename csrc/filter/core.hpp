// What an insert, a lookup and a delete do to the words of a table, for every execution
// space: CPU threads, the CUDA shim and a GPU. After Fan et al., "Cuckoo Filter: Practically Better
// Than Bloom" (CoNEXT 2014); breadth-first eviction after Dortmann et al. (arXiv 2603.15486).
//
// Exec gives the memory operations:
//   load(word*)             acquire
//   cas(word*, old&, new)   acquire-release; on failure `old` is what is there
//   epoch(epochs*)          acquire
//   bump(epochs*)           add one, acquire-release
//   settle()                orders earlier loads before later ones
//   count(view, which, n), at_least(view, which, n)   statistics
//   at(Step)                nothing; tests stop here and run something else in between
//   kConcurrent             false where a call has the table to itself: no epochs, no retries
//
// A slot changes as 0 -> f, f -> 0 or f -> g, one compare-and-swap of its word each, so any mixture
// of calls may run at once. The rules behind "no present key is ever missed":
//   - A relocation puts the copy into the other bucket first, then bumps the segment's epoch, then
//     takes the source slot away. A delete bumps before it takes, unless it has seen one copy only.
//   - A lookup reads the epoch, both buckets, and before it says "absent" the epoch again; if that
//     moved it starts over. All copies of a key can only have changed sides between its two reads
//     if one was taken away in between, after a bump.
//   - Why one copy alone may be taken without, beside a lookup of a key that is present: with the
//     one it deletes there are two copies all the time, so the delete sees both unless one changed
//     sides under it, after a bump. Deletes that began after the lookup therefore leave a bump that
//     it sees. Those that began before it take a copy each at most, fewer than were there when it
//     read the first bucket, so that what it looks for is in the second unless it moved, after a
//     bump. This needs that a key is deleted only once its insert has returned. The other copy may
//     be in an older generation, too: the lookup comes there later.
//
// Eviction searches without writing. A path found is executed from its empty end: every key on it
// has both copies for a moment and none is ever outside the table, so an insert that fails has
// displaced nothing, and one that finds no path has written nothing. When the source slot has
// changed under the mover (compare-and-swap fails), the copy it made is one too many, whichever of
// the two slots the other thread took: one copy is removed from the pair of buckets, and the search
// starts again. In a table with older generations there may be none left in the pair, because a key
// that collides and has its copy in an older generation was deleted, and took the one too many;
// then that older copy is.
#pragma once

#include "filter/layout.hpp"

namespace pyruntime::filter {

// Per-key results; the values of PYRT_FILTER_* in pyruntime/filter.h.
enum Status : uint8_t { kOk = 0, kExists = 1, kFull = 2, kDupLimit = 3, kNotTried = 255 };

// Places where a test may interleave another operation.
enum class Step { copied, bumped, replaced, undoing, between_buckets };

// Puts a fingerprint into a free slot of a bucket; false if there is none.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool place(uint64_t* bucket, uint32_t fingerprint) {
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    uint64_t word = Exec::load(bucket + i);
    for (uint64_t free = zero_lanes<W, B>(word); free != 0; free = zero_lanes<W, B>(word)) {
      const int shift = first_lane<W>(free) * W;
      if (Exec::cas(bucket + i, word, word | static_cast<uint64_t>(fingerprint) << shift)) {
        return true;
      }
    }
  }
  return false;
}

// Takes one copy of a fingerprint out of a bucket; false if there is none.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool take(const View& view, uint64_t segment, uint64_t* bucket,
                         uint32_t fingerprint) {
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    uint64_t word = Exec::load(bucket + i);
    for (uint64_t equal = equal_lanes<W, B>(word, fingerprint); equal != 0;
         equal = equal_lanes<W, B>(word, fingerprint)) {
      if constexpr (Exec::kConcurrent) Exec::bump(view.epochs + segment);
      const int shift = first_lane<W>(equal) * W;
      if (Exec::cas(bucket + i, word, word & ~(Shape<W, B>::kLaneMask << shift))) return true;
    }
  }
  return false;
}

// Replaces a fingerprint in a known slot; false if something else is there by now.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool replace(uint64_t* bucket, int lane, uint32_t from, uint32_t to) {
  uint64_t* const target = bucket + lane / Shape<W, B>::kLanes;
  const int shift = lane % Shape<W, B>::kLanes * W;
  uint64_t word = Exec::load(target);
  while ((word >> shift & Shape<W, B>::kLaneMask) == from) {
    const uint64_t changed = word ^ (static_cast<uint64_t>(from ^ to) << shift);
    if (Exec::cas(target, word, changed)) return true;
  }
  return false;
}

template <class Exec, int W, int B>
PYRT_FILTER_FN int free_slots(const uint64_t* bucket) {
  int count = 0;
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    count += count_bits(zero_lanes<W, B>(Exec::load(bucket + i)));
  }
  return count;
}

template <class Exec, int W, int B>
PYRT_FILTER_FN int copies_in(const uint64_t* bucket, uint32_t fingerprint) {
  int count = 0;
  for (int i = 0; i < Shape<W, B>::kWords; ++i) {
    count += count_bits(equal_lanes<W, B>(Exec::load(bucket + i), fingerprint));
  }
  return count;
}

// The fingerprint in a slot.
template <class Exec, int W, int B>
PYRT_FILTER_FN uint32_t slot(const uint64_t* bucket, int lane) {
  const uint64_t word = Exec::load(bucket + lane / Shape<W, B>::kLanes);
  return static_cast<uint32_t>(word >> lane % Shape<W, B>::kLanes * W & Shape<W, B>::kLaneMask);
}

template <class Exec, int W, int B>
PYRT_FILTER_FN bool contains(const View& view, const Position& p) {
  const uint64_t* const first = bucket_words<W, B>(view, p.segment, p.first);
  const uint64_t* const second = bucket_words<W, B>(view, p.segment, p.second);
  for (;;) {
    uint32_t before = 0;
    if constexpr (Exec::kConcurrent) before = Exec::epoch(view.epochs + p.segment);
    if (copies_in<Exec, W, B>(first, p.fingerprint) != 0) return true;
    Exec::at(Step::between_buckets);
    if (copies_in<Exec, W, B>(second, p.fingerprint) != 0) return true;
    if constexpr (!Exec::kConcurrent) return false;
    Exec::settle();
    if (Exec::epoch(view.epochs + p.segment) == before) return false;
  }
}

// Copies stored: at least those of this key, and of keys that collide with it.
template <class Exec, int W, int B>
PYRT_FILTER_FN int count(const View& view, const Position& p) {
  return copies_in<Exec, W, B>(bucket_words<W, B>(view, p.segment, p.first), p.fingerprint) +
         copies_in<Exec, W, B>(bucket_words<W, B>(view, p.segment, p.second), p.fingerprint);
}

// Removes one copy from the pair of buckets; false if there is none.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool remove_from(const View& view, uint64_t segment, uint32_t bucket, uint32_t other,
                                uint32_t fingerprint) {
  for (;;) {
    uint32_t before = 0;
    if constexpr (Exec::kConcurrent) before = Exec::epoch(view.epochs + segment);
    if (take<Exec, W, B>(view, segment, bucket_words<W, B>(view, segment, bucket), fingerprint) ||
        take<Exec, W, B>(view, segment, bucket_words<W, B>(view, segment, other), fingerprint)) {
      return true;
    }
    if constexpr (!Exec::kConcurrent) return false;
    Exec::settle();
    if (Exec::epoch(view.epochs + segment) == before) return false;
  }
}

template <class Exec, int W, int B>
PYRT_FILTER_FN bool remove(const View& view, const Position& p) {
  return remove_from<Exec, W, B>(view, p.segment, p.first, p.second, p.fingerprint);
}

// Removes the copy too many that a spoilt move left: from the pair of buckets or, if it went to a
// delete that should have found its own in an older generation, from there. Where a fingerprint is
// in older generations follows from where it is in this one.
template <class Exec, int W, int B>
PYRT_FILTER_FN void undo_copy(const View& view, uint64_t segment, uint32_t bucket, uint32_t other,
                              uint32_t fingerprint) {
  bool gone = remove_from<Exec, W, B>(view, segment, bucket, other, fingerprint);
  for (const View* older = view.older; !gone && older != nullptr; older = older->older) {
    segment /= 2;
    gone = remove_from<Exec, W, B>(*older, segment, bucket, other, fingerprint);
  }
}

// One relocation on a path: the fingerprint in `lane` of `bucket` goes to the next move's bucket,
// or, on the last move, to the bucket with room.
struct Move {
  uint32_t bucket;
  uint32_t fingerprint;
  int32_t lane;
};

// Executes a path from its empty end and stores `fingerprint` in moves[0]'s slot. On false the
// multiset of the table is as before.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool execute_path(const View& view, uint64_t segment, const Move* moves, int num,
                                 uint32_t free_bucket, uint32_t fingerprint) {
  if (num == 0)
    return place<Exec, W, B>(bucket_words<W, B>(view, segment, free_bucket), fingerprint);
  if (!place<Exec, W, B>(bucket_words<W, B>(view, segment, free_bucket),
                         moves[num - 1].fingerprint)) {
    return false;
  }
  uint32_t copied_to = free_bucket;
  for (int i = num - 1; i >= 0; --i) {
    const Move& move = moves[i];
    Exec::at(Step::copied);
    if constexpr (Exec::kConcurrent) Exec::bump(view.epochs + segment);
    Exec::at(Step::bumped);
    const uint32_t incoming = i == 0 ? fingerprint : moves[i - 1].fingerprint;
    if (!replace<Exec, W, B>(bucket_words<W, B>(view, segment, move.bucket), move.lane,
                             move.fingerprint, incoming)) {
      Exec::at(Step::undoing);
      undo_copy<Exec, W, B>(view, segment, copied_to, move.bucket, move.fingerprint);
      return false;
    }
    Exec::at(Step::replaced);
    copied_to = move.bucket;
  }
  Exec::count(view, kMoves, static_cast<uint64_t>(num));
  Exec::at_least(view, kMaxPath, static_cast<uint64_t>(num));
  return true;
}

// Stores a fingerprint where there is room without relocating anything: the first bucket while it
// has `threshold` free slots, else the emptier one.
template <class Exec, int W, int B>
PYRT_FILTER_FN bool insert_directly(const View& view, uint64_t* first, uint64_t* second,
                                    uint32_t fingerprint) {
  for (;;) {
    const int free_first = free_slots<Exec, W, B>(first);
    uint64_t* target = first;
    if (free_first < static_cast<int>(view.threshold)) {
      const int free_second = free_slots<Exec, W, B>(second);
      if (free_first + free_second == 0) return false;
      if (free_second > free_first) target = second;
    }
    if (place<Exec, W, B>(target, fingerprint)) return true;
  }
}

}  // namespace pyruntime::filter
