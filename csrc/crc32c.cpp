#include "crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace fedcore {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // reflected 0x1EDC6F41

using Table = std::array<std::array<std::uint32_t, 256>, 8>;

constexpr Table make_table() {
  Table t{};
  for (std::uint32_t i = 0; i < 256; ++i) {
    std::uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) {
      crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    }
    t[0][i] = crc;
  }
  for (std::uint32_t i = 0; i < 256; ++i) {
    for (std::size_t k = 1; k < 8; ++k) {
      t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 0xFF];
    }
  }
  return t;
}

constexpr Table kTable = make_table();

std::uint32_t update_portable(std::uint32_t crc, const unsigned char* p, std::size_t n) noexcept {
  if constexpr (std::endian::native == std::endian::little) {
    for (; n >= 8; p += 8, n -= 8) {
      std::uint64_t word;
      std::memcpy(&word, p, 8);
      word ^= crc;
      crc = kTable[7][word & 0xFF] ^ kTable[6][(word >> 8) & 0xFF] ^
            kTable[5][(word >> 16) & 0xFF] ^ kTable[4][(word >> 24) & 0xFF] ^
            kTable[3][(word >> 32) & 0xFF] ^ kTable[2][(word >> 40) & 0xFF] ^
            kTable[1][(word >> 48) & 0xFF] ^ kTable[0][word >> 56];
    }
  }
  for (; n > 0; ++p, --n) {
    crc = (crc >> 8) ^ kTable[0][(crc ^ *p) & 0xFF];
  }
  return crc;
}

#if defined(__x86_64__) || defined(__ARM_FEATURE_CRC32)

// The instruction has a latency of three cycles and a throughput of one, so three streams run side
// by side. Joining them needs "append kBlock zero bytes to a checksum", a linear map over GF(2)
// that four tables of 256 entries evaluate.
constexpr std::size_t kBlock = 4096;

using Shift = std::array<std::array<std::uint32_t, 256>, 4>;

Shift make_shift() {
  // Column i of the map: what the checksum with only bit i set becomes after kBlock zero bytes.
  std::array<std::uint32_t, 32> column{};
  const std::array<unsigned char, kBlock> zeros{};
  for (std::size_t i = 0; i < 32; ++i) {
    column[i] = update_portable(std::uint32_t{1} << i, zeros.data(), kBlock);
  }
  Shift shift{};
  for (std::size_t byte = 0; byte < 4; ++byte) {
    for (std::uint32_t value = 0; value < 256; ++value) {
      std::uint32_t sum = 0;
      for (std::size_t bit = 0; bit < 8; ++bit) {
        if (value & (1u << bit)) {
          sum ^= column[byte * 8 + bit];
        }
      }
      shift[byte][value] = sum;
    }
  }
  return shift;
}

std::uint32_t append_zeros(std::uint32_t crc) noexcept {
  static const Shift shift = make_shift();
  return shift[0][crc & 0xFF] ^ shift[1][(crc >> 8) & 0xFF] ^ shift[2][(crc >> 16) & 0xFF] ^
         shift[3][crc >> 24];
}

#if defined(__x86_64__)
#define FEDCORE_CRC_TARGET __attribute__((target("sse4.2")))
#define FEDCORE_CRC64(crc, word) static_cast<std::uint32_t>(_mm_crc32_u64(crc, word))
#define FEDCORE_CRC8(crc, byte) _mm_crc32_u8(crc, byte)
bool have_instruction() noexcept {
  static const bool have = __builtin_cpu_supports("sse4.2") != 0;
  return have;
}
#else
#define FEDCORE_CRC_TARGET
#define FEDCORE_CRC64(crc, word) __crc32cd(crc, word)
#define FEDCORE_CRC8(crc, byte) __crc32cb(crc, byte)
constexpr bool have_instruction() noexcept { return true; }
#endif

FEDCORE_CRC_TARGET std::uint32_t update_fast(std::uint32_t crc, const unsigned char* p,
                                             std::size_t n) noexcept {
  std::uint64_t a, b, c;
  while (n >= 3 * kBlock) {
    std::uint32_t second = 0, third = 0;
    for (std::size_t i = 0; i < kBlock; i += 8) {
      std::memcpy(&a, p + i, 8);
      std::memcpy(&b, p + kBlock + i, 8);
      std::memcpy(&c, p + 2 * kBlock + i, 8);
      crc = FEDCORE_CRC64(crc, a);
      second = FEDCORE_CRC64(second, b);
      third = FEDCORE_CRC64(third, c);
    }
    crc = append_zeros(append_zeros(crc) ^ second) ^ third;
    p += 3 * kBlock;
    n -= 3 * kBlock;
  }
  for (; n >= 8; p += 8, n -= 8) {
    std::memcpy(&a, p, 8);
    crc = FEDCORE_CRC64(crc, a);
  }
  for (; n > 0; ++p, --n) {
    crc = FEDCORE_CRC8(crc, *p);
  }
  return crc;
}

#endif

}  // namespace

std::uint32_t crc32c_portable(const void* data, std::size_t size, std::uint32_t seed) noexcept {
  return ~update_portable(~seed, static_cast<const unsigned char*>(data), size);
}

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t seed) noexcept {
#if defined(__x86_64__) || defined(__ARM_FEATURE_CRC32)
  if (have_instruction()) {
    return ~update_fast(~seed, static_cast<const unsigned char*>(data), size);
  }
#endif
  return crc32c_portable(data, size, seed);
}

}  // namespace fedcore
