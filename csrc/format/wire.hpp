// The frame header: 48 bytes, little-endian, and its validation. No I/O.
//
//  0 magic "FDC1" | 4 version | 5 kind | 6 encoding | 7 flags (0) | 8 set id, 16 bytes
// 24 index u64 | 32 count u32 | 36 body length u32 | 40 CRC-32C of the body u32 | 44 CRC-32C of
// bytes 0..43 u32
//
// parse() looks at every field before anything is used and never throws.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/crc32c.hpp"

namespace fedcore::wire {

inline constexpr std::size_t kHeaderBytes = 48;
inline constexpr std::uint8_t kVersion = 2;
inline constexpr std::uint32_t kMaxChunkBytes = 4u << 20;
inline constexpr std::uint32_t kMaxControlBytes = 8u << 20;
inline constexpr std::uint32_t kMaxCount = 1024;
// What parse() says of a frame of another version, which is in the byte at kVersionAt.
inline constexpr char kOtherVersion[] = "the frame is of another protocol version";
inline constexpr std::size_t kVersionAt = 4;
inline constexpr std::uint8_t kRaw = 0;
inline constexpr std::uint8_t kPacked = 0x80;  // set in an encoding: shuffled and compressed
inline constexpr std::uint8_t kLastEncoding = 5;

enum class Kind : std::uint8_t {
  kGet = 1,
  kChunk = 2,
  kRefuse = 3,
  kPing = 4,
  kPong = 5,
  kControl = 6
};
enum class Refusal : std::uint32_t { kUnknownSet = 1, kOutOfRange = 2, kBusy = 3 };

using SetId = std::array<std::uint8_t, 16>;
using Bytes = std::array<std::uint8_t, kHeaderBytes>;

struct Header {
  Kind kind = Kind::kPing;
  std::uint8_t encoding = kRaw;
  SetId set{};
  std::uint64_t index = 0;
  std::uint32_t count = 0;
  std::uint32_t length = 0;
  std::uint32_t body_crc = 0;
};

namespace detail {
template <typename T>
void store(std::uint8_t* to, T value) noexcept {
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    to[i] = static_cast<std::uint8_t>(value >> (8 * i));
  }
}
template <typename T>
T load(const std::uint8_t* from) noexcept {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    value |= static_cast<T>(static_cast<T>(from[i]) << (8 * i));
  }
  return value;
}
}  // namespace detail

inline Bytes encode(const Header& header) noexcept {
  Bytes out{};
  std::memcpy(out.data(), "FDC1", 4);
  out[kVersionAt] = kVersion;
  out[5] = static_cast<std::uint8_t>(header.kind);
  out[6] = header.encoding;
  std::memcpy(out.data() + 8, header.set.data(), header.set.size());
  detail::store(out.data() + 24, header.index);
  detail::store(out.data() + 32, header.count);
  detail::store(out.data() + 36, header.length);
  detail::store(out.data() + 40, header.body_crc);
  detail::store(out.data() + 44, crc32c(out.data(), 44));
  return out;
}

// Returns nullptr and fills `header` if the frame is well-formed, else why it is not. The body's
// checksum is left to the receiver of the body, who may still have to read it anyway.
inline const char* parse(const void* data, std::size_t size, std::size_t body_size,
                         Header& header) noexcept {
  const auto* p = static_cast<const std::uint8_t*>(data);
  if (size != kHeaderBytes) {
    return "the header is not 48 bytes long";
  }
  if (std::memcmp(p, "FDC1", 4) != 0) {
    return "the magic number is wrong";
  }
  if (p[kVersionAt] != kVersion) {
    return kOtherVersion;
  }
  if (detail::load<std::uint32_t>(p + 44) != crc32c(p, 44)) {
    return "the header's checksum does not match";
  }
  if (p[5] < 1 || p[5] > 6) {
    return "the kind is unknown";
  }
  if (p[7] != 0) {
    return "the flags are not zero";
  }
  header.kind = static_cast<Kind>(p[5]);
  header.encoding = p[6];
  std::memcpy(header.set.data(), p + 8, header.set.size());
  header.index = detail::load<std::uint64_t>(p + 24);
  header.count = detail::load<std::uint32_t>(p + 32);
  header.length = detail::load<std::uint32_t>(p + 36);
  header.body_crc = detail::load<std::uint32_t>(p + 40);
  const int encoding = header.encoding & ~kPacked;
  if (encoding > kLastEncoding || (header.encoding != kRaw && header.kind != Kind::kChunk)) {
    return "the encoding is unknown";
  }
  if (header.length != body_size) {
    return "the body's length does not match the header";
  }
  switch (header.kind) {
    case Kind::kGet:
      if (header.count < 1 || header.count > kMaxCount) {
        return "a GET asks for no chunk or for too many";
      }
      break;
    case Kind::kChunk:
      if (header.length == 0 || header.length > kMaxChunkBytes) {
        return "a CHUNK's length is out of range";
      }
      if (header.count != 0) {
        return "a CHUNK's count is not zero";
      }
      return nullptr;
    case Kind::kRefuse:
      if (header.count < 1 || header.count > 3) {
        return "a REFUSE gives an unknown reason";
      }
      break;
    case Kind::kControl:
      if (header.length == 0 || header.length > kMaxControlBytes) {
        return "a control message's length is out of range";
      }
      if (header.count != 0 || header.index != 0) {
        return "a control message's count or index is not zero";
      }
      return nullptr;
    case Kind::kPing:
    case Kind::kPong:
      if (header.count != 0 || header.index != 0) {
        return "a heartbeat's count or index is not zero";
      }
      break;
  }
  return header.length == 0 && header.body_crc == 0 ? nullptr : "this kind of frame has no body";
}

}  // namespace fedcore::wire
