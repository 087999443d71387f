// Spill: one file of equal slots for chunks that came before they can be reduced.
//
// A slot is as long as a chunk, and holds one as it travelled: an encoded body takes as many blocks
// of the disk as it has, for the file is sparse. Owns the file, a second one that says what each slot
// holds, and which slots are taken. Both are made with the first chunk, grow by extents, are reused
// from round to round, and go with the object. Those that a killed process left behind are taken up where they are whole:
// begin() keeps the slots that were written for the same key, claim() hands them out, and what
// nobody claims is free. A slot's bytes are compared with their checksum whenever they are read; whether they are a body of
// their chunk is for the caller to check.
// A put() that finds no room changes nothing. What is written does not become resident in this
// process; at() makes a slot resident until drop_pages.
// Thread-safe, but for at(): its pointer is valid until the next put().
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/mapped_file.hpp"
#include "codec/codec.hpp"
#include "format/wire.hpp"

namespace fedcore {

class Spill {
 public:
  using Slot = std::uint32_t;
  // What the chunks are of, beside the sets: a digest of all that their bytes depend on.
  using Key = std::array<std::uint8_t, 64>;
  // Chunks of one set: index and slot.
  using Chunks = std::vector<std::pair<std::uint64_t, Slot>>;
  // What the file grows by; the room on the device is looked at once for as much, or for all there is.
  static constexpr std::uint64_t kExtentBytes = 64u << 20;

  // `keep_free`: bytes of the device that are left to others; no block of them is taken.
  // Throws Error{kStorage} if a leftover at `path` can be neither taken up nor removed.
  Spill(std::string path, std::uint64_t slot_bytes, std::uint64_t keep_free,
        std::uint64_t extent_bytes = kExtentBytes);
  ~Spill();
  Spill(const Spill&) = delete;
  Spill& operator=(const Spill&) = delete;

  std::uint64_t slot_bytes() const noexcept { return slot_bytes_; }

  // From now on chunks are put for `key`; what a killed process put for another is given up.
  void begin(const Key& key);
  // The chunks of a set that a killed process put there; the slots are the caller's from now on.
  Chunks claim(const wire::SetId& set);
  // Frees what was not claimed.
  void free_unclaimed();

  // Writes a body of up to slot_bytes() to a free slot; nothing where there is no room, for which
  // problem() then gives the reason.
  std::optional<Slot> put(const wire::SetId& set, std::uint64_t chunk, const Body& body);
  // What a slot holds; nothing where it is not what was put there.
  std::optional<Body> at(Slot slot);
  void drop_pages(Slot slot) noexcept;
  void free(Slot slot) noexcept;

  std::string problem() const;
  // Slots taken, and the bytes of the file.
  std::uint64_t used() const;
  std::uint64_t file_bytes() const;

 private:
  // What is known of a slot: what it holds, and how many bytes of it have taken room.
  struct Content {
    std::uint32_t crc = 0;
    std::uint32_t size = 0;
    Encoding encoding = Encoding::kRaw;
    std::uint32_t written = 0;
  };

  bool has_room(std::uint64_t more);
  bool grow();
  bool make_room(std::uint64_t more);
  bool take_up();
  void remove_files();
  void write_head();

  const std::string path_;
  const std::string index_path_;
  const std::uint64_t slot_bytes_;
  const std::uint64_t keep_free_;
  const std::uint64_t extent_bytes_;
  mutable std::mutex mutex_;
  std::shared_ptr<MappedFile> file_;
  std::shared_ptr<MappedFile> index_;
  Key key_{};
  std::uint32_t head_crc_ = 0;
  std::map<wire::SetId, Chunks> unclaimed_;
  std::vector<Content> contents_;
  std::vector<Slot> free_;
  std::uint64_t granted_ =
      0;  // bytes that may be written where nothing was, before room is looked at again
  Slot slots_ = 0;
  std::string problem_;
};

}  // namespace fedcore
