// CRC-32C (Castagnoli, RFC 3720 appendix B.4), the checksum of every frame.
//
// Stateless and thread-safe. Folds with AVX-512 carry-less multiplication where there is one, else
// runs the SSE4.2 or ARMv8 instruction on three interleaved streams, else a slicing-by-8 table.
// Every path gives the same value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fedcore {

// Extends `seed` (the checksum of what came before; 0 to begin) by `size` bytes.
std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t seed = 0) noexcept;

// The checksum of bytes and `second_size` more behind them, from the checksums of both. Cost: a few microseconds.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_size) noexcept;

// What each path that this CPU has makes of the same bytes, the table first; for tests.
std::vector<std::uint32_t> crc32c_by_each_path(const void* data, std::size_t size,
                                               std::uint32_t seed);

}  // namespace fedcore
