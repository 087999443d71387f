#include "format/flat_writer.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "base/crc32c.hpp"
#include "base/error.hpp"

namespace fedcore {
namespace {

// Read twice in a row, once for the checksum and once for the file: small enough for the cache.
constexpr std::uint64_t kPiece = 256u << 10;

}  // namespace

FlatWriter::FlatWriter(std::shared_ptr<MappedFile> file, std::uint64_t offset, std::uint64_t length,
                       std::uint64_t chunk_bytes)
    : file_(std::move(file)), offset_(offset), length_(length), chunk_bytes_(chunk_bytes) {
  file_->check_range(offset, length);
  if (chunk_bytes == 0) {
    throw Error(Errc::kLayout, "chunks of 0 bytes");
  }
}

void FlatWriter::write(const void* data, std::uint64_t size) {
  if (size > length_ - at_) {
    throw Error(Errc::kLayout, std::to_string(size) + " bytes were given where " +
                                   std::to_string(length_ - at_) + " are left");
  }
  const auto* from = static_cast<const std::uint8_t*>(data);
  while (size > 0) {
    const std::uint64_t in_chunk = at_ % chunk_bytes_;
    const std::uint64_t piece = std::min({size, kPiece, chunk_bytes_ - in_chunk});
    crcs_.resize(static_cast<std::size_t>(at_ / chunk_bytes_ + 1));
    const std::uint32_t crc = crc32c(from, piece, crcs_.back());
    file_->write(offset_ + at_, from, piece);
    crcs_.back() = crc;
    from += piece;
    at_ += piece;
    size -= piece;
  }
}

std::vector<std::uint32_t> FlatWriter::checksums() const {
  if (at_ != length_) {
    throw Error(Errc::kLayout, std::to_string(length_ - at_) + " of " + std::to_string(length_) +
                                   " bytes were not written");
  }
  return crcs_;
}

}  // namespace fedcore
