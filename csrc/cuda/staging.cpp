#include "cuda/staging.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <utility>

namespace fedcore::cuda {
namespace {

// What a device wants its arrays aligned to, and more.
constexpr std::size_t kAlign = 256;

std::size_t align(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

std::size_t word_size(int dtype) { return dtype == FC_F64 ? 8 : dtype == FC_F32 ? 4 : 2; }

}  // namespace

Lane::Lane(const OpenQueue& open, std::size_t bytes) : bytes_(bytes) {
  for (Slot& slot : slots_) {
    slot.queue = open(bytes);
  }
}

// A block holds: addresses of the inputs, weights | inputs | flag | result. All up to the flag goes
// up in one copy, flag and result come down in one.
int Lane::mean(int dtype, const void* const* inputs, const double* weights, std::size_t k,
               double total, void* out, std::size_t count) {
  const std::size_t head = align(k * (sizeof(void*) + sizeof(double)));
  if (bytes_ < head + kAlign * (k + 2)) {
    return FC_MEAN_DECLINED;
  }
  const std::size_t most = (bytes_ - head - kAlign) / (k + 1) / kAlign * kAlign;
  const std::size_t size = word_size(dtype);
  bool finite = true;
  unsigned turn = 0;
  for (std::size_t at = 0; at < count * size; at += most) {
    const std::size_t n = std::min(most, count * size - at);
    const std::size_t stride = align(n);
    const std::size_t bad_at = head + k * stride;
    Slot& slot = slots_[turn++ % 2];
    finite = finish(slot) && finite;
    std::uint8_t* const host = slot.queue->host();
    std::uint8_t* const device = slot.queue->device();
    for (std::size_t i = 0; i < k; ++i) {
      const void* const input = device + head + i * stride;
      std::memcpy(host + i * sizeof input, static_cast<const void*>(&input), sizeof input);
      std::memcpy(host + head + i * stride, static_cast<const std::uint8_t*>(inputs[i]) + at, n);
    }
    std::memcpy(host + k * sizeof(void*), weights, k * sizeof(double));
    std::memset(host + bad_at, 0, kAlign);
    slot.queue->upload(bad_at + kAlign);
    slot.queue->launch({dtype, reinterpret_cast<const void* const*>(device),
                        reinterpret_cast<const double*>(device + k * sizeof(void*)), k, total,
                        device + bad_at + kAlign, n / size,
                        reinterpret_cast<std::uint32_t*>(device + bad_at)});
    slot.queue->download(bad_at, kAlign + n);
    slot.to = static_cast<std::uint8_t*>(out) + at;
    slot.nbytes = n;
    slot.bad_at = bad_at;
  }
  for (Slot& slot : slots_) {
    finite = finish(slot) && finite;
  }
  return finite ? FC_MEAN_FINITE : FC_MEAN_NON_FINITE;
}

bool Lane::finish(Slot& slot) {
  if (slot.to == nullptr) {
    return true;
  }
  slot.queue->wait();
  const std::uint8_t* const from = slot.queue->host() + slot.bad_at;
  std::uint32_t bad;
  std::memcpy(&bad, from, sizeof bad);
  std::memcpy(slot.to, from + kAlign, slot.nbytes);
  slot.to = nullptr;
  return bad == 0;
}

StagedDevice::StagedDevice(OpenQueue open, std::size_t bytes, unsigned lanes)
    : open_(std::move(open)), bytes_(bytes), unopened_(lanes - 1) {
  idle_.push_back(std::make_unique<Lane>(open_, bytes_));
}

int StagedDevice::mean(int dtype, const void* const* inputs, const double* weights, std::size_t k,
                       double total, void* out, std::size_t count) noexcept {
  if (failed_.load()) {
    return FC_MEAN_DECLINED;
  }
  try {
    std::unique_ptr<Lane> lane = borrow();
    if (lane == nullptr) {
      return FC_MEAN_DECLINED;
    }
    const int verdict = lane->mean(dtype, inputs, weights, k, total, out, count);
    give_back(std::move(lane));
    blocks_.fetch_add(verdict == FC_MEAN_DECLINED ? 0 : 1);
    return verdict;
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    if (!failed_.exchange(true)) {
      failure_ = error.what();
    }
  }
  returned_.notify_all();  // whoever waits for this lane waits in vain
  return FC_MEAN_DECLINED;
}

std::string StagedDevice::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

// A lane, or nullptr once the device has failed.
std::unique_ptr<Lane> StagedDevice::borrow() {
  std::unique_lock lock(mutex_);
  if (idle_.empty() && unopened_ > 0) {
    --unopened_;
    lock.unlock();
    return std::make_unique<Lane>(open_, bytes_);
  }
  returned_.wait(lock, [&] { return !idle_.empty() || failed_.load(); });
  if (failed_.load()) {
    return nullptr;
  }
  std::unique_ptr<Lane> lane = std::move(idle_.back());
  idle_.pop_back();
  return lane;
}

void StagedDevice::give_back(std::unique_ptr<Lane> lane) {
  {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(lane));
  }
  returned_.notify_one();
}

}  // namespace fedcore::cuda
