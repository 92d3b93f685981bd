// SIMD level of this process: detected once, lowered by PYRUNTIME_SIMD, read by every kernel table.
//
// Kernel families are written once over ISA traits, compiled once per level under a target pragma,
// and reached through a table filled at first use. There is no -march=native, no per-file ISA flag
// (an inline std function compiled for AVX-512 could be the copy the linker keeps; the pragma opens
// after the last standard header) and no target_clones (its resolver runs before the sanitizers).
#pragma once

namespace pyruntime::simd {

// Ordered: a kernel table without an entry for a level falls back to the next lower one.
enum class Level : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, neon = 4 };

Level detected() noexcept;  // best level of this CPU and operating system
Level level() noexcept;     // level in use
const char* name(Level level) noexcept;

}  // namespace pyruntime::simd
