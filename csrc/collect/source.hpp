// Source: one published set that a collection pulls, and the frames in which it comes.
//
// Plain values; what they point at is shared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/mapped_file.hpp"
#include "codec/codec.hpp"
#include "format/layout.hpp"
#include "format/wire.hpp"

namespace fedcore {

// A received body. Whoever holds the frame owns the message; it is released exactly once.
class Frame {
 public:
  using Release = void (*)(void*);
  Frame() = default;
  Frame(const void* data, std::size_t size, void* owner, Release release) noexcept
      : data_(static_cast<const std::uint8_t*>(data)),
        size_(size),
        owner_(owner),
        release_(release) {}
  Frame(Frame&& other) noexcept { swap(other); }
  Frame& operator=(Frame&& other) noexcept {
    Frame(std::move(other)).swap(*this);
    return *this;
  }
  ~Frame() {
    if (release_ != nullptr) {
      release_(owner_);
    }
  }

  const std::uint8_t* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  explicit operator bool() const noexcept { return release_ != nullptr; }

  // A frame of its own with these bytes.
  static Frame copy(const void* data, std::size_t size) {
    auto memory = std::make_unique_for_overwrite<std::uint8_t[]>(size);
    std::memcpy(memory.get(), data, size);
    std::uint8_t* const bytes = memory.release();
    return {bytes, size, bytes, [](void* owner) { delete[] static_cast<std::uint8_t*>(owner); }};
  }

  // Leaves the message to whoever else owns it.
  void disown() noexcept { release_ = nullptr; }

 private:
  void swap(Frame& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(owner_, other.owner_);
    std::swap(release_, other.release_);
  }
  const std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
  void* owner_ = nullptr;
  Release release_ = nullptr;
};

// Where bytes lie in a file.
struct Place {
  std::shared_ptr<MappedFile> file;
  std::uint64_t offset = 0;
};

// The version that an update is a difference to, in the layout of its source.
struct Base {
  std::uint64_t version = 0;
  Place place;
  std::vector<std::uint32_t> crcs;  // CRC-32C of each chunk; empty: it is not checked
};

struct Source {
  std::string peer;
  wire::SetId set;
  double weight = 1;  // the effective one: as check_weights() takes it
  // What differs from the collection's. Only a rule with views takes these: a layout, whose chunks
  // have the output's size; a base; the codec for its encoding, which is the source's alone.
  std::shared_ptr<const Layout> layout = nullptr;
  Base base = {};
  std::shared_ptr<Codec> codec = nullptr;
  // What the digests of its chunks were in a survey, by index; empty: it was in none.
  std::vector<std::uint64_t> digests = {};
};

}  // namespace fedcore
