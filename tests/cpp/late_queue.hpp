// A device without a GPU: a queue for the staging of cuda/ that works on host memory, with the
// arithmetic of the CUDA kernels.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "check.hpp"
#include "cuda/staging.hpp"
#include "kernels/arith.hpp"
#include "kernels/decode.hpp"

namespace fedcore {

// What one thread of mean_kernel (cuda/reduce.cu) does, for every element.
template <typename T>
void mean_kernel(const cuda::Job& job) {
  const quantise::MixedElements<T> values{job.inputs, job.base, job.first};
  auto* const out = static_cast<typename T::Word*>(job.out);
  for (std::size_t j = 0; j < job.count; ++j) {
    std::uint64_t found = 0;
    out[j] = T::encode(arith::mean_element<T>(values, job.weights, job.k, job.total, j, found));
    if (found != 0) {
      *job.bad = 1;
    }
  }
}

inline void run(const cuda::Job& job) {
  switch (job.dtype) {
    case FC_F64:
      return mean_kernel<arith::F64>(job);
    case FC_F32:
      return mean_kernel<arith::F32>(job);
    case FC_F16:
      return mean_kernel<arith::F16>(job);
    default:
      return mean_kernel<arith::Bf16>(job);
  }
}

// Does nothing until wait(), which is as late as a device may be; a piece that was read or
// overwritten before its wait() is wrong.
class LateQueue : public cuda::Queue {
 public:
  explicit LateQueue(std::size_t bytes) : host_(bytes), device_(bytes) {}
  std::uint8_t* host() noexcept override { return host_.data(); }
  std::uint8_t* device() noexcept override { return device_.data(); }
  void upload(std::size_t bytes) override {
    CHECK(bytes <= host_.size());
    later_.push_back([=, this] { std::memcpy(device_.data(), host_.data(), bytes); });
  }
  void launch(const cuda::Job& job) override {
    later_.push_back([=] { run(job); });
  }
  void download(std::size_t offset, std::size_t bytes) override {
    CHECK(offset + bytes <= host_.size());
    later_.push_back(
        [=, this] { std::memcpy(host_.data() + offset, device_.data() + offset, bytes); });
  }
  void wait() override {
    for (const auto& step : later_) {
      step();
    }
    later_.clear();
  }

 private:
  std::vector<std::uint8_t> host_, device_;
  std::vector<std::function<void()>> later_;
};

inline std::unique_ptr<cuda::Queue> open_late(std::size_t bytes) {
  return std::make_unique<LateQueue>(bytes);
}

inline int as_device(void* self, const FcMean* mean) {
  return static_cast<cuda::StagedDevice*>(self)->mean(*mean);
}

}  // namespace fedcore
