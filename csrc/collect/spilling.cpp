// The collector's use of the spill file: which chunks go there, and which slots come free again.
#include "collect/collector.hpp"

#include <algorithm>
#include <utility>

namespace fedcore {

// What stays free of a window for chunks that are under way to the spill file.
std::uint64_t Collector::spill_room(const Pull& pull) const noexcept {
  return std::clamp<std::uint64_t>(pull.window / 2, 1, std::uint64_t{2} * kMaxRange);
}

// A chunk's flat bytes, until the next call; null, and all stops, if the base has changed.
const std::uint8_t* Collector::flat_bytes(std::uint64_t index, const Held& chunk) {
  if (chunk.encoding == Encoding::kRaw) {
    return chunk.frame.data();
  }
  const Range range = layout_->chunk_range(index);
  const std::uint64_t at = base_.offset + range.offset;
  flat_chunk_.resize(std::max<std::size_t>(flat_chunk_.size(), range.nbytes));
  options_.codec->decode(index, chunk.body(), base_.file->data() + at, flat_chunk_.data());
  const bool same = check_base(index);
  base_.file->release(at, range.nbytes);  // the reduction comes there much later
  return same ? flat_chunk_.data() : nullptr;
}

bool Collector::spill(std::size_t source, std::uint64_t position, const Held& chunk) {
  if (no_room_) {
    return false;
  }
  Pull& pull = *pulls_[source];
  const Layout& layout = layout_of(sources_[source]);
  const std::uint64_t index = pull.feed.chunk(position);
  const std::uint8_t* const bytes = flat_bytes(index, chunk);
  if (bytes == nullptr) {
    return false;
  }
  const auto put = [&] {
    return options_.spill->put(sources_[source].set, index, bytes,
                               layout.chunk_range(index).nbytes);
  };
  auto slot = put();
  if (!slot && recycle()) {
    slot = put();
  }
  if (!slot) {
    no_room_ = true;
    events_.push_back({CollectorEvent::Kind::kNoRoom, 0, "storage", options_.spill->problem()});
    return false;
  }
  if (pull.spilled.empty()) {
    pull.spilled.resize(static_cast<std::size_t>(layout.chunk_count()));
  }
  pull.spilled[index] = *slot + 1;
  return true;
}

// Frees a slot whose chunk was reduced and isn't due to be once more.
bool Collector::recycle() {
  while (!used_.empty()) {
    const auto [source, index] = used_.front();
    used_.pop_front();
    Pull& pull = *pulls_[source];
    if (!pull.spilled.empty() && pull.spilled[index] != 0 && !position_of(pull, index)) {
      options_.spill->free(std::exchange(pull.spilled[index], 0) - 1);
      return true;
    }
  }
  return false;
}

// While it is open, no other source is behind: they may all be ready at any moment, and nothing
// would have to be spilled.
std::int64_t Collector::spill_after_ms() const noexcept {
  return open_ ? 4 * options_.spill_after_ms : options_.spill_after_ms;
}

// A window that stays full means that another source is behind. Its farthest chunks make room.
bool Collector::start_spilling(std::size_t source, std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  if (!options_.spill || group_ > 0 || no_room_ || pull.due > 0) {
    return false;
  }
  if (!pull.pressed_ms) {
    pull.pressed_ms = now_ms;
  }
  if (now_ms - *pull.pressed_ms < spill_after_ms()) {
    return false;
  }
  while (pull.held.size() + spill_room(pull) > pull.window) {
    const auto last = std::prev(pull.held.end());
    if ((taken_ && last->first == next_) || !spill(source, last->first, last->second)) {
      return false;
    }
    pull.held.erase(last);
  }
  pull.ahead = true;
  return true;
}

}  // namespace fedcore
