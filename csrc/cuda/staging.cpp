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

std::size_t head_bytes(std::size_t k) {
  return align(k * (sizeof(quantise::Input) + sizeof(double)));
}

Source source_of(const FcMean& mean, std::size_t i) {
  const auto* const data = static_cast<const std::uint8_t*>(mean.inputs[i]);
  const auto encoding =
      static_cast<Encoding>(mean.encodings != nullptr ? mean.encodings[i] : std::uint8_t{FC_RAW});
  if (encoding == Encoding::kRaw) {
    return {encoding, data, {{{0, 1, word_size(mean.dtype)}, {0, 1, 0}, {0, 1, 0}}}};
  }
  return {encoding, data, quantise::arrays(encoding, mean.count)};
}

// The bytes that a piece of `count` elements takes at most, wherever in a run it begins.
std::size_t room_for(const std::vector<Source>& sources, bool has_base, std::size_t width,
                     std::size_t count) {
  std::size_t bytes = head_bytes(sources.size()) + kAlign + align(count * width);
  for (const Source& source : sources) {
    for (const quantise::Array& array : source.arrays) {
      const std::size_t cut = array.per > 1 ? 2 : 0;  // entries at both ends that it shares
      bytes += align((count / array.per + cut) * array.width);
    }
  }
  return bytes + (has_base ? align(count * width) : 0);
}

// The most elements, a multiple of `unit`, that a piece in `bytes` can have.
std::size_t most_elements(const std::vector<Source>& sources, bool has_base, std::size_t width,
                          std::size_t unit, std::size_t bytes) {
  std::size_t fit = 0, beyond = bytes / kAlign + 1;
  while (beyond - fit > 1) {
    const std::size_t middle = fit + (beyond - fit) / 2;
    (room_for(sources, has_base, width, middle * unit) <= bytes ? fit : beyond) = middle;
  }
  return fit * unit;
}

// Fills a block from its start on.
class Filling {
 public:
  Filling(Queue& queue, std::size_t at) : host_(queue.host()), device_(queue.device()), at_(at) {}

  // Returns where the copy will lie on the device.
  const std::uint8_t* add(const std::uint8_t* from, std::size_t nbytes) {
    std::memcpy(host_ + at_, from, nbytes);
    const std::uint8_t* const there = device_ + at_;
    at_ += align(nbytes);
    return there;
  }

  // The entries of an array that elements first to first + count need.
  const std::uint8_t* add(const std::uint8_t* run, const quantise::Array& array, std::size_t first,
                          std::size_t count) {
    const std::size_t begin = first / array.per;
    const std::size_t end = (first + count + array.per - 1) / array.per;
    return add(run + array.offset + begin * array.width, (end - begin) * array.width);
  }

  std::size_t at() const { return at_; }

 private:
  std::uint8_t* host_;
  const std::uint8_t* device_;
  std::size_t at_;
};

}  // namespace

Lane::Lane(const OpenQueue& open, std::size_t bytes) : bytes_(bytes) {
  for (Slot& slot : slots_) {
    slot.queue = open(bytes);
  }
}

int Lane::mean(const FcMean& mean) {
  sources_.clear();
  for (std::size_t i = 0; i < mean.k; ++i) {
    if (mean.encodings != nullptr && mean.encodings[i] > FC_NF4) {
      return FC_MEAN_DECLINED;
    }
    sources_.push_back(source_of(mean, i));
  }
  const std::size_t width = word_size(mean.dtype);
  const std::size_t most =
      most_elements(sources_, mean.base != nullptr, width, kAlign / width, bytes_);
  if (most == 0) {
    return FC_MEAN_DECLINED;
  }
  bool finite = true;
  unsigned turn = 0;
  for (std::size_t first = 0; first < mean.count; first += most) {
    Slot& slot = slots_[turn++ % 2];
    finite = finish(slot) && finite;
    start(slot, mean, first, std::min(most, mean.count - first));
  }
  for (Slot& slot : slots_) {
    finite = finish(slot) && finite;
  }
  return finite ? FC_MEAN_FINITE : FC_MEAN_NON_FINITE;
}

// A block holds: inputs' descriptions, weights | their arrays | base | flag | result. All up to the
// flag goes up in one copy, flag and result come down in one.
void Lane::start(Slot& slot, const FcMean& mean, std::size_t first, std::size_t count) {
  const std::size_t k = sources_.size(), width = word_size(mean.dtype);
  std::uint8_t* const host = slot.queue->host();
  std::uint8_t* const device = slot.queue->device();
  Filling filling(*slot.queue, head_bytes(k));
  for (std::size_t i = 0; i < k; ++i) {
    const Source& source = sources_[i];
    const std::uint8_t* there[3];
    for (std::size_t a = 0; a < 3; ++a) {
      there[a] = filling.add(source.data, source.arrays[a], first, count);
    }
    const quantise::Input input{there[0], reinterpret_cast<const float*>(there[1]), there[2],
                                source.encoding};
    std::memcpy(host + i * sizeof input, &input, sizeof input);
  }
  std::memcpy(host + k * sizeof(quantise::Input), mean.weights, k * sizeof(double));
  const auto* const base = static_cast<const std::uint8_t*>(mean.base);
  const std::uint8_t* const base_there =
      base != nullptr ? filling.add(base + first * width, count * width) : nullptr;
  const std::size_t bad_at = filling.at();
  std::memset(host + bad_at, 0, kAlign);
  slot.queue->upload(bad_at + kAlign);
  slot.queue->launch({mean.dtype, reinterpret_cast<const quantise::Input*>(device),
                      reinterpret_cast<const double*>(device + k * sizeof(quantise::Input)), k,
                      mean.total, base_there, first, device + bad_at + kAlign, count,
                      reinterpret_cast<std::uint32_t*>(device + bad_at)});
  slot.queue->download(bad_at, kAlign + count * width);
  slot.to = static_cast<std::uint8_t*>(mean.out) + first * width;
  slot.nbytes = count * width;
  slot.bad_at = bad_at;
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

int StagedDevice::mean(const FcMean& mean) noexcept {
  if (failed_.load()) {
    return FC_MEAN_DECLINED;
  }
  try {
    std::unique_ptr<Lane> lane = borrow();
    if (lane == nullptr) {
      return FC_MEAN_DECLINED;
    }
    const int verdict = lane->mean(mean);
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
