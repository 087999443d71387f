// Chunks that are combined aside: a slow rule has one in its hands while frames come and go on.
#include <exception>
#include <utility>

#include "collect/collector.hpp"

namespace fedcore {

std::unique_ptr<Collector::Part> Collector::take_out() {
  if (!aside() || open_ || taken_ || state_ != State::kActive) {
    return nullptr;
  }
  if (next_ == end_) {
    finish();
    return nullptr;
  }
  lent_.reserve(counted_.size());  // none is thrown when a source is lost
  if (!gather(parts_[0])) {
    return nullptr;
  }
  copy_spilled(parts_[0]);
  taken_ = true;
  stale_ = false;
  return std::make_unique<Part>(std::move(parts_[0]));
}

// What lies in the spill file may move as soon as another chunk is put there.
void Collector::copy_spilled(Part& part) {
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    const Pull& pull = *pulls_[counted_[j]];
    if (!pull.held.contains(next_)) {
      Body& input = part.inputs[j];
      lent_.push_back({Frame::copy(input.data, input.size), input.encoding});
      input.data = lent_.back().frame.data();
      options_.spill->drop_pages(pull.spilled[part.index] - 1);
    }
  }
}

void Collector::combine(Part& part) const noexcept {
  part.failed.reset();
  try {
    reduce(part);
  } catch (const std::exception& error) {  // of memory, as a rule's own error is caught before
    part.failed = RuleError(error.what(), 0);
  }
}

void Collector::put_back(std::unique_ptr<Part> part) {
  taken_ = false;
  lent_.clear();
  if (parts_[0].reducer == nullptr) {  // no source was lost since, for whose loss there is another
    parts_[0] = std::move(*part);
  }
  if (stale_ || state_ != State::kActive) {
    return;
  }
  if (settle(parts_[0]) && next_ == end_) {
    finish();
  }
}

}  // namespace fedcore
