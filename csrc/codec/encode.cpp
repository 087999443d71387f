// Codec::encode(): a chunk's differences, through the stages, as the bytes that travel, and what that lost.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "base/copy.hpp"
#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "codec/codec.hpp"
#include "codec/element.hpp"
#include "codec/run_reader.hpp"
#include "codec/stage.hpp"
#include "format/wire.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
// Values that go through all steps together. They stay in the first level of the cache, and memory is
// read again before it has nothing to do.
constexpr std::size_t kTile = 256;
constexpr std::size_t kLostTiles = 16;  // that share a call for the checksum of what was lost

}  // namespace

// Writes what `n` elements of the run stand for, after the stages, to `floats`: rounded to binary32 and
// limited to its finite numbers.
void Codec::load(const Chunk& chunk, const Run& run, std::size_t first, std::size_t n,
                 float* floats) {
  const std::size_t width = item_size(run.dtype);
  const std::size_t at = run.offset - chunk.range.offset + first * width;
  if (!kernels::subtract(run.dtype, chunk.values + at, at_offset(chunk.base, at),
                         at_offset(chunk.residual, at), floats, n)) {
    const std::int64_t bad = kernels::find_non_finite(run.dtype, chunk.values + at, n * width);
    for (std::size_t i = 0; i < n; ++i) {
      if (static_cast<std::int64_t>(i) == bad || std::isnan(floats[i])) {
        fail_at(run, first + i);
      }
      floats[i] = std::min(std::max(floats[i], -kLargest), kLargest);
    }
  }
  if (!options_.stages.empty()) {
    apply_stages(run, first, n, floats);
  }
}

// Room for so many floats, all of which are the caller's until the next call.
float* Codec::room_for(std::size_t count) {
  floats_.resize(std::max(floats_.size(), count));
  return floats_.data();
}

void Codec::fail_at(const Run& run, std::size_t element) const {
  const Location where = layout_->locate(run.offset + element * item_size(run.dtype));
  throw Error(Errc::kNonFinite, "NaN or infinity in tensor '" + std::string(where.tensor) +
                                    "', element " + std::to_string(where.element));
}

// Applies the stages to `n` elements of the run.
void Codec::apply_stages(const Run& run, std::size_t first, std::size_t n, float* floats) {
  const std::size_t width = item_size(run.dtype);
  for (const auto& stage : options_.stages) {
    if (stage->asks_first()) {
      throw Error(Errc::kConfig, "a stage needs the whole update, and got one chunk of it");
    }
    stage->apply({run.dtype, run.offset + first * width, n * width}, floats);
  }
  const std::int64_t bad = kernels::find_non_finite(Dtype::kF32, floats, n * 4);
  if (bad >= 0) {
    fail_at(run, first + static_cast<std::size_t>(bad));
  }
}

Codec Codec::with_stages(std::vector<std::shared_ptr<const Stage>> stages) const {
  CodecOptions options = options_;
  options.stages = std::move(stages);
  return {layout_, std::move(options), lz4_};
}

void Codec::differences(std::uint64_t index, const std::uint8_t* values, const std::uint8_t* base,
                        const std::uint8_t* residual,
                        const std::function<void(const Run& part, const float* differences)>& use) {
  const Chunk chunk{layout_->chunk_range(index), values, base, residual, nullptr};
  float* const differences = room_for(quantise::kPiece);
  for (const Run& run : layout_->runs(chunk.range)) {
    if (!is_float(run.dtype)) {
      continue;
    }
    const std::size_t width = item_size(run.dtype), count = count_of(run);
    for (std::size_t first = 0; first < count; first += quantise::kPiece) {
      const std::size_t n = std::min(quantise::kPiece, count - first);
      load(chunk, run, first, n, differences);
      use({run.dtype, run.offset + first * width, n * width}, differences);
    }
  }
}

// Makes of the `n` decoded elements at `decoded` what is lost of them, and writes that past the cache,
// as nobody reads it soon; `floats` are the elements as the last stage gave them.
void Codec::carry_tile(const Chunk& chunk, const Run& run, std::size_t first, std::size_t n,
                       const float* floats, std::uint8_t* decoded) {
  const std::size_t width = item_size(run.dtype);
  const std::size_t at = run.offset - chunk.range.offset + first * width;
  if (options_.stages.empty()) {
    kernels::carry(run.dtype, chunk.values + at, at_offset(chunk.residual, at), decoded, decoded,
                   n);
  } else {
    const std::uint8_t* const base = at_offset(chunk.base, at);
    with_float(run.dtype, [&]<typename T>(T, double limit) {
      for (std::size_t i = 0; i < n; ++i) {
        const double under = base != nullptr ? T::read(base, i) : 0.0;
        const double difference = floats[i];
        T::write(decoded, i, (under - T::read(decoded, i)) + difference, limit);
      }
    });
  }
  stream_lines(chunk.lost->to + at, decoded, n * width);
}

// Writes what the encoding lost of `n` elements, the next ones that the reader gives.
void Codec::lose(const Chunk& chunk, const Run& run, RunReader& reader, std::size_t first,
                 std::size_t n, const float* floats) {
  const std::size_t width = item_size(run.dtype);
  decoded_.resize(std::max(decoded_.size(), kLostTiles * kTile * width));
  for (std::size_t done = 0; done < n; done += kTile) {
    const std::size_t tile = std::min(kTile, n - done), place = first + done;
    std::uint8_t* const to = decoded_.data() + place / kTile % kLostTiles * kTile * width;
    const std::size_t at = run.offset - chunk.range.offset + place * width;
    reader.next(at_offset(chunk.base, at), to, tile);
    carry_tile(chunk, run, place, tile, floats + done, to);
    if (to == decoded_.data() + (kLostTiles - 1) * kTile * width || place + tile == count_of(run)) {
      const auto used = static_cast<std::size_t>(to - decoded_.data()) + tile * width;
      chunk.lost->checksum = crc32c(decoded_.data(), used, chunk.lost->checksum);
    }
  }
}

void Codec::encode_top_k(const Chunk& chunk, const Run& run, std::vector<std::uint8_t>& body,
                         std::size_t start) {
  const std::size_t count = count_of(run);
  float* const values = room_for(count);
  load(chunk, run, 0, count, values);
  const double share = std::ceil(options_.top_k * static_cast<double>(count));
  const std::size_t keep = std::min(count, static_cast<std::size_t>(share));
  quantise::encode(Encoding::kTopK, values, count, keep, body);
  if (chunk.lost != nullptr) {
    RunReader reader(Encoding::kTopK, run.dtype, body.data() + start, count);
    lose(chunk, run, reader, 0, count, values);
    stream_end();
  }
}

// Encodes a run, whose body begins at `start`, tile by tile: what is read from memory for one piece is
// used while it is in the cache, and meanwhile the tiles of the next piece are read.
void Codec::encode_run(const Chunk& chunk, Encoding encoding, const Run& run,
                       std::vector<std::uint8_t>& body, std::size_t start) {
  const std::size_t count = count_of(run);
  body.resize(std::max(body.size(), start + quantise::encoded_bytes(encoding, count)));
  std::uint8_t* const to = body.data() + start;
  RunReader reader(encoding, run.dtype, to, count);
  const std::size_t piece = encoding == Encoding::kNf4 ? quantise::kPiece : kTile;
  float* current = room_for(2 * piece);
  float* next = current + piece;
  quantise::Magnitudes largest;
  const auto load_tile = [&](std::size_t first, std::size_t done, float* floats) {
    if (first < count && done < std::min(piece, count - first)) {
      const std::size_t n = std::min(kTile, count - first - done);
      load(chunk, run, first + done, n, floats + done);
      quantise::look_at(encoding, floats + done, n, largest.data() + done / quantise::kNf4Block);
    }
  };
  for (std::size_t done = 0; done < piece; done += kTile) {
    load_tile(0, done, current);
  }
  for (std::size_t first = 0; first < count; first += piece) {
    const std::size_t n = std::min(piece, count - first);
    quantise::encode_scales(encoding, largest.data(), first, n, count, to);
    for (std::size_t done = 0; done < n; done += kTile) {
      load_tile(first + piece, done, next);
      const std::size_t tile = std::min(kTile, n - done);
      quantise::encode_piece(encoding, current + done, first + done, tile, count, to);
      if (chunk.lost != nullptr) {
        lose(chunk, run, reader, first + done, tile, current + done);
      }
    }
    std::swap(current, next);
  }
  stream_end();
}

// A run that travels as it is, with the residual where it holds floats.
void Codec::copy_run(const Chunk& chunk, const Run& run, std::uint8_t* body) {
  if (is_float(run.dtype) && !options_.stages.empty()) {
    return copy_staged(chunk, run, body);
  }
  const std::size_t at = run.offset - chunk.range.offset;
  std::memcpy(body, chunk.values + at, run.nbytes);
  if (!is_float(run.dtype)) {
    if (chunk.lost != nullptr) {
      std::memset(chunk.lost->to + at, 0, run.nbytes);
      chunk.lost->checksum = crc32c(chunk.lost->to + at, run.nbytes, chunk.lost->checksum);
    }
    return;
  }
  const std::uint8_t* const residual = at_offset(chunk.residual, at);
  if (residual != nullptr) {
    with_float(run.dtype, [&]<typename T>(T, double limit) {
      for (std::size_t i = 0; i < count_of(run); ++i) {
        const double value = T::read(chunk.values + at, i), rest = T::read(residual, i);
        if (rest != 0 && !arith::non_finite(value)) {  // -0.0 + 0.0 is another value
          T::write(body, i, value + rest, limit);
        }
      }
    });
  }
  if (chunk.lost != nullptr) {
    std::uint8_t* const to = chunk.lost->to + at;
    kernels::carry(run.dtype, chunk.values + at, residual, body, to, count_of(run));
    chunk.lost->checksum = crc32c(to, run.nbytes, chunk.lost->checksum);
  }
}

// A run that travels raw after stages: base + what they give.
void Codec::copy_staged(const Chunk& chunk, const Run& run, std::uint8_t* body) {
  const std::size_t width = item_size(run.dtype), count = count_of(run);
  float* const differences = room_for(quantise::kPiece);
  decoded_.resize(std::max(decoded_.size(), quantise::kPiece * width));
  for (std::size_t first = 0; first < count; first += quantise::kPiece) {
    const std::size_t n = std::min(quantise::kPiece, count - first);
    const std::size_t at = run.offset - chunk.range.offset + first * width;
    load(chunk, run, first, n, differences);
    kernels::add(run.dtype, at_offset(chunk.base, at), differences, body + first * width, n);
    if (chunk.lost != nullptr) {
      std::memcpy(decoded_.data(), body + first * width, n * width);
      carry_tile(chunk, run, first, n, differences, decoded_.data());
      chunk.lost->checksum = crc32c(decoded_.data(), n * width, chunk.lost->checksum);
    }
  }
  stream_end();
}

void Codec::encode_runs(const Chunk& chunk, Encoding encoding, std::vector<std::uint8_t>& body) {
  segments_.clear();
  std::size_t start = 0;
  if (chunk.lost != nullptr) {
    chunk.lost->checksum = 0;
  }
  if (encoding == Encoding::kTopK) {
    body.clear();  // encode() appends to it
  }
  for (const Run& run : layout_->runs(chunk.range)) {
    const bool encoded = encodes(encoding, run.dtype);
    std::size_t size = run.nbytes;
    if (!encoded) {
      body.resize(std::max(body.size(), start + run.nbytes));
      copy_run(chunk, run, body.data() + start);
    } else if (encoding == Encoding::kTopK) {
      encode_top_k(chunk, run, body, start);
      size = body.size() - start;
    } else {
      encode_run(chunk, encoding, run, body, start);
      size = quantise::encoded_bytes(encoding, count_of(run));
    }
    segments_.push_back({run, encoded, start, size});
    start += size;
  }
  body.resize(start);
}

// What would be encoded is finite, although the chunk travels raw.
void Codec::check_finite(const Chunk& chunk) {
  for (const Run& run : layout_->runs(chunk.range)) {
    if (encodes(options_.encoding, run.dtype)) {
      load(chunk, run, 0, count_of(run), room_for(count_of(run)));
    }
  }
}

// The encoding of a chunk whose length does not depend on its values: raw if its own saves nothing.
Encoding Codec::shorter(const Range& range) const {
  const Encoding encoding = options_.encoding;
  std::size_t size = 0;
  bool any = false;
  for (const Run& run : layout_->runs(range)) {
    const bool encoded = encodes(encoding, run.dtype);
    size += encoded ? quantise::encoded_bytes(encoding, count_of(run)) : run.nbytes;
    any |= encoded;
  }
  return any && size < range.nbytes ? encoding : Encoding::kRaw;  // of top-k it is the least size
}
std::uint8_t Codec::encode(std::uint64_t index, const std::uint8_t* values,
                           const std::uint8_t* base, const std::uint8_t* residual,
                           std::vector<std::uint8_t>& body, Lost* lost) {
  const Chunk chunk{layout_->chunk_range(index), values, base, residual, lost};
  const std::uint8_t encoding_byte = encode_chunk(chunk, body);
  Body checked;
  if (lost != nullptr) {
    if (const char* why = check(index, encoding_byte, body.data(), body.size(), checked)) {
      throw Error(Errc::kProtocol, undecodable(index, why));
    }
  }
  return encoding_byte;
}

std::uint8_t Codec::encode_chunk(const Chunk& chunk, std::vector<std::uint8_t>& body) {
  Encoding encoding = shorter(chunk.range);
  if (encoding == Encoding::kTopK) {
    encode_runs(chunk, encoding, body);
    if (body.size() < chunk.range.nbytes) {
      return static_cast<std::uint8_t>(encoding);
    }
    encoding = Encoding::kRaw;
  } else if (encoding != options_.encoding) {
    check_finite(chunk);
  }
  if (!options_.lossless) {
    encode_runs(chunk, encoding, body);
    return static_cast<std::uint8_t>(encoding);
  }
  encode_runs(chunk, encoding, plain_);
  if (pack(encoding, plain_, body)) {
    return static_cast<std::uint8_t>(static_cast<std::uint8_t>(encoding) | wire::kPacked);
  }
  body.swap(plain_);
  return static_cast<std::uint8_t>(encoding);
}

}  // namespace fedcore
