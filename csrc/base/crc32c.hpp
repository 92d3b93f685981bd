// CRC-32C (Castagnoli), as in iSCSI: reflected polynomial 0x82f63b78.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyruntime::base {

// Continues `crc` (0 to start) over `size` bytes; three streams of the SSE4.2 instruction where the
// CPU has it, tables elsewhere. Same result either way.
uint32_t crc32c(const void* data, size_t size, uint32_t crc = 0) noexcept;

// The table version, for tests.
uint32_t crc32c_tables(const void* data, size_t size, uint32_t crc = 0) noexcept;

}  // namespace pyruntime::base
