#include "collect/pace.hpp"

#include <algorithm>

namespace fedcore {

void Pace::asked(std::int64_t now_ms, std::uint32_t count) { asked_.push_back({now_ms, count}); }

void Pace::came(std::int64_t now_ms) noexcept {
  if (asked_.empty()) {
    return;
  }
  Asked& oldest = asked_.front();
  const std::int64_t waited = std::max<std::int64_t>(0, now_ms - oldest.at_ms);
  const auto took = static_cast<double>(std::clamp<std::int64_t>(now_ms - came_ms_, 0, waited));
  if (--oldest.left == 0) {
    asked_.pop_front();
  }
  came_ms_ = now_ms;
  // A slower chunk counts at once, faster ones little by little.
  known_.chunk_ms = std::max(took, (7 * std::max(known_.chunk_ms, 0.0) + took) / 8);
  if (waited <= kAheadMs) {
    known_.ahead = std::min(known_.ahead + 1, kMaxAhead);
  } else {  // by Little's law, what would have come within the time
    known_.ahead = std::max<std::uint64_t>(1, known_.ahead * static_cast<std::uint64_t>(kAheadMs) /
                                                  static_cast<std::uint64_t>(waited));
  }
}

std::int64_t Pace::patience_ms() const noexcept {
  if (known_.chunk_ms < 0) {
    return kFirstMs;
  }
  return kPatience * static_cast<std::int64_t>(known_.chunk_ms);
}

}  // namespace fedcore
