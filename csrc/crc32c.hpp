// CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of every frame.
//
// Stateless and thread-safe. Uses the SSE4.2 or ARMv8 instruction where there is one, on three
// interleaved streams, else a slicing-by-8 table. Every path gives the same value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedcore {

// Extends `seed` (the checksum of what came before; 0 to begin) by `size` bytes.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t seed = 0) noexcept;

// The table-driven path, for tests to compare with.
std::uint32_t crc32c_portable(const void* data, std::size_t size, std::uint32_t seed = 0) noexcept;

}  // namespace fedcore
