// Spill: one file of equal slots for chunks that came before they can be reduced.
//
// Owns the file, a second one that says what each slot holds, and which slots are taken. Both are
// made with the first chunk, grow by preallocated extents, are reused from round to round, and go
// with the object. Those that a killed process left behind are taken up where they are whole:
// begin() keeps the slots that were written for the same key, claim() hands them out, and what
// nobody claims is free. A slot's bytes are compared with their checksum whenever they are read.
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
#include "format/wire.hpp"

namespace fedcore {

class Spill {
 public:
  using Slot = std::uint32_t;
  // What the chunks are of, beside the sets: a digest of all that their bytes depend on.
  using Key = std::array<std::uint8_t, 64>;
  // Chunks of one set: index and slot.
  using Chunks = std::vector<std::pair<std::uint64_t, Slot>>;
  static constexpr std::uint64_t kExtentBytes = 64u << 20;  // what the file grows by

  // `keep_free`: bytes of the device that are left to others; the file does not grow into them.
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

  // Writes up to slot_bytes() to a free slot; nothing where there is no room, for which problem()
  // then gives the reason.
  std::optional<Slot> put(const wire::SetId& set, std::uint64_t chunk, const std::uint8_t* data,
                          std::uint64_t size);
  // The bytes of a slot; null where they are not those that were put there.
  const std::uint8_t* at(Slot slot, std::uint64_t size);
  void drop_pages(Slot slot) noexcept;
  void free(Slot slot) noexcept;

  std::string problem() const;
  // Slots taken, and the bytes of the file.
  std::uint64_t used() const;
  std::uint64_t file_bytes() const;

 private:
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
  std::vector<std::uint32_t> crcs_;  // of the slots that are taken
  std::vector<Slot> free_;
  Slot slots_ = 0;
  std::string problem_;
};

}  // namespace fedcore
