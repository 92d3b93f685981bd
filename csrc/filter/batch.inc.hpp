// The bulk kernels, compiled once per SIMD level inside a namespace of that level. The including
// file defines `hit<W, B>(first, second, fingerprint)`: whether either bucket has the fingerprint.
constexpr size_t kBlock = 32;

struct Block {
  uint64_t first[kBlock];  // offsets of the buckets in words
  uint64_t second[kBlock];
  uint32_t fingerprint[kBlock];
  uint32_t segment[kBlock];
};

template <int W, int B, bool Write>
inline __attribute__((always_inline)) void locate_block(const View& view, const uint64_t* keys,
                                                        size_t n, Block& block) {
  const auto one = [&](size_t i) __attribute__((always_inline)) {
    const Position p = locate<W>(view, keys[i]);
    const uint64_t base = p.segment * view.buckets;
    block.first[i] = (base + p.first) * Shape<W, B>::kWords;
    block.second[i] = (base + p.second) * Shape<W, B>::kWords;
    block.fingerprint[i] = p.fingerprint;
    block.segment[i] = static_cast<uint32_t>(p.segment);
  };
  if (n == kBlock) {
    for (size_t i = 0; i < kBlock; ++i) one(i);
  } else {
    for (size_t i = 0; i < n; ++i) one(i);
  }
  for (size_t i = 0; i < n; ++i) {
    __builtin_prefetch(view.words + block.first[i], Write, 3);
    __builtin_prefetch(view.words + block.second[i], Write, 3);
  }
}

// body(index of the key, its block, its place in the block)
template <int W, int B, bool Write, class Body>
inline __attribute__((always_inline)) void pipeline(const View& view, const uint64_t* keys,
                                                    size_t n, Body&& body) {
  Block blocks[2];
  if (n == 0) return;
  locate_block<W, B, Write>(view, keys, n < kBlock ? n : kBlock, blocks[0]);
  int now = 0;
  for (size_t begin = 0; begin < n; begin += kBlock, now ^= 1) {
    const size_t next = begin + kBlock;
    if (next < n) {
      locate_block<W, B, Write>(view, keys + next, n - next < kBlock ? n - next : kBlock,
                                blocks[now ^ 1]);
    }
    const size_t here = n - begin < kBlock ? n - begin : kBlock;
    for (size_t i = 0; i < here; ++i) body(begin + i, blocks[now], i);
  }
}

template <int W, int B>
uint64_t insert_batch(const View& view, const uint64_t* keys, size_t n, uint8_t* status,
                      bool unique) {
  uint64_t stored = 0;
  pipeline<W, B, true>(
      view, keys, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        uint64_t* const first = view.words + block.first[i];
        uint64_t* const second = view.words + block.second[i];
        Status result = kOk;
        if (unique && contains<Shared, W, B>(view, locate<W>(view, keys[k]))) {
          result = kExists;
        } else if (!insert_directly<Shared, W, B>(view, first, second, block.fingerprint[i])) {
          result = insert_by_eviction<Shared, W, B>(view, locate<W>(view, keys[k]));
        }
        status[k] = result;
        stored += result == kOk;
      });
  return stored;
}

template <int W, int B>
uint64_t remove_batch(const View& view, const uint64_t* keys, size_t n, uint8_t* status) {
  uint64_t removed = 0;
  pipeline<W, B, true>(
      view, keys, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        const uint32_t segment = block.segment[i];
        const bool found =
            take<Shared, W, B>(view, segment, view.words + block.first[i], block.fingerprint[i]) ||
            take<Shared, W, B>(view, segment, view.words + block.second[i], block.fingerprint[i]) ||
            remove<Shared, W, B>(view, locate<W>(view, keys[k]));
        status[k] = !found;
        removed += found;
      });
  return removed;
}

template <int W, int B>
uint64_t contains_batch(const View& view, const uint64_t* keys, size_t n, uint8_t* out) {
  uint64_t present = 0;
  pipeline<W, B, false>(
      view, keys, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        const uint32_t* const epoch = view.epochs + block.segment[i];
        const uint32_t before = Shared::epoch(epoch);
        bool found = hit<W, B>(view.words + block.first[i], view.words + block.second[i],
                               block.fingerprint[i]);
        Shared::settle();
        // One test for the rare case, so that misses among hits cost no mispredicted branch.
        const bool moved = Shared::epoch(epoch) != before;
        if (__builtin_expect(moved & !found, 0)) {
          found = contains<Shared, W, B>(view, locate<W>(view, keys[k]));
        }
        out[k] = found;
        present += found;
      });
  return present;
}

template <int W, int B>
void count_batch(const View& view, const uint64_t* keys, size_t n, uint32_t* out) {
  pipeline<W, B, false>(
      view, keys, n, [&](size_t k, const Block& block, size_t i) __attribute__((always_inline)) {
        out[k] += static_cast<uint32_t>(
            copies_in<Shared, W, B>(view.words + block.first[i], block.fingerprint[i]) +
            copies_in<Shared, W, B>(view.words + block.second[i], block.fingerprint[i]));
      });
}

template <int W, int B>
constexpr Kernels make_kernels() {
  return {insert_batch<W, B>, remove_batch<W, B>, contains_batch<W, B>, count_batch<W, B>};
}

constexpr LevelKernels make_level() {
  return {make_kernels<16, 8>(), make_kernels<16, 16>(), make_kernels<8, 8>(),
          make_kernels<8, 16>()};
}
