// The collector's use of the spill file: which chunks go there, and which slots come free again.
#include "collect/collector.hpp"

#include <algorithm>
#include <utility>

namespace fedcore {

// What stays free of a window for chunks that are under way to the spill file.
std::uint64_t Collector::spill_room(const Pull& pull) const noexcept {
  return std::clamp<std::uint64_t>(pull.window / 2, 1, std::uint64_t{2} * kMaxRange);
}

bool Collector::spill(std::size_t source, std::uint64_t position, const Held& chunk) {
  if (no_room_) {
    return false;
  }
  Pull& pull = *pulls_[source];
  const std::uint64_t index = pull.feed.chunk(position);
  const auto put = [&] { return options_.spill->put(sources_[source].set, index, chunk.body()); };
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
    pull.spilled.resize(static_cast<std::size_t>(layout_of(sources_[source]).chunk_count()));
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

// A chunk of a source, from its slot; nothing if the slot does not hold a body of it any more. It is
// asked for again then. A killed process may have left it there, so all of it is checked as if it came.
std::optional<Body> Collector::spilled_chunk(std::size_t source, std::uint64_t position) {
  Pull& pull = *pulls_[source];
  const std::uint64_t index = pull.feed.chunk(position);
  std::uint32_t& slot = pull.spilled[index];
  const std::optional<Body> body = options_.spill->at(slot - 1);
  if (body && is_body(source, index, *body)) {
    return body;
  }
  options_.spill->free(std::exchange(slot, 0) - 1);
  if (position < pull.next) {
    pull.again.insert(position);
    ++pull.due;
  }
  return std::nullopt;
}

bool Collector::is_body(std::size_t source, std::uint64_t index, const Body& body) {
  if (body.encoding == Encoding::kRaw) {
    return body.size == layout_of(sources_[source]).chunk_range(index).nbytes;
  }
  Codec* const codec = codec_of(sources_[source]);
  Body checked;
  return codec != nullptr && codec->check(index, static_cast<std::uint8_t>(body.encoding),
                                          body.data, body.size, checked) == nullptr;
}

}  // namespace fedcore
