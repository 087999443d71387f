// Packer: a published set's chunks, compressed the first time each of them is asked for.
//
// Owns the compressed bodies' places in a file; the chunks themselves are its caller's. What get()
// answers for a chunk stays as it is, so that all who ask get the same bytes. Where nothing saves
// 5 % it costs next to nothing: each chunk is judged by a sample (see Codec), and after kProbes
// chunks in vain only one in kProbes is still looked at. A full disk ends the compressing and
// nothing else. Not thread-safe: the Publisher's owner holds the lock. Cost: one pass of shuffle
// and LZ4 per chunk that is compressed, once for all who ask.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "base/mapped_file.hpp"
#include "codec/codec.hpp"

namespace fedcore {

class Packer {
 public:
  static constexpr std::uint64_t kProbes = 16;

  struct Chunk {
    std::uint64_t offset;
    std::uint32_t size;
    std::uint32_t crc;
    std::uint8_t encoding_byte;
  };

  // `file`: at least as large as the set, for this object alone.
  // Throws Error{kConfig} for a codec that would not be lossless.
  Packer(std::shared_ptr<Codec> codec, std::shared_ptr<MappedFile> file);

  const Layout& layout() const noexcept { return codec_->layout(); }
  const std::shared_ptr<MappedFile>& file() const noexcept { return file_; }

  bool knows(std::uint64_t index) const noexcept {
    return states_[static_cast<std::size_t>(index)] != State::kUnknown;
  }

  // Where chunk `index`, whose flat bytes are at `data`, lies compressed; nothing: it travels raw.
  std::optional<Chunk> get(std::uint64_t index, const std::uint8_t* data);

 private:
  enum class State : std::uint8_t { kUnknown, kRaw, kPacked };
  std::optional<Chunk> pack(std::uint64_t index, const std::uint8_t* data);

  std::shared_ptr<Codec> codec_;
  std::shared_ptr<MappedFile> file_;
  std::vector<State> states_;
  std::vector<Chunk> chunks_;
  std::vector<std::uint8_t> body_;
  std::uint64_t end_ = 0;     // of what is in the file
  std::uint64_t failed_ = 0;  // chunks tried in vain before the first that was worth it
  bool full_ = false;
};

}  // namespace fedcore
