// The exchange's audiences: who may have which set, and whose turn it is to send or to be served.
#include <algorithm>
#include <utility>

#include "transfer/exchange.hpp"

namespace fedcore {

void Exchange::restrict_to(const wire::SetId& id, std::uint64_t audience) {
  const std::lock_guard lock(mutex_);
  publisher_.restrict_to(id, audience);
}

void Exchange::enrol(const std::string& peer, std::uint64_t audience) {
  const std::lock_guard lock(mutex_);
  move_to(peer, audience);
}

void Exchange::expel(const std::string& peer, std::uint64_t audience) {
  const std::lock_guard lock(mutex_);
  if (audience_of(peer) == audience) {
    move_to(peer, 0);
  }
}

void Exchange::move_to(const std::string& peer, std::uint64_t audience) {
  if (audience_of(peer) == audience) {
    return;
  }
  if (requests_.erase(peer) > 0) {
    std::erase(audiences_[audience_of(peer)].chunk_turns, peer);
  }
  if (audience == 0) {
    enrolled_.erase(peer);
  } else {
    enrolled_[peer] = audience;
  }
}

std::uint64_t Exchange::audience_of(const std::string& peer) const {
  const auto found = enrolled_.find(peer);
  return found == enrolled_.end() ? 0 : found->second;
}

void Exchange::limit_audience(std::uint64_t audience, std::uint64_t outgoing,
                              std::uint64_t control) {
  const std::lock_guard lock(mutex_);
  outgoing_->limit(outgoing, audience);
  audiences_[audience].control_limit = control;
}

ExchangeStats Exchange::stats_of(std::uint64_t audience) const {
  const std::lock_guard lock(mutex_);
  const auto found = audiences_.find(audience);
  return found == audiences_.end() ? ExchangeStats{} : found->second.stats;
}

// The bytes of control messages that wait where an audience's count, and their limit.
std::pair<std::uint64_t, std::uint64_t> Exchange::control_use(std::uint64_t audience) const {
  const auto found = audiences_.find(audience);
  if (found != audiences_.end()) {
    if (const auto& limit = found->second.control_limit) {
      return {found->second.control_bytes, *limit};
    }
  }
  std::uint64_t used = 0;
  for (const auto& [number, other] : audiences_) {
    used += other.control_limit ? 0 : other.control_bytes;
  }
  return {used, limits_.control};
}

std::optional<ControlMessage> Exchange::next_control(std::int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  for (std::size_t left = audiences_.size(); left > 0; --left) {
    auto turn = audiences_.upper_bound(last_audience_);
    if (turn == audiences_.end()) {
      turn = audiences_.begin();
    }
    last_audience_ = turn->first;
    if (auto message = next_control_of(turn->second, now_ms)) {
      return message;
    }
  }
  return std::nullopt;
}

// The next chunk that somebody asked for and that may go. The audience with the fewest bytes is
// served first. One that asks again after a pause, or that could not be served, has no claim on
// the time in between: it counts as if it had been served as much as the others.
std::optional<OutFrame> Exchange::next_chunk() {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> waiting;  // bytes served, audience
  for (auto& [number, audience] : audiences_) {
    if (!audience.chunk_turns.empty()) {
      audience.served = std::max(audience.served, served_);
      waiting.emplace_back(audience.served, number);
    }
  }
  std::sort(waiting.begin(), waiting.end());
  for (const auto& [served, number] : waiting) {
    Audience& audience = audiences_[number];
    if (auto frame = next_chunk_of(number, audience)) {
      served_ = served;
      audience.served += frame->body_size;
      return frame;
    }
  }
  return std::nullopt;
}

// The peers of an audience are served in turn, and one that has too much on its way is passed over.
std::optional<OutFrame> Exchange::next_chunk_of(std::uint64_t number, Audience& audience) {
  std::deque<std::string>& turns = audience.chunk_turns;
  for (std::size_t left = turns.size(); left > 0; --left) {
    const std::string peer = std::move(turns.front());
    turns.pop_front();
    if (!requests_.contains(peer)) {
      continue;
    }
    auto frame = serve(peer, number);
    if (requests_.contains(peer)) {
      turns.push_back(peer);
    }
    if (frame) {
      return frame;
    }
  }
  return std::nullopt;
}

std::optional<OutFrame> Exchange::serve(const std::string& peer, std::uint64_t audience) {
  const auto waiting = requests_.find(peer);
  Request& request = waiting->second.front();
  const wire::SetId set = request.set;
  const std::uint64_t index = request.next;
  const auto found = publisher_.find(set, index);
  if (found && !outgoing_->may_go(peer, found->data, found->size, audience)) {
    return std::nullopt;
  }
  if (++request.next == request.end) {
    waiting->second.pop_front();
    if (waiting->second.empty()) {
      requests_.erase(waiting);
    }
  }
  wire::Header header;
  header.set = set;
  header.index = index;
  if (!found) {
    header.kind = wire::Kind::kRefuse;
    header.count = static_cast<std::uint32_t>(wire::Refusal::kUnknownSet);
    return OutFrame{peer, wire::encode(header), nullptr, nullptr, 0};
  }
  auto file = outgoing_->send(peer, found->file, found->data, found->size, audience);
  header.kind = wire::Kind::kChunk;
  header.encoding = found->encoding_byte;
  header.length = found->size;
  header.body_crc = publisher_.checksum(set, index);
  return OutFrame{peer, wire::encode(header), std::move(file), found->data, found->size};
}

}  // namespace fedcore
