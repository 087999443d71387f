// The CUDA reducer on a real GPU: every dtype and every encoding, bit for bit what the CPU's loops
// give. Exits with 77, which ctest counts as skipped, where there is no GPU.

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda/reduce.hpp"
#include "encoded_inputs.hpp"
#include "kernels/kernels.hpp"

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
        const FcMean mean{static_cast<int>(dtype),
                          k,
                          pointers.data(),
                          nullptr,
                          weights.data(),
                          total,
                          nullptr,
                          out.data(),
                          count};
        CHECK(gpu.mean(mean) == FC_MEAN_FINITE);
        CHECK(out == expected);
        std::memset(inputs[k - 1].data() + (count - 1) * size, 0xFF, size);  // NaN
        CHECK(gpu.mean(mean) == FC_MEAN_NON_FINITE);
        blocks += 2;
        CHECK(gpu.blocks() == blocks && gpu.failure().empty());
      }
    }
  }
}

int as_device(void* self, const FcMean* mean) {
  return static_cast<cuda::StagedDevice*>(self)->mean(*mean);
}

void the_gpu_decodes_to_the_bits_of_the_cpu(cuda::StagedDevice& gpu) {
  const FcDevice table{&gpu, as_device};
  const std::vector<std::vector<Encoding>> updates{
      {Encoding::kBf16},
      {Encoding::kF16},
      {Encoding::kInt8},
      {Encoding::kNf4},
      {Encoding::kRaw, Encoding::kNf4, Encoding::kInt8, Encoding::kF16, Encoding::kBf16}};
  for (const Dtype dtype : kFloats) {
    for (const std::vector<Encoding>& encodings : updates) {
      for (const std::size_t count : {1u, 129u, 16'385u, 300'007u}) {
        for (const bool has_base : {true, false}) {
          EncodedInputs block(dtype, 5, count, encodings, has_base, static_cast<unsigned>(count));
          std::vector<std::uint8_t> expected;
          CHECK(!block.reduce(expected));
          const std::uint64_t before = gpu.blocks();
          kernels::use_device(&table);
          CHECK(!block.reduce(block.out));
          kernels::use_device(nullptr);
          CHECK(block.out == expected);
          CHECK(gpu.blocks() == before + 1 && gpu.failure().empty());
        }
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
  the_gpu_decodes_to_the_bits_of_the_cpu(*gpu.device);
  return 0;
}
