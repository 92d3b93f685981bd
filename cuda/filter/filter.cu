#include "cuda/filter/kernels.cuh"
#include "filter/cuda.hpp"

namespace pyruntime::filter {
namespace {

__global__ void reset_kernel(uint64_t* left) {
  if (threadIdx.x == 0) left[0] = 0;
}

dim3 grid_for(uint64_t items) {
  return dim3(static_cast<unsigned>(dev::min((items + kThreads - 1) / kThreads, kMaxBlocks)));
}

template <int W, int B>
int launch_insert(const View& view, const uint64_t* keys, uint64_t n, uint8_t* status,
                  uint64_t* left, void* stream) {
  if (const int error = PYRT_LAUNCH(reset_kernel, dim3(1), dim3(32), stream, left)) return error;
  if (const int error = PYRT_LAUNCH((place_kernel<W, B>), grid_for(n), dim3(kThreads), stream, view,
                                    keys, n, status, left)) {
    return error;
  }
  // As many warps as there may be leftovers, up to what fills a device.
  return PYRT_LAUNCH((evict_kernel<W, B>), grid_for(dev::min(n, kMaxBlocks * 8) * 32),
                     dim3(kThreads), stream, view, keys, status,
                     static_cast<const uint64_t*>(left));
}

template <int W, int B>
int launch_contains(const View& view, const uint64_t* keys, uint64_t n, uint8_t* out,
                    void* stream) {
  return PYRT_LAUNCH((contains_kernel<W, B>), grid_for(n), dim3(kThreads), stream, view, keys, n,
                     out);
}

template <int W, int B>
int launch_remove(const View& view, const uint64_t* keys, uint64_t n, uint8_t* status,
                  void* stream) {
  return PYRT_LAUNCH((remove_kernel<W, B>), grid_for(n), dim3(kThreads), stream, view, keys, n,
                     status);
}

}  // namespace
}  // namespace pyruntime::filter

using namespace pyruntime;

#define PYRT_FILTER_SHAPES(call, ...)                                                        \
  (bits == 16                                                                                \
       ? (slots == 8 ? filter::call<16, 8>(__VA_ARGS__) : filter::call<16, 16>(__VA_ARGS__)) \
       : (slots == 8 ? filter::call<8, 8>(__VA_ARGS__) : filter::call<8, 16>(__VA_ARGS__)))

PYRT_CUDA_EXPORT int pyrt_cuda_filter_insert(const filter::View* view, int bits, int slots,
                                             const uint64_t* keys, uint64_t n, uint8_t* status,
                                             uint64_t* left, void* stream) noexcept {
  if (n == 0) return 0;
  return PYRT_FILTER_SHAPES(launch_insert, *view, keys, n, status, left, stream);
}

PYRT_CUDA_EXPORT int pyrt_cuda_filter_contains(const filter::View* view, int bits, int slots,
                                               const uint64_t* keys, uint64_t n, uint8_t* out,
                                               void* stream) noexcept {
  if (n == 0) return 0;
  return PYRT_FILTER_SHAPES(launch_contains, *view, keys, n, out, stream);
}

PYRT_CUDA_EXPORT int pyrt_cuda_filter_remove(const filter::View* view, int bits, int slots,
                                             const uint64_t* keys, uint64_t n, uint8_t* status,
                                             void* stream) noexcept {
  if (n == 0) return 0;
  return PYRT_FILTER_SHAPES(launch_remove, *view, keys, n, status, stream);
}
