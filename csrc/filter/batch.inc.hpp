// The bulk kernels, compiled once per SIMD level inside a namespace of that level. The including
// file defines, for two buckets:
//   match<W, B>(first, second, fingerprint)   not 0 if one of them holds it
//   choose<W, B>(first, second)               where one goes: the emptier bucket's first free slot.
//                                             Both are here already; the table's threshold is for
//                                             those that would have to fetch the second one first
//   pull<W, B>(view, segment, first, second, fingerprint)   takes one copy; false if none was seen,
//                                             or it went to another thread
constexpr size_t kBlock = 32;    // keys between a prefetch and the use of what it fetched
constexpr size_t kWaiting = 16;  // keys that wait for what is behind their full buckets

struct Block {
  uint64_t first[kBlock];  // offsets of the buckets in words
  uint64_t second[kBlock];
  uint32_t fingerprint[kBlock];
  uint32_t segment[kBlock];
  uint32_t index[kBlock];  // of the key; Entries only
};

template <int W, int B>
inline __attribute__((always_inline)) void locate_one(const View& view, uint64_t key, Block& block,
                                                      size_t i) {
  const Position p = locate<W>(view, key);
  const uint64_t base = p.segment * view.buckets;
  block.first[i] = (base + p.first) * Shape<W, B>::kWords;
  block.second[i] = (base + p.second) * Shape<W, B>::kWords;
  block.fingerprint[i] = p.fingerprint;
  block.segment[i] = static_cast<uint32_t>(p.segment);
}

#if defined(PYRT_FILTER_LOCATE_AVX2)
// A whole block of keys, four at a time: as `locate`. The compiler does not see that the factors
// have 32 bits and takes three multiplications for each.
template <int W, int B>
inline __attribute__((always_inline)) void locate_block(const View& view, const uint64_t* keys,
                                                        Block& block) {
  const auto all = [](uint64_t x) __attribute__((always_inline)) {
    return _mm256_set1_epi64x(static_cast<long long>(x));
  };
  const auto times = [&](__m256i x, uint64_t c) __attribute__((always_inline)) {  // 64 bits
    const __m256i crossed = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), all(c)),
                                             _mm256_mul_epu32(x, all(c >> 32)));
    return _mm256_add_epi64(_mm256_mul_epu32(x, all(c)), _mm256_slli_epi64(crossed, 32));
  };
  const auto fold = [](__m256i x) __attribute__((always_inline)) {
    return _mm256_xor_si256(x, _mm256_srli_epi64(x, 32));
  };
  const auto put = [](uint64_t* to, __m256i x) __attribute__((always_inline)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
  };
  // The lower halves of four.
  const auto put_low = [](uint32_t* to, __m256i x) __attribute__((always_inline)) {
    const __m256i low = _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(low));
  };
  constexpr int kShift = Shape<W, B>::kWords == 1 ? 0 : Shape<W, B>::kWords == 2 ? 1 : 2;
  const __m256i seed = all(view.seed), segments = all(view.num_segments),
                buckets = all(view.buckets);
  for (size_t i = 0; i < kBlock; i += 4) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    const __m256i h = fold(
        times(fold(times(fold(_mm256_xor_si256(key, seed)), base::kMixFactor)), base::kMixFactor));
    const __m256i segment =
        _mm256_srli_epi64(_mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(h, 32), segments),
                                           _mm256_srli_epi64(_mm256_mul_epu32(h, segments), 32)),
                          32);
    const __m256i low = _mm256_and_si256(h, all(0xffff));
    const __m256i fingerprint = _mm256_add_epi64(
        _mm256_srli_epi64(_mm256_sub_epi64(_mm256_slli_epi64(low, W), low), 16), all(1));
    const __m256i first = _mm256_srli_epi64(
        _mm256_mul_epu32(_mm256_and_si256(_mm256_srli_epi64(h, 16), all(0xffffff)), buckets), 24);
    const __m256i mixed = _mm256_mul_epu32(fingerprint, all(0x9E3779B1));
    const __m256i sum =
        _mm256_or_si256(_mm256_srli_epi64(_mm256_mul_epu32(mixed, buckets), 32), all(1));
    const __m256i second = _mm256_add_epi64(
        _mm256_sub_epi64(sum, first), _mm256_and_si256(_mm256_cmpgt_epi64(first, sum), buckets));
    const __m256i base = _mm256_mul_epu32(segment, buckets);
    put(block.first + i, _mm256_slli_epi64(_mm256_add_epi64(base, first), kShift));
    put(block.second + i, _mm256_slli_epi64(_mm256_add_epi64(base, second), kShift));
    put_low(block.fingerprint + i, fingerprint);
    put_low(block.segment + i, segment);
  }
}
#else
template <int W, int B>
inline __attribute__((always_inline)) void locate_block(const View& view, const uint64_t* keys,
                                                        Block& block) {
  for (size_t i = 0; i < kBlock; ++i) locate_one<W, B>(view, keys[i], block, i);
}
#endif

// The keys of a call, in order.
struct Keys {
  const uint64_t* keys;

  template <int W, int B>
  inline __attribute__((always_inline)) void locate_some(const View& view, size_t begin, size_t n,
                                                         Block& block) {
    if (n == kBlock) {
      locate_block<W, B>(view, keys + begin, block);
    } else {
      for (size_t i = 0; i < n; ++i) locate_one<W, B>(view, keys[begin + i], block, i);
    }
  }
  static inline __attribute__((always_inline)) size_t index(const Block&, size_t begin, size_t i) {
    return begin + i;
  }
};

// Those of a group, in order; asked for block by block from the first.
struct Entries {
  const Sorted& sorted;
  uint64_t first_segment;
  const uint64_t* at;

  Entries(const Sorted& from, uint32_t group)
      : sorted(from), first_segment(uint64_t{group} << from.shift()), at(from.first_block(group)) {}

  template <int W, int B>
  inline __attribute__((always_inline)) void locate_some(const View& view, size_t begin, size_t n,
                                                         Block& block) {
    static_assert(Sorted::kBlockEntries % kBlock == 0);
    if (n == 0) return;
    if (begin % Sorted::kBlockEntries == 0 && begin > 0) at = sorted.block_after(at);
    const uint64_t* const entries = at + begin % Sorted::kBlockEntries;
    const auto one = [&](size_t i) __attribute__((always_inline)) {
      const uint64_t entry = entries[i];
      const auto fingerprint = static_cast<uint32_t>(entry) & 0xffffU;
      const auto first = static_cast<uint32_t>(entry >> 16) & 0x1fffU;
      const uint64_t segment = first_segment + (entry >> 29 & 0x7ffU);
      const uint64_t base = segment * view.buckets;
      block.first[i] = (base + first) * Shape<W, B>::kWords;
      block.second[i] =
          (base + other_bucket(first, fingerprint, view.buckets)) * Shape<W, B>::kWords;
      block.fingerprint[i] = fingerprint;
      block.segment[i] = static_cast<uint32_t>(segment);
      block.index[i] = static_cast<uint32_t>(entry >> 40);
    };
    if (n == kBlock) {
      for (size_t i = 0; i < kBlock; ++i) one(i);
    } else {
      for (size_t i = 0; i < n; ++i) one(i);
    }
  }
  static inline __attribute__((always_inline)) size_t index(const Block& block, size_t, size_t i) {
    return block.index[i];
  }
};

template <int W>
inline __attribute__((always_inline)) void sort_some(const View& view, const uint64_t* keys,
                                                     uint64_t index, size_t n, Sorted& sorted) {
  uint64_t entries[kBlock];
  uint32_t groups[kBlock];
  const uint32_t shift = sorted.shift();
  const uint32_t in_group = (1U << shift) - 1;
  const auto one = [&](size_t i) __attribute__((always_inline)) {
    const uint64_t h = base::mix64(keys[i] ^ view.seed);
    const auto segment = static_cast<uint32_t>(scale_hash(h, view.num_segments));
    groups[i] = segment >> shift;
    entries[i] = fingerprint_of<W>(h) | static_cast<uint64_t>(bucket_of(h, view.buckets)) << 16 |
                 static_cast<uint64_t>(segment & in_group) << 29 | (index + i) << 40;
  };
  if (n == kBlock) {
    for (size_t i = 0; i < kBlock; ++i) one(i);
  } else {
    for (size_t i = 0; i < n; ++i) one(i);
  }
  uint64_t** const ends = sorted.ends();
  for (size_t i = 0; i < n; ++i) {
    uint64_t* const end = ends[groups[i]];
    *end = entries[i];
    ends[groups[i]] = end + 1;
    if (__builtin_expect(Sorted::ends_block(end + 1), 0)) sorted.extend(groups[i]);
  }
}

template <bool Write>
inline __attribute__((always_inline)) void prefetch_pair(const View& view, const Block& block,
                                                         size_t i) {
  __builtin_prefetch(view.words + block.first[i], Write, 3);
  __builtin_prefetch(view.words + block.second[i], Write, 3);
}

template <int W, int B>
inline __attribute__((always_inline)) Position position_in(const View& view, const Block& block,
                                                           size_t i) {
  const uint64_t base = uint64_t{block.segment[i]} * view.buckets;
  return {block.segment[i], static_cast<uint32_t>(block.first[i] / Shape<W, B>::kWords - base),
          static_cast<uint32_t>(block.second[i] / Shape<W, B>::kWords - base),
          block.fingerprint[i]};
}

// body(index of the key, its block, its place in the block). With each goes the prefetch of the
// pair one block later, so that there are always as many lines on their way from memory.
template <int W, int B, bool Write, class Source, class Body>
inline __attribute__((always_inline)) void pipeline(const View& view, Source source, size_t n,
                                                    Body&& body) {
  Block blocks[2];
  size_t here = n < kBlock ? n : kBlock;
  source.template locate_some<W, B>(view, 0, here, blocks[0]);
  for (size_t i = 0; i < here; ++i) prefetch_pair<Write>(view, blocks[0], i);
  int now = 0;
  for (size_t begin = 0; begin < n; begin += kBlock, now ^= 1) {
    const Block& block = blocks[now];
    Block& later = blocks[now ^ 1];
    const size_t next = begin + kBlock;
    if (n >= next + kBlock) {
      source.template locate_some<W, B>(view, next, kBlock, later);
      for (size_t i = 0; i < kBlock; ++i) {
        prefetch_pair<Write>(view, later, i);
        body(Source::index(block, begin, i), block, i);
      }
      continue;
    }
    const size_t more = n > next ? n - next : 0;
    source.template locate_some<W, B>(view, next, more, later);
    for (size_t i = 0; i < more; ++i) prefetch_pair<Write>(view, later, i);
    for (size_t i = 0; i < here; ++i) body(Source::index(block, begin, i), block, i);
    here = more;
  }
}

// Keys whose buckets were full: what is behind these is fetched while others are at work.
template <int W, int B>
struct Waiting {
  Position positions[kWaiting];
  size_t indices[kWaiting];
  size_t num = 0;

  inline __attribute__((always_inline)) void add(const View& view, const Position& p, size_t k) {
    positions[num] = p;
    indices[num++] = k;
    const uint32_t pair[] = {p.first, p.second};
    for (const uint32_t bucket : pair) {
      const uint64_t* const words = bucket_words<W, B>(view, p.segment, bucket);
      for (int lane = 0; lane < B; ++lane) {
        const uint32_t behind = other_bucket(bucket, slot<Shared, W, B>(words, lane), view.buckets);
        __builtin_prefetch(bucket_words<W, B>(view, p.segment, behind), 1, 3);
      }
    }
  }
  uint64_t place(const View& view, uint8_t* status) {
    uint64_t stored = 0;
    for (size_t i = 0; i < num; ++i) {
      const Status result = insert_by_eviction<Shared, W, B>(view, positions[i]);
      status[indices[i]] = result;
      stored += result == kOk;
    }
    num = 0;
    return stored;
  }
};

// Stores a fingerprint without relocating any; false if both buckets are full.
template <int W, int B>
inline __attribute__((always_inline)) bool store(const View& view, uint64_t* first,
                                                 uint64_t* second, uint32_t fingerprint) {
  const Choice choice = choose<W, B>(first, second);
  if (__builtin_expect(choice.shift == kNoSlot, 0)) return false;
  uint64_t old = choice.old;
  // Taken by another thread since, or its word has changed: the long way.
  if (__builtin_expect(
          (old >> choice.shift & Shape<W, B>::kLaneMask) == 0 &&
              Shared::cas(choice.word, old, old | uint64_t{fingerprint} << choice.shift),
          1)) {
    return true;
  }
  return insert_directly<Shared, W, B>(view, first, second, fingerprint);
}

template <int W, int B, class Source>
inline __attribute__((always_inline)) uint64_t insert_all(const View& view, Source source, size_t n,
                                                          uint8_t* status, bool unique) {
  uint64_t stored = 0;
  Waiting<W, B> waiting;
  pipeline<W, B, true>(
      view, source, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        if (unique) {
          // One after the other: a key must find the one before it.
          const Position p = position_in<W, B>(view, block, i);
          status[k] = contains<Shared, W, B>(view, p) ? kExists : insert<Shared, W, B>(view, p);
          stored += status[k] == kOk;
          return;
        }
        if (store<W, B>(view, view.words + block.first[i], view.words + block.second[i],
                        block.fingerprint[i])) {
          status[k] = kOk;
          ++stored;
          return;
        }
        waiting.add(view, position_in<W, B>(view, block, i), k);
        if (waiting.num == kWaiting) stored += waiting.place(view, status);
      });
  return stored + waiting.place(view, status);
}

template <int W, int B, class Source>
inline __attribute__((always_inline)) uint64_t remove_all(const View& view, Source source, size_t n,
                                                          uint8_t* status) {
  uint64_t removed = 0;
  pipeline<W, B, true>(
      view, source, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        const bool found = pull<W, B>(view, block.segment[i], view.words + block.first[i],
                                      view.words + block.second[i], block.fingerprint[i]) ||
                           remove<Shared, W, B>(view, position_in<W, B>(view, block, i));
        status[k] = !found;
        removed += found;
      });
  return removed;
}

template <int W, int B, class Source>
inline __attribute__((always_inline)) uint64_t contains_all(const View& view, Source source,
                                                            size_t n, uint8_t* out) {
  uint64_t present = 0;
  pipeline<W, B, false>(
      view, source, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        const uint32_t* const epoch = view.epochs + block.segment[i];
        const uint32_t before = Shared::epoch(epoch);
        bool found = match<W, B>(view.words + block.first[i], view.words + block.second[i],
                                 block.fingerprint[i]) != 0;
        Shared::settle();
        // One test for the rare case, so that misses among hits cost no mispredicted branch.
        const bool moved = Shared::epoch(epoch) != before;
        if (__builtin_expect(moved & !found, 0)) {
          found = contains<Shared, W, B>(view, position_in<W, B>(view, block, i));
        }
        out[k] = found;
        present += found;
      });
  return present;
}

template <int W, int B, class Source>
inline __attribute__((always_inline)) void count_all(const View& view, Source source, size_t n,
                                                     uint32_t* out) {
  pipeline<W, B, false>(
      view, source, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        out[k] += static_cast<uint32_t>(
            copies_in<Shared, W, B>(view.words + block.first[i], block.fingerprint[i]) +
            copies_in<Shared, W, B>(view.words + block.second[i], block.fingerprint[i]));
      });
}

template <int W, int B>
uint64_t insert_batch(const View& view, const uint64_t* keys, size_t n, uint8_t* status,
                      bool unique) {
  return insert_all<W, B>(view, Keys{keys}, n, status, unique);
}

template <int W, int B>
uint64_t remove_batch(const View& view, const uint64_t* keys, size_t n, uint8_t* status) {
  return remove_all<W, B>(view, Keys{keys}, n, status);
}

template <int W, int B>
uint64_t contains_batch(const View& view, const uint64_t* keys, size_t n, uint8_t* out) {
  return contains_all<W, B>(view, Keys{keys}, n, out);
}

template <int W, int B>
void count_batch(const View& view, const uint64_t* keys, size_t n, uint32_t* out) {
  count_all<W, B>(view, Keys{keys}, n, out);
}

template <int W, int B>
void sort_batch(const View& view, const uint64_t* keys, size_t n, Sorted& sorted) {
  for (size_t at = 0; at < n; at += kBlock) {
    sort_some<W>(view, keys + at, at, n - at < kBlock ? n - at : kBlock, sorted);
  }
}

template <int W, int B>
uint64_t insert_group(const View& view, const Sorted& sorted, uint32_t group, uint8_t* status,
                      bool unique) {
  return insert_all<W, B>(view, Entries(sorted, group), sorted.count(group), status, unique);
}

template <int W, int B>
uint64_t contains_group(const View& view, const Sorted& sorted, uint32_t group, uint8_t* out) {
  return contains_all<W, B>(view, Entries(sorted, group), sorted.count(group), out);
}

template <int W, int B>
void count_group(const View& view, const Sorted& sorted, uint32_t group, uint32_t* out) {
  count_all<W, B>(view, Entries(sorted, group), sorted.count(group), out);
}

template <int W, int B>
constexpr Kernels make_kernels() {
  return {insert_batch<W, B>, remove_batch<W, B>, contains_batch<W, B>, count_batch<W, B>,
          sort_batch<W, B>,   insert_group<W, B>, contains_group<W, B>, count_group<W, B>};
}

constexpr LevelKernels make_level() {
  return {make_kernels<16, 8>(), make_kernels<16, 16>(), make_kernels<8, 8>(),
          make_kernels<8, 16>()};
}
