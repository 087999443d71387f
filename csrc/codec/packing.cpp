// Packed bodies: bytes shuffled so that like ones are neighbours, then compressed by LZ4.
#include <algorithm>
#include <cstring>

#include "codec/codec.hpp"
#include "codec/element.hpp"

namespace fedcore {
namespace {

constexpr std::size_t kSample = 64 << 10;

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

// Shuffles and compresses `plain`, whose segments were found, if that saves 5 % of a sample from
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

}  // namespace fedcore
