// FlatWriter: the flat bytes of one tensor set, written to a file from their first byte to their
// last, and the checksums of their chunks taken on the way, while the bytes are still in the cache.
//
// Owns the checksum of the current chunk. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/mapped_file.hpp"

namespace fedcore {

class FlatWriter {
 public:
  // The flat bytes are `length` from `offset` on. Throws Error{kStorage} if they lie outside the
  // file, and Error{kLayout} for chunks of no size.
  FlatWriter(std::shared_ptr<MappedFile> file, std::uint64_t offset, std::uint64_t length,
             std::uint64_t chunk_bytes);

  // Appends bytes. Throws Error{kLayout} if they are more than the rest, and then nothing was
  // written, and Error{kStorage}.
  void write(const void* data, std::uint64_t size);

  // CRC-32C of every chunk. Throws Error{kLayout} before the last byte.
  std::vector<std::uint32_t> checksums() const;

 private:
  const std::shared_ptr<MappedFile> file_;
  const std::uint64_t offset_;
  const std::uint64_t length_;
  const std::uint64_t chunk_bytes_;
  std::uint64_t at_ = 0;
  std::vector<std::uint32_t> crcs_;
};

}  // namespace fedcore
