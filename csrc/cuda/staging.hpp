// Staging: means of blocks in host memory on a device, piece by piece through pinned memory.
//
// A Queue is what the device's library gives: a block of pinned host memory, one of the same size
// on the device, and operations that run in order while the host goes on. A Lane owns two of them
// and works on one piece while the next is being filled; a StagedDevice owns the lanes and lends
// each to one caller at a time. Encoded inputs go up as they travelled, and are decoded there;
// top-k is declined, because its values are found one after the other. Nothing asynchronous ever
// touches a caller's memory: after an error in mid-block the caller may go on with the same
// buffers. Nothing here knows CUDA, so the tests run it on the host.
//
// Threads: StagedDevice::mean from any; the rest belongs to it. Cost: 2 x lanes x bytes of pinned
// memory and as much on the device; one copy of every byte on the host, in each direction.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "codec/quantise.hpp"
#include "kernels/decode.hpp"
#include "kernels/device.h"

namespace fedcore::cuda {

// One launch, for elements from `first` of a run on; every pointer is the device's. `base` is
// nullptr if differences are added to nothing. `bad` is set to 1 if a result is not finite.
struct Job {
  int dtype;
  const quantise::Input* inputs;
  const double* weights;
  std::size_t k;
  double total;
  const void* base;
  std::size_t first;
  void* out;
  std::size_t count;
  std::uint32_t* bad;
};

class Queue {
 public:
  virtual ~Queue() = default;
  virtual std::uint8_t* host() noexcept = 0;
  virtual std::uint8_t* device() noexcept = 0;  // not to be read or written by the host
  // Operations of one queue run in this order; they throw Error{kConfig} if the device fails.
  virtual void upload(std::size_t bytes) = 0;  // the first bytes of the block
  virtual void launch(const Job& job) = 0;
  virtual void download(std::size_t offset, std::size_t bytes) = 0;
  virtual void wait() = 0;
};

using OpenQueue = std::function<std::unique_ptr<Queue>(std::size_t bytes)>;

// An input of the current block, and the arrays that it consists of: raw elements are one.
struct Source {
  Encoding encoding;
  const std::uint8_t* data;
  std::array<quantise::Array, 3> arrays;
};

class Lane {
 public:
  Lane(const OpenQueue& open, std::size_t bytes);
  // As FcDevice::mean, but throws Error if the device fails.
  int mean(const FcMean& mean);

 private:
  struct Slot {
    std::unique_ptr<Queue> queue;
    std::uint8_t* to = nullptr;  // where the piece under way goes, nullptr: there is none
    std::size_t nbytes = 0;
    std::size_t bad_at = 0;
  };
  void start(Slot& slot, const FcMean& mean, std::size_t first, std::size_t count);
  bool finish(Slot& slot);  // false: the piece holds a value that is not finite

  std::size_t bytes_;
  std::vector<Source> sources_;  // of the current block
  Slot slots_[2];
};

class StagedDevice {
 public:
  // Throws Error{kConfig} if the first lane can't be opened; the others are opened when needed.
  StagedDevice(OpenQueue open, std::size_t bytes, unsigned lanes);

  // As FcDevice::mean. The first error of the device is its last: it declines from then on.
  int mean(const FcMean& mean) noexcept;

  std::uint64_t blocks() const noexcept { return blocks_.load(); }  // computed so far
  std::string failure() const;                                      // empty: there was none

 private:
  std::unique_ptr<Lane> borrow();
  void give_back(std::unique_ptr<Lane> lane);

  const OpenQueue open_;
  const std::size_t bytes_;
  mutable std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<std::unique_ptr<Lane>> idle_;
  unsigned unopened_;
  std::atomic<bool> failed_{false};
  std::atomic<std::uint64_t> blocks_{0};
  std::string failure_;
};

}  // namespace fedcore::cuda
