// Publisher: the immutable tensor sets that this process offers, served chunk by chunk.
//
// Owns a reference to each set's file and the checksums of the chunks that were served. A published
// set's bytes must not change until it is withdrawn. Not thread-safe: Exchange holds the lock.
// Cost: no copy of a chunk is made; its checksum is computed the first time it is asked for, and so
// it is compressed where that was wanted.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mapped_file.hpp"
#include "codec/packer.hpp"
#include "format/wire.hpp"

namespace fedcore {

struct PublishedChunk {
  std::shared_ptr<MappedFile> file;
  const std::uint8_t* data;
  std::uint32_t size;
  std::uint8_t encoding_byte;
};

class Publisher {
 public:
  // Throws Error{kStorage} if the range lies outside the file, Error{kLayout} for a bad chunk size,
  // and Error{kProtocol} if the id is published already. `checksums` (CRC-32C of each chunk) may be
  // empty; each is computed then when its chunk is served first.
  void publish(const wire::SetId& id, std::shared_ptr<MappedFile> file, std::uint64_t offset,
               std::uint64_t length, std::uint64_t chunk_bytes,
               const std::vector<std::uint32_t>& checksums);

  // Publishes encoded chunks, which lie back to back: chunk i is bytes offsets[i] to offsets[i + 1]
  // of the file. Throws as publish() does.
  void publish_encoded(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                       std::vector<std::uint64_t> offsets, std::vector<std::uint8_t> encodings,
                       const std::vector<std::uint32_t>& checksums);

  // Publishes the flat bytes of the packer's layout, which begin at `offset`, and serves compressed
  // what it compresses. `checksums` are those of the raw chunks. Throws as publish() does.
  void publish_packed(const wire::SetId& id, std::shared_ptr<MappedFile> file, std::uint64_t offset,
                      std::unique_ptr<Packer> packer, const std::vector<std::uint32_t>& checksums);
  void withdraw(const wire::SetId& id) noexcept { sets_.erase(id); }
  std::vector<wire::SetId> published() const;

  // Makes a set unknown to all peers but those of one audience; 0: known to all. Does nothing where
  // there is no such set.
  void restrict_to(const wire::SetId& id, std::uint64_t audience) noexcept;

  // Why chunks [first, first + count) can't be served to a peer of this audience, or nothing.
  std::optional<wire::Refusal> check(const wire::SetId& id, std::uint64_t first,
                                     std::uint32_t count, std::uint64_t audience) const noexcept;

  // A chunk, or nothing if the set was withdrawn in the meantime.
  std::optional<PublishedChunk> find(const wire::SetId& id, std::uint64_t index);
  // The CRC-32C of a chunk that find() gives. The chunk becomes resident.
  std::uint32_t checksum(const wire::SetId& id, std::uint64_t index);

  // Reads chunks again and compares them with their checksums. Returns what is wrong with the first
  // that differs, with the file's name; nothing if all are as they were, or the set is gone.
  std::optional<std::string> reread(const wire::SetId& id, std::uint64_t first, std::uint64_t end);

 private:
  struct Set {
    std::shared_ptr<MappedFile> file;
    std::uint64_t offset;
    std::uint64_t length;
    std::uint64_t chunk_bytes;
    std::vector<std::optional<std::uint32_t>> crcs;
    std::vector<std::uint64_t> offsets;   // of encoded chunks, else empty
    std::vector<std::uint8_t> encodings;  // the same
    std::shared_ptr<Packer> packer;       // where chunks may be compressed
    std::uint64_t audience = 0;           // the peers that may have it; 0: all

    std::uint64_t begin(std::uint64_t index) const noexcept;
    std::uint64_t end(std::uint64_t index) const noexcept;
    bool is_as_it_was(std::uint64_t index) const noexcept;
  };
  void add(const wire::SetId& id, Set set);

  std::map<wire::SetId, Set> sets_;
};

}  // namespace fedcore
