// The CUDA side of staging.hpp: which GPUs there are, and one of them opened for means.
//
// The bits are the CPU's: the kernels run arith.hpp, compiled without contraction and without
// flushing subnormals. A GPU is opened once per process and kept to its end, because CUDA's own
// state doesn't outlive main(). Thread rule and cost: those of StagedDevice. No header of CUDA is
// needed to include this file.
#pragma once

#include <string>

#include "cuda/staging.hpp"

namespace fedcore::cuda {

// How many GPUs the driver shows; 0 with the reason in `why` if there is none or no driver.
int device_count(std::string& why) noexcept;

struct OpenDevice {
  std::string name;
  StagedDevice* device;
};

// Opens GPU `index` with `lanes` lanes of 2 x `bytes`. Throws Error{kConfig} if there is no such
// GPU, if this build has no code for it, or if its memory does not suffice.
OpenDevice open_device(int index, std::size_t bytes, unsigned lanes);

}  // namespace fedcore::cuda
