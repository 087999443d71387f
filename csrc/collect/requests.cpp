// The collector's flow control: which range is asked of which source next, and which again.
#include <algorithm>
#include <string>

#include "base/error.hpp"
#include "collect/collector.hpp"

namespace fedcore {
namespace {

constexpr std::int64_t kProbeMs = 1000;  // silence after which a source that is due is pinged

}  // namespace

// The position up to which a source may be asked at present.
std::uint64_t Collector::near_end(std::size_t source) const noexcept {
  if (group_ == 0) {
    const Feed& feed = pulls_[source]->feed;
    return std::min(feed.end(end_), feed.near(next_, pulls_[source]->window));
  }
  if (open_) {
    return next_;
  }
  const std::uint64_t rank = pulls_[source]->rank;
  const std::uint64_t reach = folded_ + group_;
  const std::uint64_t chunks =
      reach > rank ? (reach - rank + counted_.size() - 1) / counted_.size() : 0;
  return std::min(end_, next_ + chunks);
}

std::optional<GetRequest> Collector::next_request(std::int64_t now_ms) {
  if (state_ != State::kActive || (open_ && !options_.rule->chunkwise())) {
    return std::nullopt;
  }
  for (std::size_t step = 0; step < pulls_.size(); ++step) {
    const std::size_t k = (turn_ + step) % pulls_.size();
    if (!is_pulled(*pulls_[k])) {
      continue;
    }
    const auto request =
        pulls_[k]->again.empty() ? request_next(k, now_ms) : request_again(k, now_ms);
    if (request) {
      turn_ = k + 1;
      return request;
    }
  }
  return std::nullopt;
}

std::optional<GetRequest> Collector::request_again(std::size_t source, std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  std::set<std::uint64_t>& again = pull.again;
  const std::uint64_t first = *again.begin();
  const std::uint64_t chunk = pull.feed.chunk(first);
  std::uint32_t count = 0;
  while (count < kMaxRange && pull.feed.chunk(first + count) == chunk + count &&
         again.erase(first + count) == 1) {
    ++count;
  }
  pull.heard_ms = now_ms;
  pull.pace.asked(now_ms, count);
  return GetRequest{source, chunk, count};
}

std::optional<GetRequest> Collector::request_next(std::size_t source, std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  const Feed& feed = pull.feed;
  const std::uint64_t end = feed.end(end_);
  pull.next = std::max(pull.next, feed.first(next_));  // what was here already was not asked for
  while (pull.next < end && (is_spilled(pull, pull.next) || !feed.wanted(pull.next, next_))) {
    ++pull.next;  // a chunk of the turn before
  }
  const std::uint64_t near = near_end(source);
  if (pull.next >= near && pull.next < end && !pull.ahead) {
    start_spilling(source, now_ms);
    if (state_ != State::kActive) {
      return std::nullopt;
    }
  }
  const bool ahead = pull.ahead && !no_room_;
  const std::uint64_t limit = ahead ? end : near;
  const std::uint64_t under_way = std::min(pull.window, pull.pace.ahead());
  if (pull.next >= limit || pull.held.size() + pull.due >= pull.window || pull.due >= under_way) {
    return std::nullopt;
  }
  std::uint64_t free = std::min(
      {limit - pull.next, pull.window - pull.held.size() - pull.due, under_way - pull.due});
  // Small requests are saved up while others are under way.
  const std::uint64_t worth =
      std::min<std::uint64_t>(kMaxRange, std::max<std::uint64_t>(1, under_way / 2));
  if (free < worth && limit < end && pull.due > 0) {
    return std::nullopt;
  }
  if (pull.due == 0) {
    pull.heard_ms = now_ms;
  }
  free = std::min(free, std::uint64_t{kMaxRange});
  GetRequest request{source, feed.chunk(pull.next), 0};
  while (request.count < free && !is_spilled(pull, pull.next) && feed.wanted(pull.next, next_) &&
         feed.chunk(pull.next) == request.first + request.count) {
    ++request.count;
    ++pull.next;
  }
  pull.due += request.count;
  pull.pace.asked(now_ms, request.count);
  return request;
}

void Collector::ask_again(Pull& pull) {
  pull.pace.forget_asked();
  for (std::uint64_t position = pull.feed.first(next_); pull.due > 0 && position < pull.next;
       ++position) {
    if (pull.feed.wanted(position, next_) && !is_here(pull, position)) {
      pull.again.insert(position);
    }
  }
}

std::int64_t Collector::tick(std::int64_t now_ms) {
  if (state_ == State::kActive && work_left_) {
    reduce_ready();
  }
  if (state_ != State::kActive) {
    return -1;
  }
  std::int64_t wait = work_left_ ? 0 : -1;
  const auto sooner = [&wait](std::int64_t ms) { wait = wait < 0 ? ms : std::min(wait, ms); };
  for (std::size_t k = 0; k < pulls_.size(); ++k) {
    Pull& pull = *pulls_[k];
    if (pull.pressed_ms && !pull.ahead && !no_room_) {
      const std::int64_t left = *pull.pressed_ms + spill_after_ms() - now_ms;
      if (left > 0) {
        sooner(left);
      }
    }
    if (pull.due == 0) {
      continue;
    }
    sooner(check_silence(k, now_ms));
    probe(k, now_ms);
    sooner(std::max<std::int64_t>(
        1, std::max({pull.heard_ms, pull.sign_ms, pull.probed_ms}) + kProbeMs - now_ms));
  }
  return wait;
}

// Asks again for what a source that answers should have sent by now. While nothing at all comes,
// what was asked for may still be on its way, and asking again would only put more behind it.
// Returns ms until the next check.
std::int64_t Collector::check_silence(std::size_t source, std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  const std::int64_t patience = std::max(Pace::kFirstMs, pull.pace.patience_ms());
  const std::int64_t silence = now_ms - pull.heard_ms;
  const bool answers = pull.sign_ms >= pull.heard_ms + options_.stall_ms;
  if (!answers && silence < patience) {
    return patience - silence;
  }
  ask_again(pull);
  pull.heard_ms = now_ms;
  if (answers) {
    pull.silent_ms += silence;
  }
  events_.push_back({CollectorEvent::Kind::kStalled, source, "", "", pull.silent_ms});
  return options_.stall_ms;
}

void Collector::probe(std::size_t source, std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  if (now_ms - std::max({pull.heard_ms, pull.sign_ms, pull.probed_ms}) >= kProbeMs) {
    pull.probed_ms = now_ms;
    probes_.push_back(source);
  }
}

std::int64_t Collector::patience_ms(std::size_t source) const noexcept {
  const Pull& pull = *pulls_[source];
  return active() && is_pulled(pull) && pull.due > 0 ? pull.pace.patience_ms() : 0;
}

std::optional<std::size_t> Collector::on_sign(const std::string& peer,
                                              std::int64_t now_ms) noexcept {
  std::optional<std::size_t> due;
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    if (sources_[k].peer == peer) {
      pulls_[k]->sign_ms = now_ms;
      due = pulls_[k]->due > 0 ? std::optional(k) : due;
    }
  }
  return due;
}

void Collector::retry(std::size_t source, const std::optional<std::string>& peer) {
  if (source >= sources_.size()) {
    throw Error(Errc::kProtocol, "there is no source " + std::to_string(source));
  }
  if (peer) {
    sources_[source].peer = *peer;
  }
  if (state_ == State::kActive) {
    pulls_[source]->silent_ms = 0;
    ask_again(*pulls_[source]);
  }
}

}  // namespace fedcore
