// Digest: whether bytes are those that came before, though whoever sends them would have it otherwise.
//
// A checksum tells what went wrong by chance; bytes of the same checksum are easily made. A digest depends on a
// secret key. Of two bodies that were chosen without it, and without its digests, one in 2^31 or fewer have the
// same one: NH (Black et al. 1999, "UMAC") over blocks of 1 KiB, and a polynomial over their results modulo
// 2^61 - 1 (Wegman and Carter 1981). It may be shown to nobody. Immutable, hence usable from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fedcore {

class Digest {
 public:
  static constexpr std::size_t kBlockBytes = 1024;
  static constexpr std::size_t kKeyBytes = kBlockBytes + sizeof(std::uint64_t);

  // Throws Error{kConfig} for a key that has not kKeyBytes random bytes.
  explicit Digest(std::string_view key);

  // Never 0. `kind` tells bodies of the same bytes apart that mean something else.
  std::uint64_t of(const void* data, std::size_t size, std::uint8_t kind = 0) const noexcept;

 private:
  static constexpr std::size_t kWords = kBlockBytes / sizeof(std::uint32_t);
  std::array<std::uint32_t, kWords> key_;
  std::uint64_t point_;
};

}  // namespace fedcore
