// What kernel tests share: arrays in device memory (in the shim heap blocks of the exact size,
// which AddressSanitizer guards) and a fixture that skips where nvcc built the tests and there is
// no GPU.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "cuda/include/device.cuh"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace pyruntime::dev {

#if defined(__CUDACC__)

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

// Waits for the device; its status.
inline int synchronize() { return static_cast<int>(cudaDeviceSynchronize()); }

inline bool have_device() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  cudaGetLastError();
  return found;
}

template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size()) {
    must(cudaMalloc(&data_, size_ * sizeof(T) + 1), "cudaMalloc");
    must(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~Array() { cudaFree(data_); }

  std::vector<T> host() const {
    std::vector<T> values(size_);
    must(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

#else

inline int synchronize() { return 0; }
inline bool have_device() { return true; }

template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size()) {
    data_ = static_cast<T*>(std::aligned_alloc(256, padded()));
    // The heap block is a multiple of 256 bytes; a second one of the exact size would lose the
    // alignment cudaMalloc guarantees, so the tail is poisoned instead.
    std::copy(values.begin(), values.end(), data_);
    poison(true);
  }
  ~Array() {
    poison(false);
    std::free(data_);
  }

  std::vector<T> host() const { return {data_, data_ + size_}; }

 private:
  size_t padded() const { return (size_ * sizeof(T) + 255) / 256 * 256 + 256; }
  void poison([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
    auto* end = reinterpret_cast<char*>(data_ + size_);
    const size_t tail = reinterpret_cast<char*>(data_) + padded() - end;
    on ? __asan_poison_memory_region(end, tail) : __asan_unpoison_memory_region(end, tail);
#endif
  }

 public:
#endif

  explicit Array(size_t size, T value = T{}) : Array(std::vector<T>(size, value)) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  size_t size() const { return size_; }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(data_); }

 private:
  static_assert(std::is_trivially_copyable_v<T>);
  T* data_ = nullptr;
  size_t size_;
};

class KernelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) GTEST_SKIP() << "no CUDA device";
  }
};

}  // namespace pyruntime::dev
