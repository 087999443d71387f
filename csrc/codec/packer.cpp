#include "codec/packer.hpp"

#include <algorithm>
#include <utility>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "format/wire.hpp"

namespace fedcore {
namespace {

constexpr std::uint64_t kPage = 4096;  // chunks share none, so that each one's can be given back

}  // namespace

Packer::Packer(std::shared_ptr<Codec> codec, std::shared_ptr<MappedFile> file)
    : codec_(std::move(codec)),
      file_(std::move(file)),
      states_(static_cast<std::size_t>(codec_->layout().chunk_count()), State::kUnknown),
      chunks_(states_.size()) {
  if (codec_->options().encoding != Encoding::kRaw || !codec_->options().lossless) {
    throw Error(Errc::kConfig, "a set can be compressed without loss alone");
  }
  file_->check_range(0, codec_->layout().total_bytes());
}

std::optional<Packer::Chunk> Packer::get(std::uint64_t index, const std::uint8_t* data) {
  const auto i = static_cast<std::size_t>(index);
  if (states_[i] == State::kUnknown) {
    const auto packed = pack(index, data);
    states_[i] = packed ? State::kPacked : State::kRaw;
    chunks_[i] = packed.value_or(Chunk{});
  }
  return states_[i] == State::kPacked ? std::optional(chunks_[i]) : std::nullopt;
}

std::optional<Packer::Chunk> Packer::pack(std::uint64_t index, const std::uint8_t* data) {
  const bool in_vain = end_ == 0 && failed_ >= kProbes && index % kProbes != 0;
  if (full_ || in_vain) {
    return std::nullopt;
  }
  const std::uint8_t encoding_byte = codec_->encode(index, data, nullptr, nullptr, body_);
  if ((encoding_byte & wire::kPacked) == 0) {
    ++failed_;
    return std::nullopt;
  }
  if (body_.size() > file_->size() - end_) {
    return std::nullopt;
  }
  try {
    file_->write(end_, body_.data(), body_.size());
  } catch (const Error&) {
    full_ = true;
    return std::nullopt;
  }
  const Chunk chunk{end_, static_cast<std::uint32_t>(body_.size()),
                    crc32c(body_.data(), body_.size()), encoding_byte};
  end_ = std::min((end_ + body_.size() + kPage - 1) / kPage * kPage, file_->size());
  return chunk;
}

}  // namespace fedcore
