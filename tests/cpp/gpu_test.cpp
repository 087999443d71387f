// The CUDA reducer on a real GPU: every dtype, bit for bit what the CPU's loops give. Exits with
// 77, which ctest counts as skipped, where there is no GPU.

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda/reduce.hpp"
#include "kernels.hpp"

using namespace fedcore;

namespace {

constexpr int kSkipped = 77;

void the_gpu_gives_the_bits_of_the_cpu(cuda::StagedDevice& gpu) {
  std::mt19937_64 random(11);
  std::uint64_t blocks = 0;
  for (const Dtype dtype : {Dtype::kF64, Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
    const std::size_t size = item_size(dtype);
    for (const std::size_t k : {1u, 3u, 17u}) {
      for (const std::size_t count : {1u, 255u, 100'003u, 2'000'000u}) {
        std::vector<std::vector<std::uint8_t>> inputs(k);
        std::vector<const void*> pointers;
        std::vector<double> weights;
        double total = 0;
        for (std::vector<std::uint8_t>& input : inputs) {
          input.resize(count * size);
          for (std::size_t b = 0; b < input.size(); ++b) {
            const auto byte = static_cast<std::uint8_t>(random());
            input[b] = b % size == size - 1 ? byte & 0xBF : byte;  // finite, subnormals included
          }
          pointers.push_back(input.data());
          weights.push_back(static_cast<double>(1 + random() % kernels::kMaxWeight));
          total += weights.back();
        }
        std::vector<std::uint8_t> expected(count * size), out(count * size);
        CHECK(kernels::mean(dtype, pointers.data(), weights.data(), k, total, nullptr,
                            expected.data(), expected.size()));
        CHECK(gpu.mean(static_cast<int>(dtype), pointers.data(), weights.data(), k, total,
                       out.data(), count) == FC_MEAN_FINITE);
        CHECK(out == expected);
        std::memset(inputs[k - 1].data() + (count - 1) * size, 0xFF, size);  // NaN
        CHECK(gpu.mean(static_cast<int>(dtype), pointers.data(), weights.data(), k, total,
                       out.data(), count) == FC_MEAN_NON_FINITE);
        blocks += 2;
        CHECK(gpu.blocks() == blocks && gpu.failure().empty());
      }
    }
  }
}

}  // namespace

int main() {
  std::string why;
  if (cuda::device_count(why) == 0) {
    std::printf("skipped: %s\n", why.c_str());
    return kSkipped;
  }
  const cuda::OpenDevice gpu = cuda::open_device(0, 1 << 20, 2);
  std::printf("%s\n", gpu.name.c_str());
  the_gpu_gives_the_bits_of_the_cpu(*gpu.device);
  return 0;
}
