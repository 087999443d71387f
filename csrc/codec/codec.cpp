#include "codec/codec.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "base/copy.hpp"
#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "codec/element.hpp"
#include "codec/run_reader.hpp"
#include "format/wire.hpp"
#include "kernels/kernels.hpp"

namespace fedcore {
namespace {

constexpr std::size_t kSample = 64 << 10;
constexpr float kLargest = std::numeric_limits<float>::max();

constexpr std::array<std::string_view, 6> kEncodings{"raw", "bf16", "fp16", "int8", "nf4", "top-k"};

// Bytes of width w: all first bytes, then all second ones, and so on; a rest that fills no element
// stays at the end.
void shuffle(const std::uint8_t* from, std::size_t size, std::size_t width, std::uint8_t* to) {
  const std::size_t count = size / width;
  for (std::size_t b = 0; b < width; ++b) {
    for (std::size_t i = 0; i < count; ++i) {
      to[b * count + i] = from[i * width + b];
    }
  }
  std::memcpy(to + width * count, from + width * count, size - width * count);
}

void unshuffle(const std::uint8_t* from, std::size_t size, std::size_t width, std::uint8_t* to) {
  const std::size_t count = size / width;
  for (std::size_t b = 0; b < width; ++b) {
    for (std::size_t i = 0; i < count; ++i) {
      to[i * width + b] = from[b * count + i];
    }
  }
  std::memcpy(to + width * count, from + width * count, size - width * count);
}

std::size_t shuffle_width(Encoding encoding, bool encoded, Dtype dtype) noexcept {
  if (!encoded) {
    return item_size(dtype);
  }
  return encoding == Encoding::kBf16 || encoding == Encoding::kF16 ? 2 : 1;
}

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

namespace {

std::size_t count_of(const Run& run) noexcept { return run.nbytes / item_size(run.dtype); }

const std::uint8_t* moved(const std::uint8_t* from, std::size_t bytes) noexcept {
  return from != nullptr ? from + bytes : nullptr;
}

}  // namespace

// Fills floats_ with what `n` elements of the run stand for, rounded to binary32 and limited to its
// finite numbers.
void Codec::load(const Chunk& chunk, const Run& run, std::size_t first, std::size_t n) {
  const std::size_t width = item_size(run.dtype);
  const std::size_t at = run.offset - chunk.range.offset + first * width;
  floats_.resize(std::max(floats_.size(), n));
  if (kernels::subtract(run.dtype, chunk.values + at, moved(chunk.base, at),
                        moved(chunk.residual, at), floats_.data(), n)) {
    return apply_stages(run, first, n);
  }
  const std::int64_t bad = kernels::find_non_finite(run.dtype, chunk.values + at, n * width);
  for (std::size_t i = 0; i < n; ++i) {
    if (static_cast<std::int64_t>(i) == bad || std::isnan(floats_[i])) {
      fail_at(run, first + i);
    }
    floats_[i] = std::min(std::max(floats_[i], -kLargest), kLargest);
  }
  apply_stages(run, first, n);
}

void Codec::fail_at(const Run& run, std::size_t element) const {
  const Location where = layout_->locate(run.offset + element * item_size(run.dtype));
  throw Error(Errc::kNonFinite, "NaN or infinity in tensor '" + std::string(where.tensor) +
                                    "', element " + std::to_string(where.element));
}

// Applies the stages to floats_, which hold `n` elements of the run.
void Codec::apply_stages(const Run& run, std::size_t first, std::size_t n) {
  if (options_.stages.empty()) {
    return;
  }
  const std::size_t width = item_size(run.dtype);
  for (const auto& stage : options_.stages) {
    stage->apply({run.dtype, run.offset + first * width, n * width}, floats_.data());
  }
  const std::int64_t bad = kernels::find_non_finite(Dtype::kF32, floats_.data(), n * 4);
  if (bad >= 0) {
    fail_at(run, first + static_cast<std::size_t>(bad));
  }
}

// Writes what is lost of the elements that decoded_ holds; floats_ hold them, from entry `from` on,
// as the last stage gave them.
void Codec::carry_piece(const Chunk& chunk, const Run& run, std::size_t first, std::size_t n,
                        std::size_t from) {
  const std::size_t width = item_size(run.dtype);
  const std::size_t at = run.offset - chunk.range.offset + first * width;
  if (options_.stages.empty()) {
    kernels::carry(run.dtype, chunk.values + at, moved(chunk.residual, at), decoded_.data(),
                   decoded_.data(), n);
  } else {
    const std::uint8_t* const base = moved(chunk.base, at);
    with_float(run.dtype, [&]<typename T>(T, double limit) {
      for (std::size_t i = 0; i < n; ++i) {
        const double under = base != nullptr ? T::read(base, i) : 0.0;
        const double difference = floats_[from + i];
        T::write(decoded_.data(), i, (under - T::read(decoded_.data(), i)) + difference, limit);
      }
    });
  }
  chunk.lost->checksum = crc32c(decoded_.data(), n * width, chunk.lost->checksum);
  stream_copy(chunk.lost->to + at, decoded_.data(), n * width);
}

// Writes what the encoding lost of `n` elements, the next ones that the reader gives: a piece at a
// time, past the cache, as nobody reads it soon.
void Codec::lose(const Chunk& chunk, const Run& run, RunReader& reader, std::size_t first,
                 std::size_t n) {
  const std::size_t width = item_size(run.dtype);
  decoded_.resize(quantise::kPiece * width);
  for (std::size_t done = 0; done < n; done += quantise::kPiece) {
    const std::size_t piece = std::min(quantise::kPiece, n - done);
    const std::size_t at = run.offset - chunk.range.offset + (first + done) * width;
    for (std::size_t from = 0; from < piece; from += RunReader::kTile) {
      reader.next(moved(chunk.base, at + from * width), decoded_.data() + from * width,
                  std::min(RunReader::kTile, piece - from));
    }
    carry_piece(chunk, run, first + done, piece, done);
  }
}

// Encodes a run, whose body begins at `start`: piece by piece, while the piece is in the cache.
void Codec::encode_run(const Chunk& chunk, Encoding encoding, const Run& run,
                       std::vector<std::uint8_t>& body, std::size_t start) {
  const std::size_t count = count_of(run);
  if (encoding == Encoding::kTopK) {
    load(chunk, run, 0, count);
    const double share = std::ceil(options_.top_k * static_cast<double>(count));
    const std::size_t keep = std::min(count, static_cast<std::size_t>(share));
    quantise::encode(encoding, floats_.data(), count, keep, body);
    if (chunk.lost != nullptr) {
      RunReader reader(encoding, run.dtype, body.data() + start, count);
      lose(chunk, run, reader, 0, count);
    }
    return;
  }
  body.resize(std::max(body.size(), start + quantise::encoded_bytes(encoding, count)));
  RunReader reader(encoding, run.dtype, body.data() + start, count);
  for (std::size_t first = 0; first < count; first += quantise::kPiece) {
    const std::size_t n = std::min(quantise::kPiece, count - first);
    load(chunk, run, first, n);
    quantise::encode_piece(encoding, floats_.data(), first, n, count, body.data() + start);
    if (chunk.lost != nullptr) {
      lose(chunk, run, reader, first, n);
    }
  }
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
  const std::uint8_t* const residual = moved(chunk.residual, at);
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
  decoded_.resize(quantise::kPiece * width);
  for (std::size_t first = 0; first < count; first += quantise::kPiece) {
    const std::size_t n = std::min(quantise::kPiece, count - first);
    const std::size_t at = run.offset - chunk.range.offset + first * width;
    load(chunk, run, first, n);
    kernels::add(run.dtype, moved(chunk.base, at), floats_.data(), body + first * width, n);
    if (chunk.lost != nullptr) {
      std::memcpy(decoded_.data(), body + first * width, n * width);
      carry_piece(chunk, run, first, n, 0);
    }
  }
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
    } else {
      encode_run(chunk, encoding, run, body, start);
      size = encoding == Encoding::kTopK ? body.size() - start
                                         : quantise::encoded_bytes(encoding, count_of(run));
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
      load(chunk, run, 0, count_of(run));
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

// Shuffles and compresses `plain`, whose segments are at hand, if that saves 5 % of a sample from
// its middle and of the whole.
bool Codec::pack(Encoding encoding, const std::vector<std::uint8_t>& plain,
                 std::vector<std::uint8_t>& body) {
  shuffled_.resize(plain.size());
  const auto try_it = [&](std::size_t size) {
    const auto capacity = static_cast<int>(size - size / 20);
    body.resize(static_cast<std::size_t>(capacity));
    const int packed =
        lz4_.compress(reinterpret_cast<const char*>(shuffled_.data()),
                      reinterpret_cast<char*>(body.data()), static_cast<int>(size), capacity);
    body.resize(static_cast<std::size_t>(std::max(packed, 0)));
    return packed > 0 && packed <= capacity;
  };
  if (plain.size() > kSample) {
    const Segment* middle = &segments_.front();
    for (const Segment& segment : segments_) {
      middle = segment.offset <= plain.size() / 2 ? &segment : middle;
    }
    const std::size_t width = shuffle_width(encoding, middle->encoded, middle->run.dtype);
    const std::size_t size = std::min(kSample, middle->size);
    const std::size_t skipped = (middle->size - size) / 2 / width * width;
    shuffle(plain.data() + middle->offset + skipped, size, width, shuffled_.data());
    if (!try_it(size)) {
      return false;
    }
  }
  for (const Segment& s : segments_) {
    shuffle(plain.data() + s.offset, s.size, shuffle_width(encoding, s.encoded, s.run.dtype),
            shuffled_.data() + s.offset);
  }
  return try_it(plain.size());
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

// Fills plain_ from a packed body.
const char* Codec::unpack(Encoding encoding, const Range& range, const std::uint8_t* body,
                          std::size_t size) {
  std::size_t expected = 0;
  for (const Run& run : layout_->runs(range)) {
    const std::size_t count = run.nbytes / item_size(run.dtype);
    expected +=
        encodes(encoding, run.dtype) ? quantise::encoded_bytes(encoding, count) : run.nbytes;
  }
  if (expected > range.nbytes) {
    return "it would have been sent raw";
  }
  plan(encoding, range, nullptr, expected);
  shuffled_.resize(expected);
  plain_.resize(expected);
  const int got = lz4_.decompress(reinterpret_cast<const char*>(body),
                                  reinterpret_cast<char*>(shuffled_.data()), static_cast<int>(size),
                                  static_cast<int>(expected));
  if (got < 0 || static_cast<std::size_t>(got) != expected) {
    return "it can't be unpacked to its chunk's length";
  }
  for (const Segment& s : segments_) {
    unshuffle(shuffled_.data() + s.offset, s.size, shuffle_width(encoding, s.encoded, s.run.dtype),
              plain_.data() + s.offset);
  }
  return nullptr;
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
      kernels::carry(run.dtype, values + at, moved(residual, at), decoded + at, out + at,
                     count_of(run));
    } else {
      std::memset(out + at, 0, run.nbytes);
    }
  }
}

}  // namespace fedcore
