// Encoded updates on a device without a GPU: what goes up as it travelled, and is decoded and
// averaged there piece by piece, gives the bits of the CPU's reducer.

#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "check.hpp"
#include "cuda/staging.hpp"
#include "encoded_inputs.hpp"
#include "kernels/kernels.hpp"
#include "late_queue.hpp"

using namespace fedcore;

namespace {

constexpr Encoding kOnDevice[] = {Encoding::kBf16, Encoding::kF16, Encoding::kInt8, Encoding::kNf4};
// A tail of every kind: of a byte of nf4, a block of nf4 and int8, and a group of nf4.
constexpr std::size_t kCounts[] = {1, 2, 63, 65, 127, 128, 129, 1001, 16'384, 16'385, 40'003};

// For as long as it lives, means are computed on this device.
class InUse {
 public:
  explicit InUse(cuda::StagedDevice& device) : table_{&device, as_device} {
    kernels::use_device(&table_);
  }
  ~InUse() { kernels::use_device(nullptr); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  FcDevice table_;
};

// Returns how many blocks the device computed.
std::uint64_t same_bits(const EncodedInputs& block, std::size_t piece_bytes) {
  std::vector<std::uint8_t> expected, out;
  CHECK(!block.reduce(expected));
  cuda::StagedDevice device(open_late, piece_bytes, 1);
  const InUse use(device);
  CHECK(!block.reduce(out));
  CHECK(out == expected);
  CHECK(device.failure().empty());
  return device.blocks();
}

void every_encoding_of_every_dtype_gets_the_bits_of_the_cpu() {
  for (const Dtype dtype : kFloats) {
    for (const Encoding encoding : kOnDevice) {
      for (const std::size_t count : kCounts) {
        for (const bool has_base : {true, false}) {
          const auto seed = static_cast<unsigned>(count);
          CHECK(same_bits({dtype, 3, count, {encoding}, has_base, seed}, 16'384) == 1);
        }
      }
    }
  }
}

void raw_and_encoded_inputs_are_averaged_together() {
  const std::vector<Encoding> mixed{Encoding::kRaw, Encoding::kNf4, Encoding::kInt8,
                                    Encoding::kRaw, Encoding::kF16, Encoding::kBf16};
  for (const Dtype dtype : kFloats) {
    for (const std::size_t k : {2u, 7u}) {
      for (const std::size_t count : kCounts) {
        for (const bool has_base : {true, false}) {
          const auto seed = static_cast<unsigned>(count + k);
          CHECK(same_bits({dtype, k, count, mixed, has_base, seed}, 32'768) == 1);
        }
      }
    }
  }
}

// A piece may begin anywhere in a block and in a group.
void pieces_of_any_size_give_the_same_bits() {
  for (const Dtype dtype : kFloats) {
    for (const Encoding encoding : {Encoding::kInt8, Encoding::kNf4}) {
      for (std::size_t bytes = 4096; bytes < 20'000; bytes += 1280) {
        CHECK(same_bits({dtype, 2, 20'011, {encoding}, true, 5}, bytes) == 1);
      }
    }
  }
}

// Of 1 MiB of F32 from four sites as nf4: the model, and an eighth of a MiB of each.
void encoded_inputs_go_up_as_they_travelled() {
  std::size_t up = 0;
  class CountingQueue final : public LateQueue {
   public:
    CountingQueue(std::size_t bytes, std::size_t& up) : LateQueue(bytes), up_(up) {}
    void upload(std::size_t bytes) override {
      up_ += bytes;
      LateQueue::upload(bytes);
    }

   private:
    std::size_t& up_;
  };
  cuda::StagedDevice device(
      [&](std::size_t bytes) { return std::make_unique<CountingQueue>(bytes, up); }, 8u << 20, 1);
  const InUse use(device);
  EncodedInputs block(Dtype::kF32, 4, 1u << 18, {Encoding::kNf4}, true, 1);
  CHECK(!block.reduce(block.out));
  std::size_t travelled = block.range.nbytes;
  for (const Body& input : block.inputs) {
    travelled += input.size;
  }
  CHECK(travelled < block.range.nbytes * 8 / 5);
  CHECK(up >= travelled && up < travelled + 8192);
}

void what_a_device_does_not_decode_goes_to_the_cpu() {
  for (const Dtype dtype : kFloats) {
    for (const bool has_base : {true, false}) {
      CHECK(same_bits({dtype, 3, 5000, {Encoding::kTopK}, has_base, 3}, 65'536) == 0);
      CHECK(same_bits({dtype, 3, 5000, {Encoding::kRaw, Encoding::kTopK}, has_base, 4}, 65'536) ==
            0);
    }
  }
  const std::size_t narrow = 4096;  // holds no piece of so many inputs
  CHECK(same_bits({Dtype::kF32, 90, 5000, {Encoding::kNf4}, true, 3}, narrow) == 0);
}

void a_raw_value_that_is_not_finite_is_named_beside_encoded_ones() {
  cuda::StagedDevice device(open_late, 16'384, 1);
  const InUse use(device);
  for (const Dtype dtype : kFloats) {
    const std::size_t size = item_size(dtype);
    for (const std::size_t at : {0u, 2500u, 9999u}) {
      EncodedInputs block(dtype, 3, 10'000, {Encoding::kInt8, Encoding::kRaw}, true, 1);
      CHECK(!block.reduce(block.out));
      block.bodies[1][at * size + size - 1] = 0x7F;  // infinity or NaN
      block.bodies[1][at * size + size - 2] |= 0xF0;
      const std::optional<BadValue> bad = block.reduce(block.out);
      CHECK(bad && bad->source == 1 && bad->byte_offset == at * size);
    }
  }
}

void a_device_that_fails_leaves_encoded_updates_to_the_cpu() {
  class BrokenQueue final : public LateQueue {
   public:
    using LateQueue::LateQueue;
    void wait() override { throw Error(Errc::kConfig, "the device fell off the bus"); }
  };
  EncodedInputs block(Dtype::kBF16, 3, 10'000, {Encoding::kNf4, Encoding::kRaw}, true, 8);
  std::vector<std::uint8_t> expected;
  CHECK(!block.reduce(expected));
  cuda::StagedDevice device([](std::size_t bytes) { return std::make_unique<BrokenQueue>(bytes); },
                            16'384, 1);
  const InUse use(device);
  for (int again = 0; again < 2; ++again) {
    CHECK(!block.reduce(block.out));
    CHECK(block.out == expected);
  }
  CHECK(device.failure() == "the device fell off the bus" && device.blocks() == 0);
}

void what_the_device_computed_is_not_computed_again() {
  const FcDevice table{nullptr, [](void*, const FcMean* mean) -> int {
                         std::memset(mean->out, 0x55, mean->count * 4);
                         return FC_MEAN_FINITE;
                       }};
  EncodedInputs block(Dtype::kF32, 3, 1000, {Encoding::kNf4, Encoding::kRaw}, true, 8);
  kernels::use_device(&table);
  CHECK(!block.reduce(block.out));
  CHECK(block.out == std::vector<std::uint8_t>(4000, 0x55));
  kernels::use_device(nullptr);
}

void reducers_of_several_threads_share_the_lanes() {
  std::vector<EncodedInputs> blocks;
  std::vector<std::vector<std::uint8_t>> expected(4);
  for (unsigned t = 0; t < 4; ++t) {
    blocks.emplace_back(Dtype::kF32, 3, 9000 + t, std::vector{Encoding::kNf4, Encoding::kInt8},
                        true, t);
    CHECK(!blocks[t].reduce(expected[t]));
  }
  cuda::StagedDevice device(open_late, 16'384, 2);
  const InUse use(device);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::uint8_t> out;
      for (unsigned i = 0; i < 10; ++i) {
        CHECK(!blocks[t].reduce(out));
        CHECK(out == expected[t]);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(device.blocks() == 40);
}

}  // namespace

int main() {
  every_encoding_of_every_dtype_gets_the_bits_of_the_cpu();
  raw_and_encoded_inputs_are_averaged_together();
  pieces_of_any_size_give_the_same_bits();
  encoded_inputs_go_up_as_they_travelled();
  what_a_device_does_not_decode_goes_to_the_cpu();
  a_raw_value_that_is_not_finite_is_named_beside_encoded_ones();
  a_device_that_fails_leaves_encoded_updates_to_the_cpu();
  what_the_device_computed_is_not_computed_again();
  reducers_of_several_threads_share_the_lanes();
  return 0;
}
