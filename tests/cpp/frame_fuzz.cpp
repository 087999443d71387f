// A fuzzer of everything that a peer can send: headers, encoded bodies, in any order and number.
//
// LLVMFuzzerTestOneInput() plays one input against an exchange that publishes a set, pulls two and
// decodes what comes. With clang++ it is linked with libFuzzer, which looks for inputs that reach
// new code; with any other compiler the main() below draws inputs from seeds, and prints the
// thousand that a failure is among. Both run under the sanitizers. Promise: nothing that comes
// reads or writes out of bounds, hangs, or makes the collection end without both sources' chunks.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.hpp"
#include "codec/codec.hpp"
#include "transfer/exchange.hpp"

using namespace fedcore;

namespace {

constexpr std::uint64_t kChunk = 4096;

// Reads an input from its front; 0 behind its end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  std::uint8_t byte() {
    std::uint8_t value = 0;
    take(&value, 1);
    return value;
  }
  std::uint32_t word() {
    std::uint32_t value = 0;
    take(&value, sizeof value);
    return value;
  }
  std::size_t take(void* to, std::size_t count) {
    const std::size_t given = std::min(count, size_);
    if (given > 0) {
      std::memcpy(to, data_, given);
    }
    data_ += given;
    size_ -= given;
    return given;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

wire::SetId set_id(std::uint8_t value) {
  wire::SetId id{};
  id[0] = value;
  return id;
}

// As LZ4 says where its input is nonsense; a third of the bodies are taken for good.
int compress(const char*, char*, int, int) { return 0; }
int decompress(const char* from, char* to, int size, int capacity) {
  if (size < 1 || from[0] % 3 != 0) {
    return -1;
  }
  std::memset(to, from[0], static_cast<std::size_t>(capacity));
  return capacity;
}

std::uint64_t collected = 0;  // inputs whose chunks were all taken

struct World {
  std::shared_ptr<const Layout> layout = std::make_shared<Layout>(
      std::vector<TensorSpec>{
          {"w", Dtype::kF32, {3001}}, {"h", Dtype::kBF16, {77}}, {"n", Dtype::kI64, {3}}},
      kChunk);
  std::shared_ptr<MappedFile> out = MappedFile::anonymous(layout->total_bytes());
  std::shared_ptr<MappedFile> base = MappedFile::anonymous(layout->total_bytes());
  Exchange exchange;
  std::shared_ptr<Collector> collector;
  Codec codec;  // of the sites
  const Source north{"north", set_id(1), 1}, south{"south", set_id(2), 3};

  // `ahead`: north is pulled ahead, and open_further() does what comes next.
  World(Encoding encoding, bool ahead) : codec(layout, CodecOptions{encoding, false, 0.1}) {
    exchange.publish(set_id(9), base, 0, layout->total_bytes(), kChunk);
    CollectorOptions options{.budget_bytes = 256 << 10};
    options.codec = std::make_shared<Codec>(layout, CodecOptions{encoding, true, 0.1},
                                            Lz4{compress, decompress});
    if (ahead) {
      collector = std::make_shared<Collector>(layout, 2, Place{base, 0}, options);
    } else {
      collector = std::make_shared<Collector>(layout, std::vector<Source>{north, south},
                                              Place{out, 0}, Place{base, 0}, options);
    }
    exchange.start(collector);
    if (ahead) {
      exchange.add(collector->id(), north);
    }
  }

  // Adds the source that is missing from an open collection, or closes it.
  void open_further() {
    if (collector->active() && collector->open() && collector->sources().size() == 1) {
      exchange.add(collector->id(), south);
    } else if (collector->active() && collector->open()) {
      exchange.close(collector->id(), {0, 1}, Place{out, 0}, nullptr);
    }
  }
};

// A body: bytes of the input, or what a site would send of chunk `index`, with a few bytes changed.
std::vector<std::uint8_t> make_body(Input& input, World& world, std::uint8_t how,
                                    std::uint64_t index, std::uint8_t& encoding_byte) {
  std::vector<std::uint8_t> body;
  if ((how & 4) == 0 || index >= world.layout->chunk_count()) {
    body.resize(input.byte());
    body.resize(input.take(body.data(), body.size()));
    return body;
  }
  const Range range = world.layout->chunk_range(index);
  std::vector<std::uint8_t> values(range.nbytes);
  std::uint32_t state = input.word();
  for (std::uint8_t& value : values) {
    state = state * 1664525 + 1013904223;
    value = static_cast<std::uint8_t>(state >> 24 & 0x3F);  // every element is finite
  }
  encoding_byte =
      world.codec.encode(index, values.data(), world.base->data() + range.offset, nullptr, body);
  for (int changes = input.byte() % 4; changes > 0; --changes) {
    body[input.word() % body.size()] = input.byte();
  }
  if (input.byte() % 8 == 0) {
    body.resize(1 + input.word() % (body.size() + 16));
  }
  return body;
}

// One frame of the input: its header is made of a few bytes or taken as it is, its checksums put
// right or left.
void send_one(Input& input, World& world, std::int64_t now) {
  const std::uint8_t how = input.byte();
  const std::string peer = (how & 1) != 0 ? "north" : (how & 2) != 0 ? "south" : "stranger";
  wire::Header header{};
  header.kind = (how & 4) != 0 ? wire::Kind::kChunk : static_cast<wire::Kind>(1 + input.byte() % 6);
  header.index = input.byte() % 8;
  header.encoding = input.byte();
  std::vector<std::uint8_t> body = make_body(input, world, how, header.index, header.encoding);
  wire::Bytes bytes{};
  if ((how & 0x88) == 0x88) {
    input.take(bytes.data(), bytes.size());
  } else {
    header.set = set_id((how & 4) != 0 ? ((how & 1) != 0 ? 1 : 2) : input.byte() % 10);
    header.count = header.kind == wire::Kind::kChunk ? 0 : input.byte();
    header.length = static_cast<std::uint32_t>(body.size());
    header.body_crc = (how & 0x90) == 0x90 ? input.word() : crc32c(body.data(), body.size());
    bytes = wire::encode(header);
  }
  if ((how & 0xA0) == 0xA0) {
    const std::uint32_t crc = crc32c(bytes.data(), 44);
    std::memcpy(bytes.data() + 44, &crc, sizeof crc);
  }
  void* copy = std::malloc(body.size() + 1);  // its own block, so that a read past its end is seen
  CHECK(copy != nullptr);
  void* exact = std::realloc(copy, std::max<std::size_t>(body.size(), 1));
  if (!body.empty()) {
    std::memcpy(exact, body.data(), body.size());
  }
  Frame frame(exact, body.size(), exact, std::free);
  world.exchange.deliver(now, peer, bytes.data(),
                         (how & 0xC0) == 0xC0 ? input.byte() : bytes.size(), frame);
}

// What a server does now and then with a peer.
void decide_one(Input& input, World& world, std::int64_t now) {
  const std::uint8_t what = input.byte();
  const std::string peer = (what & 1) != 0 ? "north" : "stranger";
  switch (what >> 1) {
    case 0:
      world.exchange.mute(peer, now + 50);
      break;
    case 1:
      world.exchange.discard(peer);
      break;
    case 2:
      world.exchange.forget(peer);
      break;
    case 3:
      world.exchange.block(peer, input.byte() % 2 != 0);
      break;
    default:
      if (what >> 1 < 12) {
        world.open_further();
      }
      break;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  constexpr Encoding kEncodings[] = {Encoding::kRaw,  Encoding::kBf16, Encoding::kF16,
                                     Encoding::kInt8, Encoding::kNf4,  Encoding::kTopK};
  const std::uint8_t first = input.byte();
  World world(kEncodings[first % 6], first % 64 >= 32);
  world.exchange.set_limits({.paced = first >= 128});
  std::int64_t now = 0;
  while (!input.empty()) {
    send_one(input, world, now);
    decide_one(input, world, now);
    now += input.byte();
    world.exchange.tick(now);
    while (world.exchange.next_out(now)) {
    }
    while (world.exchange.next_event()) {
    }
    while (world.exchange.next_control(now)) {
    }
  }
  const std::vector<std::uint64_t> received = world.collector->chunks_received();
  const std::uint64_t count = world.collector->chunk_count();
  CHECK(!world.collector->done() ||
        std::all_of(received.begin(), received.end(), [&](std::uint64_t n) { return n >= count; }));
  collected += world.collector->done();
  return 0;
}

#ifndef FEDCORE_LIBFUZZER
#include <chrono>
#include <random>

// Inputs among which one of a slow machine's few seconds is collected.
constexpr std::uint64_t kLeast = 5000;

// frame_fuzz [SECONDS [SEED]]
int main(int argc, char** argv) {
  const std::chrono::seconds limit(argc > 1 ? std::atoi(argv[1]) : 5);
  std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const auto end = std::chrono::steady_clock::now() + limit;
  std::uint64_t played = 0;
  for (; std::chrono::steady_clock::now() < end || (collected == 0 && played < kLeast);
       ++seed, ++played) {
    if (played % 1000 == 0) {
      std::printf("seeds from %llu\n", static_cast<unsigned long long>(seed));
      std::fflush(stdout);
    }
    std::mt19937_64 random(seed);
    std::vector<std::uint8_t> input(1 + random() % 20'000);
    for (std::uint8_t& byte : input) {
      byte = static_cast<std::uint8_t>(random());
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%llu inputs, %llu collected\n", static_cast<unsigned long long>(played),
              static_cast<unsigned long long>(collected));
  CHECK(collected > 0);  // or nothing behind the first checks was reached
}
#endif
