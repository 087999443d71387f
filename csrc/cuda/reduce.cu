#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>

#include "base/error.hpp"
#include "cuda/reduce.hpp"
#include "kernels/arith.hpp"
#include "kernels/decode.hpp"

namespace fedcore::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr std::size_t kBlocks = 4096;  // a block goes on to further elements beyond

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw Error(Errc::kConfig,
                std::string("CUDA can't ") + what + ": " + cudaGetErrorString(status));
  }
}

template <typename T>
__global__ void mean_kernel(Job job) {
  const quantise::MixedElements<T> values{job.inputs, job.base, job.first};
  auto* const out = static_cast<typename T::Word*>(job.out);
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
  for (std::size_t j = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       j < job.count; j += step) {
    std::uint64_t found = 0;
    out[j] = T::encode(arith::mean_element<T>(values, job.weights, job.k, job.total, j, found));
    if (found != 0) {
      *job.bad = 1;  // whoever writes it, writes the same
    }
  }
}

template <typename T>
void launch_mean(const Job& job, cudaStream_t stream) {
  const auto blocks =
      static_cast<unsigned>(std::min<std::size_t>((job.count + kThreads - 1) / kThreads, kBlocks));
  mean_kernel<T><<<blocks, kThreads, 0, stream>>>(job);
  check(cudaGetLastError(), "start a kernel");
}

class CudaQueue final : public Queue {
 public:
  CudaQueue(int index, std::size_t bytes) : index_(index) {
    enter();
    try {
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "open a stream");
      check(cudaMallocHost(reinterpret_cast<void**>(&host_), bytes), "pin host memory");
      check(cudaMalloc(reinterpret_cast<void**>(&device_), bytes), "reserve device memory");
    } catch (...) {
      close();
      throw;
    }
  }
  ~CudaQueue() override { close(); }
  CudaQueue(const CudaQueue&) = delete;
  CudaQueue& operator=(const CudaQueue&) = delete;

  std::uint8_t* host() noexcept override { return host_; }
  std::uint8_t* device() noexcept override { return device_; }

  void upload(std::size_t bytes) override {
    enter();
    check(cudaMemcpyAsync(device_, host_, bytes, cudaMemcpyHostToDevice, stream_), "copy up");
  }

  void launch(const Job& job) override {
    enter();
    switch (job.dtype) {
      case FC_F64:
        return launch_mean<arith::F64>(job, stream_);
      case FC_F32:
        return launch_mean<arith::F32>(job, stream_);
      case FC_F16:
        return launch_mean<arith::F16>(job, stream_);
      default:
        return launch_mean<arith::Bf16>(job, stream_);
    }
  }

  void download(std::size_t offset, std::size_t bytes) override {
    enter();
    check(cudaMemcpyAsync(host_ + offset, device_ + offset, bytes, cudaMemcpyDeviceToHost, stream_),
          "copy down");
  }

  void wait() override {
    enter();
    check(cudaStreamSynchronize(stream_), "compute a mean");
  }

 private:
  // The current device belongs to a thread, and any thread may come here.
  void enter() const { check(cudaSetDevice(index_), "use the GPU"); }

  // What fails here fails because the device did, which was told before.
  void close() noexcept {
    if (stream_ != nullptr) {
      cudaStreamSynchronize(stream_);
      cudaStreamDestroy(stream_);
    }
    cudaFree(device_);
    cudaFreeHost(host_);
  }

  int index_;
  cudaStream_t stream_ = nullptr;
  std::uint8_t* host_ = nullptr;
  std::uint8_t* device_ = nullptr;
};

// Throws unless this build holds code that the current device runs.
template <typename T>
void check_kernel() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, mean_kernel<T>), "run this build's kernels");
}

}  // namespace

int device_count(std::string& why) noexcept {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    why = cudaGetErrorString(status);
    return 0;
  }
  why = count == 0 ? "the driver shows no GPU" : "";
  return count;
}

OpenDevice open_device(int index, std::size_t bytes, unsigned lanes) {
  check(cudaSetDevice(index), "use the GPU");
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, index), "describe the GPU");
  check_kernel<arith::F64>();
  check_kernel<arith::F32>();
  check_kernel<arith::F16>();
  check_kernel<arith::Bf16>();
  auto device = std::make_unique<StagedDevice>(
      [index](std::size_t size) { return std::make_unique<CudaQueue>(index, size); }, bytes, lanes);
  return {properties.name, device.release()};
}

}  // namespace fedcore::cuda
