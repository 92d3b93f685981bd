// SIMD level of this process: detected once, lowered by PYRUNTIME_SIMD, read by every kernel table.
//
// Kernel families are one template over an ISA-traits type, instantiated in functions that carry
// the matching target attribute, and reached through a table filled at first use. There is no
// -march=native, no per-file ISA flag (an inline std function compiled for AVX-512 could be the
// copy the linker keeps) and no target_clones (its resolver runs before the sanitizer run time).
#pragma once

namespace pyruntime::simd {

// Ordered: a kernel table without an entry for a level falls back to the next lower one.
enum class Level : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, neon = 4 };

Level detected() noexcept;  // best level of this CPU and operating system
Level level() noexcept;     // level in use
const char* name(Level level) noexcept;

}  // namespace pyruntime::simd
