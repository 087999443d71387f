#include "base/digest.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace fedcore {
namespace {

__extension__ typedef unsigned __int128 Wide;

constexpr std::uint64_t kPrime = (std::uint64_t{1} << 61) - 1;

// h * point + word modulo the prime.
std::uint64_t extend(std::uint64_t h, std::uint64_t point, std::uint64_t word) noexcept {
  const Wide wide = static_cast<Wide>(h) * point + word;
  const std::uint64_t sum =
      (static_cast<std::uint64_t>(wide) & kPrime) + static_cast<std::uint64_t>(wide >> 61);
  const std::uint64_t folded = (sum & kPrime) + (sum >> 61);
  return folded >= kPrime ? folded - kPrime : folded;
}

std::uint64_t hash_block(const std::uint8_t* block, const std::uint32_t* key,
                         std::size_t half) noexcept {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < half; ++i) {
    std::uint32_t one, other;
    std::memcpy(&one, block + i * sizeof one, sizeof one);
    std::memcpy(&other, block + (half + i) * sizeof other, sizeof other);
    sum += static_cast<std::uint64_t>(one + key[i]) * (other + key[half + i]);
  }
  return sum;
}

}  // namespace

Digest::Digest(std::string_view key) : key_(), point_(0) {
  if (key.size() != kKeyBytes) {
    throw Error(Errc::kConfig, "the key of digests must have 1032 bytes");
  }
  std::memcpy(key_.data(), key.data(), kBlockBytes);
  std::memcpy(&point_, key.data() + kBlockBytes, sizeof point_);
  point_ %= kPrime;
}

std::uint64_t Digest::of(const void* data, std::size_t size, std::uint8_t kind) const noexcept {
  const auto* bytes = static_cast<const std::uint8_t*>(data);
  std::uint64_t h = 1;
  const auto add = [&](const std::uint8_t* block) {
    const std::uint64_t sum = hash_block(block, key_.data(), kWords / 2);
    h = extend(h, point_, sum & 0xffffffff);
    h = extend(h, point_, sum >> 32);
  };
  std::size_t left = size;
  for (; left >= kBlockBytes; left -= kBlockBytes, bytes += kBlockBytes) {
    add(bytes);
  }
  if (left > 0) {
    std::array<std::uint8_t, kBlockBytes> last{};
    std::memcpy(last.data(), bytes, left);
    add(last.data());
  }
  h = extend(h, point_, (static_cast<std::uint64_t>(size) << 8) | kind);
  return h + 1;
}

}  // namespace fedcore
