// Spill: one file of equal slots for chunks that came before they can be reduced.
//
// Owns the file and which slots are taken. The file is made with the first chunk, grows by
// preallocated extents, is reused from round to round, and goes with the object; one that a killed
// process left behind is removed and never read. A put() that finds no room changes nothing. What
// is written does not become resident in this process; at() makes a slot resident until drop_pages.
// Thread-safe, but for at(): its pointer is valid until the next put().
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "mapped_file.hpp"

namespace fedcore {

class Spill {
 public:
  using Slot = std::uint32_t;
  static constexpr std::uint64_t kExtentBytes = 64u << 20;  // what the file grows by

  // `keep_free`: bytes of the device that are left to others; the file does not grow into them.
  // Throws Error{kStorage} if a leftover at `path` can't be removed.
  Spill(std::string path, std::uint64_t slot_bytes, std::uint64_t keep_free,
        std::uint64_t extent_bytes = kExtentBytes);
  ~Spill();
  Spill(const Spill&) = delete;
  Spill& operator=(const Spill&) = delete;

  std::uint64_t slot_bytes() const noexcept { return slot_bytes_; }

  // Writes up to slot_bytes() to a free slot; nothing where there is no room, for which problem()
  // then gives the reason.
  std::optional<Slot> put(const std::uint8_t* data, std::uint64_t size);
  const std::uint8_t* at(Slot slot, std::uint64_t size);
  void drop_pages(Slot slot) noexcept;
  void free(Slot slot) noexcept;

  std::string problem() const;
  // Slots taken, and the bytes of the file.
  std::uint64_t used() const;
  std::uint64_t file_bytes() const;

 private:
  bool grow();

  const std::string path_;
  const std::uint64_t slot_bytes_;
  const std::uint64_t keep_free_;
  const std::uint64_t extent_bytes_;
  mutable std::mutex mutex_;
  std::shared_ptr<MappedFile> file_;
  std::vector<Slot> free_;
  Slot slots_ = 0;
  std::string problem_;
};

}  // namespace fedcore
