#include "kv/copy.hpp"

#include <cstring>

#include "base/status.hpp"
#include "simd/level.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyruntime::kv {
namespace {

void stream_scalar(char* to, const char* from, size_t bytes) noexcept {
  std::memcpy(to, from, bytes);
}

}  // namespace
}  // namespace pyruntime::kv

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace pyruntime::kv {
namespace {

void stream_avx2(char* to, const char* from, size_t bytes) noexcept {
  const size_t head = -reinterpret_cast<uintptr_t>(to) % 32;
  if (bytes < 512) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  size_t at = head;
  for (; at + 128 <= bytes; at += 128) {
    const auto* source = reinterpret_cast<const __m256i*>(from + at);
    auto* target = reinterpret_cast<__m256i*>(to + at);
    // Never faults; past the end it fetches what a neighbouring piece will want.
    _mm_prefetch(from + at + 1024, _MM_HINT_NTA);
    _mm_prefetch(from + at + 1088, _MM_HINT_NTA);
    const __m256i a = _mm256_loadu_si256(source);
    const __m256i b = _mm256_loadu_si256(source + 1);
    const __m256i c = _mm256_loadu_si256(source + 2);
    const __m256i d = _mm256_loadu_si256(source + 3);
    _mm256_stream_si256(target, a);
    _mm256_stream_si256(target + 1, b);
    _mm256_stream_si256(target + 2, c);
    _mm256_stream_si256(target + 3, d);
  }
  std::memcpy(to + at, from + at, bytes - at);
}

}  // namespace
}  // namespace pyruntime::kv
#pragma GCC pop_options
#endif

namespace pyruntime::kv {

const CopyKernels& copy_kernels_scalar() noexcept {
  static constexpr CopyKernels kernels = {"memcpy", &stream_scalar};
  return kernels;
}

const CopyKernels& copy_kernels() noexcept {
#if defined(__x86_64__)
  static constexpr CopyKernels avx2 = {"avx2", &stream_avx2};
  static const CopyKernels& chosen =
      simd::level() >= simd::Level::avx2 ? avx2 : copy_kernels_scalar();
  return chosen;
#else
  return copy_kernels_scalar();
#endif
}

void stream_fence() noexcept {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void Space::check() const {
  if (bases.empty() || bases.size() > size_t{1} << 16u) {
    fail(PYRT_EINVAL, "num_pieces is %zu; it must be in 1..2^16", bases.size());
  }
  if (piece_bytes < 1 || piece_bytes > uint64_t{1} << 30u) {
    fail(PYRT_EINVAL, "piece_bytes is %llu; it must be in 1..2^30",
         static_cast<unsigned long long>(piece_bytes));
  }
  if (num_blocks < 1 || num_blocks == kNone) {
    fail(PYRT_EINVAL, "num_blocks is %u; it must be in 1..2^32 - 2", num_blocks);
  }
  if (num_blocks > 1 && block_stride < piece_bytes) {
    fail(PYRT_EINVAL, "block_stride is %llu; it must be at least piece_bytes, %llu",
         static_cast<unsigned long long>(block_stride),
         static_cast<unsigned long long>(piece_bytes));
  }
  using Wide = unsigned __int128;
  for (const char* base : bases) {
    if (base == nullptr) fail(PYRT_EINVAL, "bases must not hold NULL");
    const Wide end =
        Wide{reinterpret_cast<uintptr_t>(base)} + Wide{num_blocks - 1} * block_stride + piece_bytes;
    if (end > UINTPTR_MAX) fail(PYRT_EINVAL, "num_blocks is %u; no memory holds them", num_blocks);
  }
}

void add_run(std::vector<SwapRun>& runs, BlockId from, BlockId to) {
  if (!runs.empty()) {
    SwapRun& last = runs.back();
    if (last.from + last.count == from && last.to + last.count == to) {
      ++last.count;
      return;
    }
  }
  runs.push_back({from, to, 1});
}

CopyShape::CopyShape(const Space& from, const Space& to) : pieces_(from.bases.size()) {
  if (from.bases.size() != to.bases.size() || from.piece_bytes != to.piece_bytes) {
    fail(PYRT_EINVAL, "blocks of %zu pieces of %llu bytes cannot become %zu pieces of %llu bytes",
         from.bases.size(), static_cast<unsigned long long>(from.piece_bytes), to.bases.size(),
         static_cast<unsigned long long>(to.piece_bytes));
  }
  const auto packed = [](const Space& space) {
    for (size_t p = 1; p < space.bases.size(); ++p) {
      if (space.bases[p] != space.bases[p - 1] + space.piece_bytes) return false;
    }
    return true;
  };
  joined_pieces_ = packed(from) && packed(to);
  const uint64_t unit = joined_pieces_ ? from.block_bytes() : from.piece_bytes;
  joined_blocks_ = from.block_stride == unit && to.block_stride == unit;
}

}  // namespace pyruntime::kv
