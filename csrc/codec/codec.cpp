#include "codec/codec.hpp"

#include <array>
#include <cstring>
#include <string>
#include <utility>

#include "base/error.hpp"
#include "codec/element.hpp"
#include "codec/run_reader.hpp"
#include "format/wire.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

constexpr std::array<std::string_view, 6> kEncodings{"raw", "bf16", "fp16", "int8", "nf4", "top-k"};

}  // namespace

std::string undecodable(std::uint64_t index, const char* why) {
  return "chunk " + std::to_string(index) + " can't be decoded: " + why;
}

Encoding parse_encoding(std::string_view name) {
  std::string known;
  for (std::size_t i = 0; i < kEncodings.size(); ++i) {
    if (kEncodings[i] == name) {
      return static_cast<Encoding>(i);
    }
    known += (known.empty() ? "" : ", ") + std::string(kEncodings[i]);
  }
  throw Error(Errc::kConfig,
              "there is no encoding '" + std::string(name) + "'; expected one of " + known);
}

Codec::Codec(std::shared_ptr<const Layout> layout, CodecOptions options, Lz4 lz4)
    : layout_(std::move(layout)), options_(std::move(options)), lz4_(lz4) {
  if (layout_->chunk_bytes() > wire::kMaxChunkBytes) {
    throw Error(Errc::kLayout, "chunks of " + std::to_string(layout_->chunk_bytes()) +
                                   " bytes can't be encoded; at most " +
                                   std::to_string(wire::kMaxChunkBytes));
  }
  if (!(options_.top_k > 0 && options_.top_k <= 1)) {
    throw Error(Errc::kConfig,
                "top_k is " + std::to_string(options_.top_k) + ": expected above 0, at most 1");
  }
  if (options_.lossless && (lz4.compress == nullptr || lz4.decompress == nullptr)) {
    throw Error(Errc::kConfig, "lossless packing needs LZ4");
  }
}
// Finds the segments of an unpacked body. With `plain` it checks what they hold; without, their
// lengths alone, which are fixed then, for top-k is never packed.
const char* Codec::plan(Encoding encoding, const Range& range, const std::uint8_t* plain,
                        std::size_t size) {
  segments_.clear();
  std::size_t at = 0;
  for (const Run& run : layout_->runs(range)) {
    const bool encoded = encodes(encoding, run.dtype);
    const std::size_t count = run.nbytes / item_size(run.dtype);
    std::size_t used = encoded ? quantise::encoded_bytes(encoding, count) : run.nbytes;
    if (size - at < used) {
      return "it is too short";
    }
    if (encoded && plain != nullptr) {
      if (const char* why = quantise::check(encoding, plain + at, size - at, count, used)) {
        return why;
      }
    }
    segments_.push_back({run, encoded, at, used});
    at += used;
  }
  return at == size ? nullptr : "it is too long";
}

const char* Codec::check(std::uint64_t index, std::uint8_t encoding_byte, const std::uint8_t* body,
                         std::size_t size, Body& checked) {
  const Range range = layout_->chunk_range(index);
  const bool packed = (encoding_byte & wire::kPacked) != 0;
  const auto encoding = static_cast<Encoding>(encoding_byte & ~wire::kPacked);
  if ((encoding != Encoding::kRaw && encoding != options_.encoding) ||
      (packed && !options_.lossless) || (packed && encoding == Encoding::kTopK)) {
    return "its encoding was not agreed on";
  }
  if (size > range.nbytes) {
    return "it is too long";
  }
  checked = {body, size, encoding};
  if (packed) {
    if (const char* why = unpack(encoding, range, body, size)) {
      return why;
    }
    checked = {plain_.data(), plain_.size(), encoding};
  }
  return plan(encoding, range, checked.data, checked.size);
}

const char* Codec::decode(std::uint64_t index, std::uint8_t encoding_byte, const std::uint8_t* body,
                          std::size_t size, const std::uint8_t* base, std::uint8_t* out) {
  Body checked;
  if (const char* why = check(index, encoding_byte, body, size, checked)) {
    return why;
  }
  decode(index, checked, base, out);
  return nullptr;
}

void Codec::decode(std::uint64_t index, const Body& checked, const std::uint8_t* base,
                   std::uint8_t* out) const {
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* body = checked.data;
  for (const Run& run : layout_->runs(range)) {
    const std::size_t at = run.offset - range.offset;
    const std::size_t used = run_bytes(checked.encoding, run, body);
    if (!encodes(checked.encoding, run.dtype)) {
      std::memcpy(out + at, body, used);
    } else {
      const std::size_t width = item_size(run.dtype), count = run.nbytes / width;
      RunReader reader(checked.encoding, run.dtype, body, count);
      for (std::size_t first = 0; first < count; first += RunReader::kTile) {
        const std::size_t from = at + first * width;
        reader.next(base != nullptr ? base + from : nullptr, out + from,
                    std::min(RunReader::kTile, count - first));
      }
    }
    body += used;
  }
}

void Codec::carry(std::uint64_t index, const std::uint8_t* values, const std::uint8_t* residual,
                  const std::uint8_t* decoded, std::uint8_t* out) const {
  const Range range = layout_->chunk_range(index);
  for (const Run& run : layout_->runs(range)) {
    const std::size_t at = run.offset - range.offset;
    if (is_float(run.dtype)) {
      kernels::carry(run.dtype, values + at, at_offset(residual, at), decoded + at, out + at,
                     count_of(run));
    } else {
      std::memset(out + at, 0, run.nbytes);
    }
  }
}

}  // namespace fedcore
