#include "simd/level.hpp"

#include <cstdlib>
#include <cstring>

namespace pyruntime::simd {
namespace {

Level probe() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("f16c");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return Level::avx512_vnni;
  if (avx512) return Level::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Level::avx2;
  }
#endif
  return Level::scalar;
}

Level chosen() noexcept {
  const Level best = detected();
  const char* wanted = std::getenv("PYRUNTIME_SIMD");
  if (wanted == nullptr) return best;
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, name(static_cast<Level>(i))) == 0) return static_cast<Level>(i);
  }
  return best;  // unknown or above what the CPU has: the doctor reports both levels
}

}  // namespace

Level detected() noexcept {
  static const Level value = probe();
  return value;
}

Level level() noexcept {
  static const Level value = chosen();
  return value;
}

const char* name(Level level) noexcept {
  switch (level) {
    case Level::scalar:
      return "scalar";
    case Level::avx2:
      return "avx2";
    case Level::avx512:
      return "avx512";
    case Level::avx512_vnni:
      return "avx512_vnni";
    case Level::neon:
      return "neon";
  }
  return "unknown";
}

}  // namespace pyruntime::simd
