// The CUDA reducer without a GPU: the staging of cuda/ runs on a queue that works on host memory,
// and the arithmetic of its kernels, element by element, gives the bits of the CPU's loops.

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "check.hpp"
#include "cuda/staging.hpp"
#include "kernels/kernels.hpp"
#include "late_queue.hpp"

using namespace fedcore;
using cuda::Job;

namespace {

constexpr Dtype kDtypes[] = {Dtype::kF64, Dtype::kF32, Dtype::kF16, Dtype::kBF16};

// k inputs of random finite elements, subnormals included; half of them are neighbours of the
// previous input's.
struct Inputs {
  Inputs(Dtype dtype, std::size_t k, std::size_t count, unsigned seed)
      : values(k), total(0), out(count * item_size(dtype)), expected(out.size()) {
    std::mt19937_64 random(seed);
    for (std::size_t i = 0; i < k; ++i) {
      values[i].resize(out.size());
      for (std::size_t b = 0; b < out.size(); ++b) {
        values[i][b] = static_cast<std::uint8_t>(random());
      }
      for (std::size_t b = item_size(dtype) - 1; b < out.size(); b += item_size(dtype)) {
        values[i][b] &= 0xBF;  // the top bit of the exponent
        if (i > 0 && random() % 2 == 0) {
          const std::size_t first = b + 1 - item_size(dtype);
          std::memcpy(&values[i][first], &values[i - 1][first], item_size(dtype));
          values[i][first] ^= 1;
        }
      }
      pointers.push_back(values[i].data());
      // Two neighbours of one weight have a tie for their mean, which only a true quotient is.
      weights.push_back(k == 2 ? 49 : static_cast<double>(1 + random() % kernels::kMaxWeight));
      total += weights.back();
    }
  }
  bool mean(Dtype dtype, std::vector<std::uint8_t>& to) {
    return kernels::mean(dtype, pointers.data(), weights.data(), pointers.size(), total, nullptr,
                         to.data(), to.size());
  }
  std::vector<std::vector<std::uint8_t>> values;
  std::vector<const void*> pointers;
  std::vector<double> weights;
  double total;
  std::vector<std::uint8_t> out, expected;
};

void every_piece_of_a_block_gets_the_bits_of_the_cpu() {
  cuda::StagedDevice device(open_late, 8192, 1);
  const FcDevice table{&device, as_device};
  std::uint64_t blocks = 0;
  for (const Dtype dtype : kDtypes) {
    for (const std::size_t k : {1u, 2u, 5u, 24u}) {
      for (const std::size_t count : {1u, 127u, 128u, 129u, 4096u, 20'001u}) {
        Inputs block(dtype, k, count, static_cast<unsigned>(count + k));
        kernels::use_device(nullptr);
        CHECK(block.mean(dtype, block.expected));
        kernels::use_device(&table);
        CHECK(block.mean(dtype, block.out));
        CHECK(block.out == block.expected);
        CHECK(device.blocks() == ++blocks);
      }
    }
  }
  kernels::use_device(nullptr);
}

void a_value_that_is_not_finite_is_found_in_any_piece() {
  cuda::StagedDevice device(open_late, 8192, 1);
  const FcDevice table{&device, as_device};
  kernels::use_device(&table);
  for (const Dtype dtype : kDtypes) {
    const std::size_t size = item_size(dtype);
    for (const std::size_t at : {0u, 2500u, 4999u}) {
      Inputs block(dtype, 3, 5000, 1);
      block.values[1][at * size + size - 1] = 0x7F;  // infinity or NaN
      block.values[1][at * size + size - 2] |= 0xF0;
      CHECK(!block.mean(dtype, block.out));
      CHECK(Inputs(dtype, 3, 5000, 1).mean(dtype, block.out));  // the flag does not stay
    }
  }
  kernels::use_device(nullptr);
}

void more_inputs_than_a_piece_holds_go_to_the_cpu() {
  cuda::StagedDevice device(open_late, 8192, 1);
  const FcDevice table{&device, as_device};
  Inputs block(Dtype::kF32, 40, 100, 1);
  CHECK(block.mean(Dtype::kF32, block.expected));
  kernels::use_device(&table);
  CHECK(block.mean(Dtype::kF32, block.out));
  CHECK(block.out == block.expected);
  CHECK(device.blocks() == 0 && device.failure().empty());
  kernels::use_device(nullptr);
}

// A device that breaks in its n-th operation.
class FailingQueue final : public cuda::Queue {
 public:
  FailingQueue(std::size_t bytes, int& left) : inner_(bytes), left_(left) {}
  std::uint8_t* host() noexcept override { return inner_.host(); }
  std::uint8_t* device() noexcept override { return inner_.device(); }
  void upload(std::size_t bytes) override {
    count();
    inner_.upload(bytes);
  }
  void launch(const Job& job) override {
    count();
    inner_.launch(job);
  }
  void download(std::size_t offset, std::size_t bytes) override {
    count();
    inner_.download(offset, bytes);
  }
  void wait() override {
    count();
    inner_.wait();
  }

 private:
  void count() {
    if (left_-- == 0) {
      throw Error(Errc::kConfig, "the device fell off the bus");
    }
  }
  LateQueue inner_;
  int& left_;
};

void a_device_that_fails_at_any_step_leaves_the_bits_to_the_cpu() {
  for (int step = 0; step < 16; ++step) {  // 5 pieces of 4 operations
    int left = step;
    cuda::StagedDevice device(
        [&](std::size_t bytes) { return std::make_unique<FailingQueue>(bytes, left); }, 8192, 1);
    const FcDevice table{&device, as_device};
    Inputs block(Dtype::kF32, 3, 2000, 9);
    kernels::use_device(nullptr);
    CHECK(block.mean(Dtype::kF32, block.expected));
    kernels::use_device(&table);
    for (int again = 0; again < 2; ++again) {
      std::fill(block.out.begin(), block.out.end(), 0xAA);
      CHECK(block.mean(Dtype::kF32, block.out));
      CHECK(block.out == block.expected);
    }
    CHECK(device.failure() == "the device fell off the bus");
    CHECK(device.blocks() == 0 && left == -1);  // it was not asked again
  }
  kernels::use_device(nullptr);
}

void threads_share_the_lanes() {
  cuda::StagedDevice device(open_late, 8192, 2);
  const FcDevice table{&device, as_device};
  kernels::use_device(&table);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([t] {
      for (unsigned i = 0; i < 20; ++i) {
        Inputs block(Dtype::kF32, 3, 3001, t * 100 + i);
        CHECK(block.mean(Dtype::kF32, block.out));
        const auto& table_of_cpu = kernels::active();
        CHECK(table_of_cpu.f32(block.pointers.data(), block.weights.data(), 3, block.total,
                               block.expected.data(), 3001));
        CHECK(block.out == block.expected);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(device.blocks() == 80);
  kernels::use_device(nullptr);
}

// Breaks once four threads came for its lane.
class DoomedQueue final : public cuda::Queue {
 public:
  explicit DoomedQueue(const std::atomic<int>& came) : came_(came), host_(8192) {}
  std::uint8_t* host() noexcept override { return host_.data(); }
  std::uint8_t* device() noexcept override { return host_.data(); }
  void upload(std::size_t) override {}
  void launch(const Job&) override {}
  void download(std::size_t, std::size_t) override {}
  void wait() override {
    while (came_.load() < 4) {
      std::this_thread::yield();
    }
    for (int i = 0; i < 1000; ++i) {
      std::this_thread::yield();  // the last that came may get as far as to wait
    }
    throw Error(Errc::kConfig, "the device fell off the bus");
  }

 private:
  const std::atomic<int>& came_;
  std::vector<std::uint8_t> host_;
};

void threads_that_wait_for_a_lane_learn_of_its_failure() {
  std::atomic<int> came{0};
  cuda::StagedDevice device([&](std::size_t) { return std::make_unique<DoomedQueue>(came); }, 8192,
                            1);
  const FcDevice table{&device, as_device};
  kernels::use_device(&table);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&came, t] {
      Inputs block(Dtype::kF32, 3, 3001, t);
      ++came;
      CHECK(block.mean(Dtype::kF32, block.out));
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(device.blocks() == 0);
  kernels::use_device(nullptr);
}

}  // namespace

int main() {
  every_piece_of_a_block_gets_the_bits_of_the_cpu();
  a_value_that_is_not_finite_is_found_in_any_piece();
  more_inputs_than_a_piece_holds_go_to_the_cpu();
  a_device_that_fails_at_any_step_leaves_the_bits_to_the_cpu();
  threads_share_the_lanes();
  threads_that_wait_for_a_lane_learn_of_its_failure();
  return 0;
}
