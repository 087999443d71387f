// Copies of bytes that are not read again soon, past the cache where the machine can.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <emmintrin.h>
#endif

namespace fedcore {

#if defined(__x86_64__) || defined(_M_X64)
// stream_copy() without its end: whole lines go past the cache, and the rest through it.
inline void stream_lines(void* to, const void* from, std::size_t size) noexcept {
  auto* out = static_cast<std::uint8_t*>(to);
  const auto* in = static_cast<const std::uint8_t*>(from);
  const std::size_t before = (64 - reinterpret_cast<std::uintptr_t>(out) % 64) % 64;
  const std::size_t head = before < size ? before : size;
  std::memcpy(out, in, head);
  out += head;
  in += head;
  std::size_t left = size - head;
  for (; left >= 64; left -= 64, out += 64, in += 64) {
    const auto* line = reinterpret_cast<const __m128i*>(in);
    auto* place = reinterpret_cast<__m128i*>(out);
    const __m128i a = _mm_loadu_si128(line);
    const __m128i b = _mm_loadu_si128(line + 1);
    const __m128i c = _mm_loadu_si128(line + 2);
    const __m128i d = _mm_loadu_si128(line + 3);
    _mm_stream_si128(place, a);
    _mm_stream_si128(place + 1, b);
    _mm_stream_si128(place + 2, c);
    _mm_stream_si128(place + 3, d);
  }
  std::memcpy(out, in, left);
}

// What stream_lines() has stored is in order before what is stored after this.
inline void stream_end() noexcept { _mm_sfence(); }
#else
inline void stream_lines(void* to, const void* from, std::size_t size) noexcept {
  std::memcpy(to, from, size);
}
inline void stream_end() noexcept {}
#endif

// As memcpy. A line that is stored whole need not be read first, which saves a third of what moves,
// and what lies in the cache stays there.
inline void stream_copy(void* to, const void* from, std::size_t size) noexcept {
  constexpr std::size_t kWorthwhile = 64u << 10;
  if (size < kWorthwhile) {
    std::memcpy(to, from, size);
    return;
  }
  stream_lines(to, from, size);
  stream_end();
}

}  // namespace fedcore
