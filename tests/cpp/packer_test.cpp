// The packer between inaccessible pages and on files: what is compressed comes back as it was, the
// same for all who ask, and what is not worth it or finds no room travels raw.

#include <algorithm>
#include <random>
#include <vector>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "check.hpp"
#include "codec/packer.hpp"
#include "format/wire.hpp"
#include "guarded.hpp"

using namespace fedcore;

namespace {

constexpr std::uint64_t kChunk = 8192;
constexpr std::uint64_t kChunks = 40;

// A stand-in for LZ4: pairs of a count and a byte. 0 where they do not fit, as LZ4 says.
int shrink(const char* from, char* to, int size, int capacity) {
  int used = 0;
  for (int i = 0; i < size;) {
    int run = 1;
    while (i + run < size && run < 255 && from[i + run] == from[i]) {
      ++run;
    }
    if (used + 2 > capacity) {
      return 0;
    }
    to[used++] = static_cast<char>(run);
    to[used++] = from[i];
    i += run;
  }
  return used;
}

int stretch(const char* from, char* to, int size, int capacity) {
  int made = 0;
  for (int i = 0; i + 1 < size; i += 2) {
    for (int k = static_cast<unsigned char>(from[i]); k > 0; --k) {
      if (made == capacity) {
        return -1;
      }
      to[made++] = from[i + 1];
    }
  }
  return made;
}

std::shared_ptr<Codec> lossless(std::shared_ptr<const Layout> layout) {
  return std::make_shared<Codec>(std::move(layout), CodecOptions{Encoding::kRaw, true, 0.1},
                                 Lz4{shrink, stretch});
}

std::shared_ptr<const Layout> floats() {
  // The last chunk is short.
  return std::make_shared<const Layout>(
      std::vector<TensorSpec>{{"w", Dtype::kF32, {(kChunks * kChunk - 4096) / 4}}}, kChunk);
}

// Chunk `index`: constant where `even`, else random.
std::vector<std::uint8_t> chunk(const Layout& layout, std::uint64_t index, bool even) {
  std::vector<std::uint8_t> bytes(layout.chunk_range(index).nbytes,
                                  static_cast<std::uint8_t>(index));
  std::mt19937_64 random(index);
  for (std::uint8_t& byte : bytes) {
    byte = even ? byte : static_cast<std::uint8_t>(random());
  }
  return bytes;
}

void what_is_packed_comes_back_and_stays_as_it_is() {
  const auto layout = floats();
  const auto codec = lossless(layout);
  Packer packer(codec, MappedFile::anonymous(layout->total_bytes()));
  std::uint64_t behind = 0;
  for (std::uint64_t i = 0; i < kChunks; ++i) {
    const auto bytes = chunk(*layout, i, i % 3 == 0);
    GuardedBuffer given(bytes.size());
    std::copy(bytes.begin(), bytes.end(), given.data());
    CHECK(!packer.knows(i));
    const auto got = packer.get(i, given.data());
    CHECK(packer.knows(i));
    CHECK(got.has_value() == (i % 3 == 0));
    if (!got) {
      continue;
    }
    CHECK((got->encoding_byte & wire::kPacked) != 0 && got->offset >= behind);
    behind = got->offset + got->size;
    CHECK(behind <= packer.file()->size() && got->size < bytes.size());
    const std::uint8_t* body = packer.file()->data() + got->offset;
    CHECK(got->crc == crc32c(body, got->size));
    std::vector<std::uint8_t> back(bytes.size());
    CHECK(codec->decode(i, got->encoding_byte, body, got->size, nullptr, back.data()) == nullptr);
    CHECK(back == bytes);
  }
  // Asked again, a chunk is what it was, whatever lies at the pointer now.
  const auto first = packer.get(0, nullptr);
  CHECK(first && first->offset == 0 && !packer.get(1, nullptr));
}

void noise_is_looked_at_less_and_less() {
  const auto layout = floats();
  Packer packer(lossless(layout), MappedFile::anonymous(layout->total_bytes()));
  for (std::uint64_t i = 0; i < Packer::kProbes; ++i) {
    CHECK(!packer.get(i, chunk(*layout, i, false).data()));
  }
  const std::uint64_t skipped = Packer::kProbes + 1;
  CHECK(!packer.get(skipped, chunk(*layout, skipped, true).data()));
  const std::uint64_t probed = 2 * Packer::kProbes;
  CHECK(packer.get(probed, chunk(*layout, probed, true).data()));
  CHECK(packer.get(probed + 1, chunk(*layout, probed + 1, true).data()));
}

void a_file_that_is_too_small_or_a_lossy_codec_is_refused() {
  const auto layout = floats();
  bool small = false, lossy = false;
  try {
    Packer packer(lossless(layout), MappedFile::anonymous(layout->total_bytes() - 1));
  } catch (const Error& error) {
    small = error.code() == Errc::kStorage;
  }
  try {
    auto codec = std::make_shared<Codec>(layout, CodecOptions{Encoding::kInt8, true, 0.1},
                                         Lz4{shrink, stretch});
    Packer packer(codec, MappedFile::anonymous(layout->total_bytes()));
  } catch (const Error& error) {
    lossy = error.code() == Errc::kConfig;
  }
  CHECK(small && lossy);
}

}  // namespace

int main() {
  what_is_packed_comes_back_and_stays_as_it_is();
  noise_is_looked_at_less_and_less();
  a_file_that_is_too_small_or_a_lossy_codec_is_refused();
}
