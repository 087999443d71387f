// The codec between inaccessible pages: no byte before or behind a body, a base or an output is
// touched, whatever the body holds; all under the sanitizers.

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "base/crc32c.hpp"
#include "check.hpp"
#include "codec/codec.hpp"
#include "guarded.hpp"

using namespace fedcore;

namespace {

constexpr const char* kEncodings[] = {"raw", "bf16", "fp16", "int8", "nf4", "top-k"};

std::shared_ptr<const Layout> mixed() {
  return std::make_shared<const Layout>(std::vector<TensorSpec>{{"d", Dtype::kF64, {65}},
                                                                {"f", Dtype::kF32, {4099}},
                                                                {"h", Dtype::kF16, {333}},
                                                                {"i", Dtype::kI32, {7}},
                                                                {"b", Dtype::kBF16, {129}},
                                                                {"u", Dtype::kU8, {5}}},
                                        8192);
}

// A stand-in for LZ4 that stores: a byte 0xCC, then the bytes themselves.
int store(const char* from, char* to, int size, int capacity) {
  const int used = std::min(size, capacity - 1);  // pretends to have saved the rest
  to[0] = static_cast<char>(0xCC);
  std::memcpy(to + 1, from, static_cast<std::size_t>(used));
  return used + 1;
}

int restore(const char* from, char* to, int size, int capacity) {
  if (size < 1 || from[0] != static_cast<char>(0xCC) || size - 1 > capacity) {
    return -1;
  }
  std::memset(to, 0, static_cast<std::size_t>(capacity));
  std::memcpy(to, from + 1, static_cast<std::size_t>(size - 1));
  return capacity;
}

void fill(const Layout& layout, Range range, std::mt19937_64& random, std::uint8_t* to) {
  for (const Run& run : layout.runs(range)) {
    const std::size_t size = item_size(run.dtype);
    std::uint8_t* at = to + (run.offset - range.offset);
    for (std::size_t i = 0; i < run.nbytes; ++i) {
      at[i] = static_cast<std::uint8_t>(random());
      // Without the top bit of the exponent every value is finite.
      const bool top = is_float(run.dtype) && i % size == size - 1;
      at[i] = static_cast<std::uint8_t>(top ? at[i] & 0xBF : at[i]);
    }
  }
}

void mutate(std::vector<std::uint8_t>& body, std::mt19937_64& random) {
  const std::size_t at = random() % (body.size() + 1);
  const auto place = body.begin() + static_cast<std::ptrdiff_t>(at);
  switch (random() % 4) {
    case 0:
      body.erase(place, body.end());
      break;
    case 1:
      body.insert(place, random() % 32, static_cast<std::uint8_t>(random()));
      break;
    default:
      if (at < body.size()) {
        const std::uint8_t choices[] = {0, 0x7F, 0x80, 0xFF, static_cast<std::uint8_t>(random())};
        body[at] = choices[random() % 5];
      }
  }
}

void no_body_reaches_beyond_its_buffers() {
  std::mt19937_64 random(11);
  const auto layout = mixed();
  for (const char* name : kEncodings) {
    for (const bool lossless : {false, true}) {
      Codec codec(layout, {parse_encoding(name), lossless, 0.1}, {store, restore});
      for (std::uint64_t index = 0; index < layout->chunk_count(); ++index) {
        const Range range = layout->chunk_range(index);
        GuardedBuffer values(range.nbytes), base(range.nbytes), out(range.nbytes),
            residual(range.nbytes), lost(range.nbytes);
        fill(*layout, range, random, values.data());
        fill(*layout, range, random, base.data());
        fill(*layout, range, random, residual.data());
        std::vector<std::uint8_t> body;
        Lost losing{lost.data()};
        codec.encode(index, values.data(), base.data(), residual.data(), body, &losing);
        CHECK(losing.checksum == crc32c(lost.data(), lost.size()));
        const std::uint8_t encoding_byte =
            codec.encode(index, values.data(), base.data(), nullptr, body);
        CHECK(body.size() <= range.nbytes);
        for (int i = 0; i < 400; ++i) {
          std::vector<std::uint8_t> hostile = body;
          for (int m = 0; m < i % 4; ++m) {
            mutate(hostile, random);
          }
          GuardedBuffer sent(std::max<std::size_t>(hostile.size(), 1));
          std::copy(hostile.begin(), hostile.end(), sent.data());
          std::memset(out.data(), 0x5A, out.size());
          const char* why = codec.decode(index, encoding_byte, sent.data(), hostile.size(),
                                         i % 2 == 0 ? base.data() : nullptr, out.data());
          CHECK(i % 4 != 0 || why == nullptr);
          CHECK(why == nullptr || std::all_of(out.data(), out.data() + out.size(),
                                              [](std::uint8_t byte) { return byte == 0x5A; }));
        }
        codec.decode(index, encoding_byte, body.data(), body.size(), base.data(), out.data());
        codec.carry(index, values.data(), nullptr, out.data(), lost.data());
      }
    }
  }
}

}  // namespace

int main() {
  no_body_reaches_beyond_its_buffers();
  std::puts("all native checks of the codec passed");
}
