// Record: which chunks of a collection are reduced, kept beside its output. After a kill another
// process resumes from it.
//
// Owns one small file: a head (what is being collected, and from which sources), then eight bytes
// for each chunk of the output. Invariants:
//   - a chunk's entry is written after its bytes were handed to the kernel, so that what a killed
//     process recorded is there. A power cut keeps no order: whoever goes on compares the bytes
//     with the entry's checksum;
//   - an entry counts only under the head that it was written under. narrow() clears the entries
//     and writes another head, so nothing that holds a lost source's values outlives it;
//   - a file that is torn, or was written by anything else, is not opened.
// A record that can't be written any more is removed: without it a collection begins again, with
// it wrong it would not. Nothing is synchronised. Not thread-safe, but for sources() and key() of
// a record that is only read.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/mapped_file.hpp"
#include "format/wire.hpp"

namespace fedcore {

class Record {
 public:
  struct Source {
    std::string site;
    wire::SetId set;
    double weight;
    std::uint64_t version = 0;  // of its base
    bool operator==(const Source&) const = default;
  };
  // What the output must be: a digest of all that its bytes depend on beside the sources.
  using Key = std::array<std::uint8_t, 64>;
  static constexpr std::size_t kMaxSite = 64;

  // A new record without entries, in place of what is at `path`. Throws Error{kStorage, kConfig}:
  // the file can't be made, or a site's name is longer than kMaxSite bytes.
  static std::shared_ptr<Record> create(const std::string& path, const Key& key,
                                        std::vector<Source> sources, std::uint64_t chunk_count);
  // The record at `path`; null where there is none that is whole.
  static std::shared_ptr<Record> open(const std::string& path);

  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;

  const Key& key() const noexcept { return key_; }
  const std::vector<Source>& sources() const noexcept { return sources_; }
  std::uint64_t chunk_count() const noexcept { return chunk_count_; }

  // The checksum of a chunk that is in the output; nothing for one that isn't.
  std::optional<std::uint32_t> at(std::uint64_t index) const noexcept;
  // Notes that the chunk's bytes, with this checksum, are in the output.
  void put(std::uint64_t index, std::uint32_t crc) noexcept;
  // Forgets all chunks, and the source that published `set`.
  void narrow(const wire::SetId& set);

 private:
  Record(std::shared_ptr<MappedFile> file, const Key& key, std::vector<Source> sources,
         std::uint64_t capacity, std::uint64_t chunk_count);

  std::vector<std::uint8_t> head() const;
  std::uint32_t tag(std::uint64_t index, std::uint32_t crc) const noexcept;
  void write(std::uint64_t offset, const void* data, std::size_t size) noexcept;

  std::shared_ptr<MappedFile> file_;  // null once it can't be written
  Key key_;
  std::vector<Source> sources_;
  std::uint64_t capacity_;  // sources that the head has room for
  std::uint64_t chunk_count_;
  std::uint32_t head_crc_ = 0;
};

}  // namespace fedcore
