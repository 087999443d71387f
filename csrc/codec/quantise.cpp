#include "codec/quantise.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/codes.hpp"
#include "kernels/kernels.hpp"

namespace fedcore::quantise {
namespace {

static_assert(std::endian::native == std::endian::little, "words are copied as they lie in memory");

constexpr std::uint32_t kMagnitude = 0x7FFFFFFF;
constexpr std::uint32_t kInfinity = 0x7F800000;

template <typename T>
T get(const std::uint8_t* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
void put(std::uint8_t* to, T value) noexcept {
  std::memcpy(to, &value, sizeof value);
}

std::size_t over(std::size_t count, std::size_t block) noexcept {
  return (count + block - 1) / block;
}

// The bits of the keep-th largest magnitude, 1 <= keep <= count: first their upper half, then the
// lower one, by counting. `above`: how many magnitudes are larger.
std::uint32_t kth_magnitude(const float* values, std::size_t count, std::size_t keep,
                            std::size_t& above) {
  std::vector<std::uint32_t> counts(1u << 16);
  above = 0;
  std::uint32_t upper = 0;
  for (const unsigned shift : {16u, 0u}) {
    std::fill(counts.begin(), counts.end(), 0u);
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(values[i]) & kMagnitude;
      if (shift == 16 || bits >> 16 == upper) {
        ++counts[(bits >> shift) & 0xFFFF];
      }
    }
    std::uint32_t digit = 0xFFFF;
    while (above + counts[digit] < keep) {
      above += counts[digit--];
    }
    upper = shift == 16 ? digit : upper << 16 | digit;
  }
  return upper;
}

void encode_top_k(const float* values, std::size_t count, std::size_t keep,
                  std::vector<std::uint8_t>& out) {
  std::size_t above = 0;
  const std::uint32_t least = kth_magnitude(values, count, keep, above);
  std::size_t ties = keep - above;  // of those as large as the last one, the first come first
  std::vector<float> kept;
  std::vector<std::uint8_t> gaps;
  std::size_t expected = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(values[i]) & kMagnitude;
    if (bits < least || bits == 0 || (bits == least && ties == 0)) {
      continue;
    }
    ties -= bits == least ? 1u : 0u;
    kept.push_back(values[i]);
    std::size_t gap = i - expected;
    for (; gap >= 0x80; gap >>= 7) {
      gaps.push_back(static_cast<std::uint8_t>(gap | 0x80));
    }
    gaps.push_back(static_cast<std::uint8_t>(gap));
    expected = i + 1;
  }
  const std::size_t at = out.size();
  out.resize(at + 8 + kept.size() * 4);
  put(out.data() + at, static_cast<std::uint32_t>(kept.size()));
  put(out.data() + at + 4, static_cast<std::uint32_t>(gaps.size()));
  if (!kept.empty()) {
    std::memcpy(out.data() + at + 8, kept.data(), kept.size() * 4);
  }
  out.insert(out.end(), gaps.begin(), gaps.end());
}

// Reads one number of 7 bits a byte, lowest first, in its shortest form. Returns false if `end`
// comes first, if it is longer than needed, or if it has more than 32 bits.
bool read_gap(const std::uint8_t*& at, const std::uint8_t* end, std::uint64_t& gap) noexcept {
  gap = 0;
  for (unsigned shift = 0; at != end && shift <= 28; shift += 7) {
    const std::uint8_t byte = *at++;
    gap |= std::uint64_t{byte & 0x7Fu} << shift;
    if ((byte & 0x80) == 0) {
      return (byte != 0 || shift == 0) && gap <= std::numeric_limits<std::uint32_t>::max();
    }
  }
  return false;
}

const char* check_top_k(const std::uint8_t* data, std::size_t size, std::size_t count,
                        std::size_t& used) noexcept {
  const std::uint64_t kept = get<std::uint32_t>(data);
  const std::uint64_t gap_bytes = get<std::uint32_t>(data + 4);
  if (kept > count) {
    return "it keeps more values than there are";
  }
  if (gap_bytes < kept || gap_bytes > 5 * kept) {
    return "the length of its indices is impossible";
  }
  if (size < 8 + 4 * kept + gap_bytes) {
    return "it is too short";
  }
  const std::uint8_t* gaps = data + 8 + 4 * kept;
  const std::uint8_t* const end = gaps + gap_bytes;
  std::uint64_t place = 0;
  for (std::uint64_t i = 0; i < kept; ++i) {
    if ((get<std::uint32_t>(data + 8 + 4 * i) & kInfinity) == kInfinity) {
      return "a value is NaN or infinite";
    }
    std::uint64_t gap;
    if (!read_gap(gaps, end, gap)) {
      return "an index is malformed";
    }
    place += gap;
    if (place >= count) {
      return "an index is out of range";
    }
    ++place;
  }
  if (gaps != end) {
    return "there are more indices than values";
  }
  used = static_cast<std::size_t>(8 + 4 * kept + gap_bytes);
  return nullptr;
}

const char* check_scales(const std::uint8_t* data, std::size_t count, float largest) noexcept {
  const auto limit = std::bit_cast<std::uint32_t>(largest);
  bool sound = true;
  for (std::size_t i = 0; i < count; ++i) {
    sound &= get<std::uint32_t>(data + 4 * i) <= limit;  // the bits of a negative one are larger
  }
  return sound ? nullptr : "a scale is negative, NaN or too large";
}

}  // namespace

std::size_t encoded_bytes(Encoding encoding, std::size_t count) noexcept {
  switch (encoding) {
    case Encoding::kBf16:
    case Encoding::kF16:
      return 2 * count;
    case Encoding::kInt8:
      return 4 * over(count, kInt8Block) + count;
    case Encoding::kNf4: {
      const std::size_t blocks = over(count, kNf4Block);
      return 4 * over(blocks, kNf4Group) + blocks + over(count, 2);
    }
    default:
      return 8;
  }
}

void encode(Encoding encoding, const float* values, std::size_t count, std::size_t keep,
            std::vector<std::uint8_t>& out) {
  if (encoding == Encoding::kTopK) {
    encode_top_k(values, count, keep, out);
    return;
  }
  const std::size_t at = out.size();
  out.resize(at + encoded_bytes(encoding, count));
  Magnitudes largest;
  for (std::size_t first = 0; first < count; first += kPiece) {
    const std::size_t n = std::min(kPiece, count - first);
    look_at(encoding, values + first, n, largest.data());
    encode_scales(encoding, largest.data(), first, n, count, out.data() + at);
    encode_piece(encoding, values + first, first, n, count, out.data() + at);
  }
}

void look_at(Encoding encoding, const float* values, std::size_t n, float* largest) {
  if (encoding == Encoding::kNf4) {
    kernels::active().largest_nf4(values, n, largest);
  }
}

void encode_scales(Encoding encoding, const float* largest, std::size_t first, std::size_t n,
                   std::size_t count, std::uint8_t* run) {
  if (encoding == Encoding::kNf4) {
    std::uint8_t* const minis = run + 4 * over(over(count, kNf4Block), kNf4Group);
    kernels::active().encode_nf4_scales(largest, over(n, kNf4Block), run + first / kPiece * 4,
                                        minis + first / kNf4Block);
  }
}

void encode_piece(Encoding encoding, const float* values, std::size_t first, std::size_t n,
                  std::size_t count, std::uint8_t* run) {
  const kernels::Table& table = kernels::active();
  switch (encoding) {
    case Encoding::kInt8: {
      std::uint8_t* const codes = run + 4 * over(count, kInt8Block);
      return table.encode_int8(values, n, run + first / kInt8Block * 4, codes + first);
    }
    case Encoding::kNf4: {
      const std::size_t blocks = over(count, kNf4Block);
      std::uint8_t* const minis = run + 4 * over(blocks, kNf4Group);
      return table.encode_nf4(values, run, minis, first, n, minis + blocks);
    }
    case Encoding::kBf16:
      return table.encode_bf16(values, n, run + 2 * first);
    default:
      return table.encode_f16(values, n, run + 2 * first);
  }
}

const char* check(Encoding encoding, const std::uint8_t* data, std::size_t size, std::size_t count,
                  std::size_t& used) noexcept {
  used = encoded_bytes(encoding, count);
  if (size < used) {
    return "it is too short";
  }
  if (encoding == Encoding::kTopK) {
    return check_top_k(data, size, count, used);
  }
  if (encoding == Encoding::kInt8) {
    const std::size_t scales = over(count, kInt8Block);
    std::uint8_t found = 0;  // of the codes' own width, so that many are looked at together
    for (std::size_t i = 0; i < count; ++i) {
      found |= static_cast<std::uint8_t>(data[4 * scales + i] == 0x80 ? 1 : 0);
    }
    if (found != 0) {
      return "a code is -128";
    }
    return check_scales(data, scales, kMaxInt8Scale);
  }
  if (encoding == Encoding::kNf4) {
    if (count % 2 == 1 && data[used - 1] >= 0x10) {
      return "the half byte behind the last value is not 0";
    }
    return check_scales(data, over(over(count, kNf4Block), kNf4Group), kMaxNf4Scale);
  }
  const auto exponent = static_cast<std::uint16_t>(encoding == Encoding::kBf16 ? 0x7F80 : 0x7C00);
  std::uint16_t found = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const bool is = (get<std::uint16_t>(data + 2 * i) & exponent) == exponent;
    found |= static_cast<std::uint16_t>(is ? 1 : 0);
  }
  return found == 0 ? nullptr : "a value is NaN or infinite";
}

std::size_t used_bytes(Encoding encoding, const std::uint8_t* data, std::size_t count) noexcept {
  return encoded_bytes(encoding, count) +
         (encoding == Encoding::kTopK
              ? std::size_t{4} * get<std::uint32_t>(data) + get<std::uint32_t>(data + 4)
              : 0);
}

std::array<Array, 3> arrays(Encoding encoding, std::size_t count) noexcept {
  if (encoding == Encoding::kInt8) {
    return {{{4 * over(count, kInt8Block), 1, 1}, {0, kInt8Block, 4}, {0, 1, 0}}};
  }
  if (encoding == Encoding::kNf4) {
    const std::size_t blocks = over(count, kNf4Block), outers = 4 * over(blocks, kNf4Group);
    return {{{outers + blocks, 2, 1}, {0, kNf4Block * kNf4Group, 4}, {outers, kNf4Block, 1}}};
  }
  return {{{0, 1, 2}, {0, 1, 0}, {0, 1, 0}}};
}

Reader::Reader(Encoding encoding, const std::uint8_t* data, std::size_t count) noexcept
    : encoding_(encoding), data_(data), count_(count) {
  if (encoding == Encoding::kTopK) {
    kept_ = get<std::uint32_t>(data);
    gaps_ = data + 8 + 4 * kept_;
    find_next_kept();
  }
}

void Reader::find_next_kept() noexcept {
  if (given_ < kept_) {
    std::uint64_t gap;
    read_gap(gaps_, gaps_ + 5, gap);  // which ends where check() saw it end
    place_ += static_cast<std::size_t>(gap);
  } else {
    place_ = count_;
  }
}

void Reader::next_top_k(float* out, std::size_t n) noexcept {
  std::fill(out, out + n, 0.0f);
  while (place_ < at_ + n) {
    out[place_ - at_] = get<float>(data_ + 8 + 4 * given_);
    ++given_;
    ++place_;
    find_next_kept();
  }
}

void Reader::next(float* out, std::size_t n) noexcept {
  const kernels::Table& table = kernels::active();
  switch (encoding_) {
    case Encoding::kBf16:
      table.decode_bf16(data_ + 2 * at_, n, out);
      break;
    case Encoding::kF16:
      table.decode_f16(data_ + 2 * at_, n, out);
      break;
    case Encoding::kInt8:
      table.decode_int8(data_ + at_ / kInt8Block * 4, data_ + 4 * over(count_, kInt8Block) + at_, n,
                        out);
      break;
    case Encoding::kNf4: {
      const std::size_t blocks = over(count_, kNf4Block);
      const std::uint8_t* minis = data_ + 4 * over(blocks, kNf4Group);
      table.decode_nf4(data_, minis, minis + blocks, at_, n, out);
      break;
    }
    default:
      next_top_k(out, n);
  }
  at_ += n;
}

}  // namespace fedcore::quantise
