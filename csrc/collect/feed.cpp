#include "collect/feed.hpp"

#include "base/error.hpp"

namespace fedcore {

Feed::Feed(const std::vector<std::vector<std::uint64_t>>& needs)
    : outputs_(needs.size()), count_(0), needs_(needs.size()) {
  for (std::uint64_t i = 0; i < outputs_; ++i) {
    end_.push_back(chunks_.size());
    for (const std::uint64_t chunk : needs[i]) {
      entry_.resize(std::max<std::size_t>(entry_.size(), chunk + 1));
      if (entry_[chunk] == 0) {
        chunks_.push_back(chunk);
        last_.push_back(i);
        entry_[chunk] = chunks_.size();
      }
      needs_[i].push_back(entry_[chunk] - 1);
      last_[entry_[chunk] - 1] = i;
    }
  }
  count_ = chunks_.size();
  if (count_ == 0) {
    throw Error(Errc::kLayout, "the output depends on nothing of a source");
  }
  for (std::uint64_t i = 0; i < outputs_; ++i) {
    std::uint64_t entry = 0, wanted = 0;
    while (entry < count_ && last_[entry] < i) {
      ++entry;
    }
    first_.push_back(entry);
    const std::uint64_t end = i + 1 < outputs_ ? end_[i + 1] : count_;
    for (; entry < end; ++entry) {
      wanted += last_[entry] >= i ? 1 : 0;
    }
    most_ = std::max(most_, wanted);
  }
}

std::optional<std::uint64_t> Feed::find(std::uint64_t chunk, std::uint64_t p) const noexcept {
  if (identity()) {
    return chunk < count_ ? std::optional(p + (chunk + count_ - p % count_) % count_)
                          : std::nullopt;
  }
  if (chunk >= entry_.size() || entry_[chunk] == 0) {
    return std::nullopt;
  }
  const std::uint64_t q = at_turn(p) + entry_[chunk] - 1;
  return wanted(q, p) ? q : q + count_;
}

std::uint64_t Feed::near(std::uint64_t p, std::uint64_t window) const noexcept {
  if (identity()) {
    return p + window;
  }
  std::uint64_t q = first(p);
  while (window > 0) {
    window -= wanted(q, p) ? 1 : 0;
    ++q;
  }
  return q;
}

std::uint64_t Feed::left(std::uint64_t p, std::uint64_t end) const noexcept {
  if (identity()) {
    return end - p;
  }
  std::uint64_t count = 0;
  for (std::uint64_t q = first(p); q < this->end(end); ++q) {
    count += wanted(q, p) ? 1 : 0;
  }
  return count;
}

}  // namespace fedcore
