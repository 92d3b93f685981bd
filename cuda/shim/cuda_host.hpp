// The host shim: runs CUDA kernels on CPU threads, so that sanitizers and a debugger see them.
//
// Contract. What device code may use is listed in device.cuh; this is how it behaves here.
//   Blocks    run on up to kWorkers OS threads: worker w takes blocks w, w + kWorkers, ... in turn,
//             whatever the machine has, so races between blocks are there to be seen everywhere.
//   Threads   of a block are fibers (ucontext) of its worker. They switch only where they wait: at
//             a barrier, a warp operation or dev::pause(). set_schedule(seed) shuffles the order in
//             which they go on; 0 is the order of their indices. A correct kernel gives the same
//             result under every seed.
//   Barriers  count the threads that have not returned, as sm_70 and later do. A block that can
//             never go on (a barrier some threads skip, warp masks that do not match) aborts the
//             process with a message that names the block and what its threads wait for.
//   Warps     are 32 consecutive threads. A warp operation waits for the lanes of its mask and no
//             others, so divergent halves may be in different operations. Lanes outside their own
//             mask, or lanes of one mask in different operations, abort. A shuffle from a lane that
//             does not take part gives kPoison, a value no correct kernel uses.
//   Shared    memory is `static thread_local`: one copy per worker, and it holds the previous
//             block's bytes when a block starts, as on a GPU.
//   Launch    is synchronous, and checks the limits of a grid as the driver does.
//
// ThreadSanitizer. Every fiber is announced, switching between fibers orders nothing, and the shim
// itself is compiled without instrumentation. What orders accesses: launch and end of a kernel,
// __syncthreads, __syncwarp (the lanes of its mask), atomics of the kernel, and blocks that ran one
// after the other on the same worker (they share its stacks and shared memory). So a race between
// blocks i and j is seen unless i - j is a multiple of kWorkers.
// AddressSanitizer. Stack switches are announced; every stack has a guard page.
//
// Not shown here: timing, weak memory of the hardware (ThreadSanitizer does reason about relaxed
// orders), errors of scope (block against device), forward progress of divergent warps, limits of
// registers and of shared memory, alignment of vector accesses beyond what UBSan checks.
#pragma once

#if defined(__CUDACC__)
#error "the shim is for host compilers"
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline constinit thread_local uint3 threadIdx{0, 0, 0};
inline constinit thread_local uint3 blockIdx{0, 0, 0};
inline constinit thread_local dim3 blockDim{};
inline constinit thread_local dim3 gridDim{};
inline constexpr int warpSize = 32;

namespace pyruntime::shim {

inline constexpr unsigned kWorkers = 4;
inline constexpr unsigned kMaxBlockThreads = 1024;
inline constexpr uint64_t kPoison = 0xdeadbeefdeadbeef;
inline constexpr int kInvalidConfiguration = 9;  // cudaErrorInvalidConfiguration

void set_schedule(uint64_t seed) noexcept;

// Runs body(context) once per thread of the grid; 0, or kInvalidConfiguration.
int launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);

void* dynamic_shared() noexcept;
void yield();

// Waits for the block's threads; gives how many of them passed a value that is not 0.
unsigned block_barrier(int value);

enum class WarpOp : uint32_t { sync, shuffle, vote, match, reduce };
// The values of the lanes in `lanes`; kPoison for the others.
struct WarpValues {
  uint64_t value[32];
  uint32_t lanes;
};
// Waits for the lanes of `mask`. The result is the lane's own until its next warp operation.
const WarpValues& warp_exchange(uint32_t mask, WarpOp op, uint64_t value);
unsigned lane() noexcept;

template <class... Params, class... Args>
int launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void*,
                  Args&&... args) {
  struct Call {
    void (*kernel)(Params...);
    std::tuple<std::decay_t<Params>...> params;
  } call{kernel, {std::forward<Args>(args)...}};
  return launch(
      grid, block, shared_bytes,
      [](void* context) {
        auto& c = *static_cast<Call*>(context);
        std::apply(c.kernel, c.params);
      },
      &call);
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned source) {
  return from_bits<T>(warp_exchange(mask, WarpOp::shuffle, to_bits(value)).value[source & 31]);
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, Combine combine) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  const WarpValues& all = warp_exchange(mask, WarpOp::reduce, to_bits(value));
  bool first = true;
  T result{};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(all.lanes >> i & 1)) continue;
    const T other = from_bits<T>(all.value[i]);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}

template <class T>
using Same = std::type_identity_t<T>;  // the value converts to the type of the object

template <class T, class Change>
T read_modify_write(T* address, Change change) {
  std::atomic_ref<T> target(*address);
  T old = target.load(std::memory_order_relaxed);
  while (!target.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace pyruntime::shim

inline void __syncthreads() { pyruntime::shim::block_barrier(0); }
inline int __syncthreads_count(int value) {
  return static_cast<int>(pyruntime::shim::block_barrier(value));
}
inline int __syncthreads_or(int value) { return pyruntime::shim::block_barrier(value) != 0; }
inline int __syncthreads_and(int value) { return pyruntime::shim::block_barrier(!value) == 0; }

inline void __syncwarp(uint32_t mask = 0xffffffff) {
  pyruntime::shim::warp_exchange(mask, pyruntime::shim::WarpOp::sync, 0);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = warpSize) {
  const unsigned lane = pyruntime::shim::lane(), segment = lane & ~(width - 1u);
  return pyruntime::shim::shuffle(mask, value, segment | (source & (width - 1u)));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = pyruntime::shim::lane(), within = lane & (width - 1u);
  return pyruntime::shim::shuffle(mask, value, within >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = pyruntime::shim::lane(), within = lane & (width - 1u);
  const bool inside = delta < static_cast<unsigned>(width) - within;
  return pyruntime::shim::shuffle(mask, value, inside ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = warpSize) {
  // Lanes of later segments are out of reach, those of earlier ones are not.
  const unsigned lane = pyruntime::shim::lane(), source = lane ^ static_cast<unsigned>(lane_mask);
  const bool inside = source < (lane & ~(width - 1u)) + width;
  return pyruntime::shim::shuffle(mask, value, inside ? source : lane);
}

inline unsigned __ballot_sync(uint32_t mask, int predicate) {
  const auto& all = pyruntime::shim::warp_exchange(mask, pyruntime::shim::WarpOp::vote,
                                                   static_cast<uint64_t>(predicate != 0));
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (all.lanes >> i & 1) votes |= static_cast<unsigned>(all.value[i]) << i;
  }
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T>
unsigned __match_any_sync(uint32_t mask, T value) {
  const uint64_t mine = pyruntime::shim::to_bits(value);
  const auto& all = pyruntime::shim::warp_exchange(mask, pyruntime::shim::WarpOp::match, mine);
  unsigned equal = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if ((all.lanes >> i & 1) && all.value[i] == mine) equal |= 1u << i;
  }
  return equal;
}
template <class T>
T __reduce_add_sync(uint32_t mask, T value) {
  return pyruntime::shim::reduce(mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_min_sync(uint32_t mask, T value) {
  return pyruntime::shim::reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(uint32_t mask, T value) {
  return pyruntime::shim::reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_and_sync(uint32_t mask, unsigned value) {
  return pyruntime::shim::reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(uint32_t mask, unsigned value) {
  return pyruntime::shim::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(uint32_t mask, unsigned value) {
  return pyruntime::shim::reduce(mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}

// Relaxed, at device scope, as in CUDA.
template <class T>
T atomicAdd(T* address, pyruntime::shim::Same<T> value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T atomicSub(T* address, pyruntime::shim::Same<T> value) {
  return std::atomic_ref<T>(*address).fetch_sub(value, std::memory_order_relaxed);
}
template <class T>
T atomicAnd(T* address, pyruntime::shim::Same<T> value) {
  return std::atomic_ref<T>(*address).fetch_and(value, std::memory_order_relaxed);
}
template <class T>
T atomicOr(T* address, pyruntime::shim::Same<T> value) {
  return std::atomic_ref<T>(*address).fetch_or(value, std::memory_order_relaxed);
}
template <class T>
T atomicXor(T* address, pyruntime::shim::Same<T> value) {
  return std::atomic_ref<T>(*address).fetch_xor(value, std::memory_order_relaxed);
}
template <class T>
T atomicExch(T* address, pyruntime::shim::Same<T> value) {
  return std::atomic_ref<T>(*address).exchange(value, std::memory_order_relaxed);
}
template <class T>
T atomicCAS(T* address, pyruntime::shim::Same<T> expected, pyruntime::shim::Same<T> value) {
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value, std::memory_order_relaxed);
  return expected;
}
template <class T>
T atomicMin(T* address, pyruntime::shim::Same<T> value) {
  return pyruntime::shim::read_modify_write(address, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* address, pyruntime::shim::Same<T> value) {
  return pyruntime::shim::read_modify_write(address, [&](T old) { return std::max(old, value); });
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long reversed = 0;
  for (int i = 0; i < 64; ++i) reversed |= (x >> i & 1) << (63 - i);
  return reversed;
}
inline unsigned __brev(unsigned x) { return static_cast<unsigned>(__brevll(x) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
[[noreturn]] inline void __trap() { std::abort(); }
