#include "base/crc32c.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
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

#if defined(__x86_64__)

// Folding by carry-less multiplication (Gopal et al., "Fast CRC Computation for Generic Polynomials
// Using PCLMULQDQ", 2009), 16 lanes of 128 bits at once. A block of 16 bytes, its first bit the
// highest power of x, moves D bits on when its first half is multiplied by x^(64 + D) and its
// second by x^D modulo the polynomial. What is left, 256 bytes with the checksum of all before,
// goes through the instruction.
constexpr std::size_t kFold = 256;

// Bytes come from other cores' caches or from memory, and the prefetcher of the processor stops at
// the end of each page: what is this far ahead is asked for.
constexpr std::size_t kAhead = 4096;

// x^power modulo the polynomial, as a factor for a reflected 64-bit half; one power less, since the
// product of two reflected halves comes out one place off.
constexpr std::uint64_t fold_factor(unsigned power) {
  std::uint32_t value = 0x80000000;  // x^0
  for (unsigned i = 0; i + 1 < power; ++i) {
    value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
  }
  return static_cast<std::uint64_t>(value) << 32;
}

constexpr std::uint64_t kFirstFactor = fold_factor(64 + 8 * kFold);
constexpr std::uint64_t kSecondFactor = fold_factor(8 * kFold);

bool have_folding() noexcept {
  static const bool have = __builtin_cpu_supports("avx512f") != 0 &&
                           __builtin_cpu_supports("avx512vl") != 0 &&
                           __builtin_cpu_supports("vpclmulqdq") != 0;
  return have;
}

#define FEDCORE_FOLD_TARGET __attribute__((target("avx512f,avx512vl,vpclmulqdq,sse4.2")))

FEDCORE_FOLD_TARGET inline __m512i fold(__m512i state, __m512i factors, __m512i next) noexcept {
  const __m512i first = _mm512_clmulepi64_epi128(state, factors, 0x00);
  const __m512i second = _mm512_clmulepi64_epi128(state, factors, 0x11);
  return _mm512_ternarylogic_epi64(first, second, next, 0x96);  // the exclusive or of all three
}

FEDCORE_FOLD_TARGET std::uint32_t update_folding(std::uint32_t crc, const unsigned char* p,
                                                 std::size_t n) noexcept {
  if (n < 2 * kFold) {
    return update_fast(crc, p, n);
  }
  constexpr auto kOne = static_cast<long long>(kFirstFactor);
  constexpr auto kTwo = static_cast<long long>(kSecondFactor);
  const __m512i factors = _mm512_set_epi64(kTwo, kOne, kTwo, kOne, kTwo, kOne, kTwo, kOne);
  __m512i a = _mm512_xor_si512(_mm512_loadu_si512(p),
                               _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  __m512i b = _mm512_loadu_si512(p + 64);
  __m512i c = _mm512_loadu_si512(p + 128);
  __m512i d = _mm512_loadu_si512(p + 192);
  std::size_t done = kFold;
  for (; n - done >= kFold; done += kFold) {
    const char* ahead = reinterpret_cast<const char*>(p) + std::min(done + kAhead, n - kFold);
    for (std::size_t line = 0; line < kFold; line += 64) {
      _mm_prefetch(ahead + line, _MM_HINT_T0);
    }
    a = fold(a, factors, _mm512_loadu_si512(p + done));
    b = fold(b, factors, _mm512_loadu_si512(p + done + 64));
    c = fold(c, factors, _mm512_loadu_si512(p + done + 128));
    d = fold(d, factors, _mm512_loadu_si512(p + done + 192));
  }
  unsigned char left[kFold];
  _mm512_storeu_si512(left, a);
  _mm512_storeu_si512(left + 64, b);
  _mm512_storeu_si512(left + 128, c);
  _mm512_storeu_si512(left + 192, d);
  return update_fast(update_fast(0, left, kFold), p + done, n - done);
}

#endif

// The product of two polynomials modulo the CRC's own; the highest bit is that of x^0.
std::uint32_t multiply(std::uint32_t a, std::uint32_t b) noexcept {
  std::uint32_t product = 0;
  for (; a != 0; a <<= 1) {
    product ^= (a >> 31) != 0 ? b : 0;
    b = (b >> 1) ^ ((b & 1) != 0 ? kPolynomial : 0);
  }
  return product;
}

}  // namespace

// Bytes behind others multiply the polynomial of those by x^8 each.
std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second,
                             std::uint64_t second_size) noexcept {
  std::uint32_t power = 1u << 23;  // x^8, then its squares
  for (std::uint64_t left = second_size; left != 0; left >>= 1) {
    first = (left & 1) != 0 ? multiply(first, power) : first;
    power = multiply(power, power);
  }
  return first ^ second;
}

std::vector<std::uint32_t> crc32c_by_each_path(const void* data, std::size_t size,
                                               std::uint32_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::vector<std::uint32_t> found{~update_portable(~seed, bytes, size)};
#if defined(__x86_64__) || defined(__ARM_FEATURE_CRC32)
  if (have_instruction()) {
    found.push_back(~update_fast(~seed, bytes, size));
  }
#endif
#if defined(__x86_64__)
  if (have_folding()) {
    found.push_back(~update_folding(~seed, bytes, size));
  }
#endif
  return found;
}

std::uint32_t crc32c(const void* data, std::size_t size, std::uint32_t seed) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(data);
#if defined(__x86_64__)
  if (have_folding()) {
    return ~update_folding(~seed, bytes, size);
  }
#endif
#if defined(__x86_64__) || defined(__ARM_FEATURE_CRC32)
  if (have_instruction()) {
    return ~update_fast(~seed, bytes, size);
  }
#endif
  return ~update_portable(~seed, bytes, size);
}

}  // namespace fedcore
