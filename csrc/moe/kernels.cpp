#include "moe/kernels.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyruntime::moe {
namespace {

struct Named {
  const char* name;
  const Kernels* table;
  bool runs;
};

#if defined(__x86_64__)
bool has_avx_vnni() noexcept {  // the VEX form, which g++ 12 has no name for in cpu_supports
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif

// Best first.
const Named* all(int* count) noexcept {
#if defined(__x86_64__)
  using simd::Level;
  static const Named tables[] = {
      {"avx512_vnni", &kAvx512VnniKernels, simd::detected() == Level::avx512_vnni},
      {"avx_vnni", &kAvxVnniKernels, simd::detected() >= Level::avx2 && has_avx_vnni()},
      {"avx2", &kAvx2Kernels, simd::detected() >= Level::avx2},
      {"scalar", &kScalarKernels, true}};
#else
  static const Named tables[] = {{"scalar", &kScalarKernels, true}};
#endif
  *count = static_cast<int>(sizeof tables / sizeof tables[0]);
  return tables;
}

const Named& chosen() noexcept {
  int count = 0;
  const Named* tables = all(&count);
  int first = 0;
#if defined(__x86_64__)
  if (simd::level() < simd::Level::avx512_vnni) first = 1;
  if (simd::level() < simd::Level::avx2) first = 3;
#endif
  while (!tables[first].runs) ++first;
  return tables[first];
}

}  // namespace

const Kernels* kernels(const char* name) noexcept {
  int count = 0;
  const Named* tables = all(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(tables[i].name, name) == 0) return tables[i].runs ? tables[i].table : nullptr;
  }
  return nullptr;
}

const Kernels& kernels() noexcept {
  static const Named& named = chosen();
  return *named.table;
}

const char* kernels_name() noexcept {
  static const Named& named = chosen();
  return named.name;
}

}  // namespace pyruntime::moe
