#include "capi/cuda_loader.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <mutex>
#include <string>

#include "base/cuda.hpp"
#include "base/status.hpp"

namespace pyruntime::capi {
namespace {

constexpr int kInsufficientDriver = 35;  // cudaErrorInsufficientDriver
constexpr int kNoDevice = 100;           // cudaErrorNoDevice
constexpr int kStubLibrary = 34;         // cudaErrorStubLibrary

std::string library_path() {
  if (const char* named = std::getenv("PYRUNTIME_CUDA_LIBRARY")) return named;
  Dl_info self{};
  if (dladdr(reinterpret_cast<const void*>(&cuda_symbol), &self) == 0) return {};
  std::string path = self.dli_fname;
  const size_t slash = path.rfind('/');
  path.erase(slash == std::string::npos ? 0 : slash + 1);
  return path + "libpyruntime_cuda.so";
}

void* require_symbol(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) {
    fail(PYRT_EVERSION, "libpyruntime_cuda.so has no %s: it is from another build", name);
  }
  return symbol;
}

#define PYRT_REQUIRE(library, function) \
  reinterpret_cast<decltype(&function)>(require_symbol(library, #function))

void require_device(void* library) {
  int count = 0;
  const int error = PYRT_REQUIRE(library, pyrt_cuda_device_count)(&count);
  if (error == 0 && count > 0) return;
  int driver = 0, runtime = 0;
  PYRT_REQUIRE(library, pyrt_cuda_versions)(&driver, &runtime);
  if (error == kInsufficientDriver || error == kStubLibrary) {
    if (driver == 0) fail(PYRT_ENODEV, "no CUDA driver (libcuda.so.1) on this machine");
    fail(PYRT_ENODEV, "no CUDA driver that is new enough: it supports CUDA %d.%d, not %d.%d",
         driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  }
  if (error == 0 || error == kNoDevice) fail(PYRT_ENODEV, "no device: the CUDA driver sees none");
  fail(PYRT_ENODEV, "no device: the CUDA driver gives %s (%d), %s",
       PYRT_REQUIRE(library, pyrt_cuda_error_name)(error), error,
       PYRT_REQUIRE(library, pyrt_cuda_error_text)(error));
}

// The open library. Failures are tried again at the next call: they may be mended meanwhile.
void* library() {
  static std::mutex mutex;
  static void* opened = nullptr;
  const std::lock_guard lock(mutex);
  if (opened != nullptr) return opened;
  const std::string path = library_path();
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    fail(PYRT_ENODEV, "built without CUDA: %s", why != nullptr ? why : path.c_str());
  }
  const int version = PYRT_REQUIRE(handle, pyrt_cuda_abi_version)();
  if (version != PYRT_ABI_VERSION) {
    fail(PYRT_EVERSION, "%s has ABI %d, this library %d; build them together", path.c_str(),
         version, PYRT_ABI_VERSION);
  }
  require_device(handle);
  opened = handle;
  return opened;
}

}  // namespace

void* cuda_symbol(const char* name) { return require_symbol(library(), name); }

void cuda_check(const char* launcher, int error) {
  if (error == 0) return;
  fail(PYRT_ECUDA, "%s: %s (%d), %s", launcher,
       PYRT_REQUIRE(library(), pyrt_cuda_error_name)(error), error,
       PYRT_REQUIRE(library(), pyrt_cuda_error_text)(error));
}

}  // namespace pyruntime::capi
