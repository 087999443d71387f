// The exchange's contacts: when each peer was heard last, and until when its silence is none.
#include <algorithm>
#include <utility>

#include "transfer/exchange.hpp"

namespace fedcore {

void Exchange::remember(const std::string& peer, wire::Kind kind, std::int64_t now_ms) {
  Contact& contact = contacts_[peer];
  contact.heard_ms = now_ms;
  contact.held_up_ms = hold_ups_.total_ms();
  contact.unreachable = false;
  if (kind == wire::Kind::kPing && !std::exchange(contact.met, true)) {
    report(Event::Kind::kUnknownPeer, peer, "");  // it joined a process before this one
  }
  contact.met = contact.met || kind == wire::Kind::kControl;
  if (kind != wire::Kind::kChunk) {
    for (const auto& collector : collectors_) {
      if (const auto source = collector->on_sign(peer, now_ms)) {
        note_patience(*collector, *source, now_ms);
      }
    }
  }
  if (contacts_.size() <= kMaxRemembered || now_ms < next_forgetting_ms_) {
    return;
  }
  const bool many = contacts_.size() > kMaxContacts;
  const std::int64_t silent = many ? kForgetMs / 60 : kForgetMs;
  next_forgetting_ms_ = now_ms + (many ? kForgetMs / 3600 : kForgetMs / 60);
  std::erase_if(contacts_, [&](const auto& entry) {
    return now_ms - entry.second.heard_ms.value_or(0) > silent;
  });
  std::erase_if(owners_, [&](const auto& entry) {
    const Owner& owner = entry.second;
    return owner.waiting == 0 && owner.muted_until_ms <= now_ms &&
           std::none_of(owner.peers.begin(), owner.peers.end(),
                        [&](const auto& other) { return contacts_.contains(other); });
  });
}

void Exchange::heartbeat(std::int64_t interval_ms) {
  const std::lock_guard lock(mutex_);
  interval_ms_ = interval_ms;
}

bool Exchange::silent(std::int64_t now_ms) const {
  const std::lock_guard lock(mutex_);
  if (interval_ms_ <= 0) {
    return false;
  }
  const auto found = contacts_.find("");
  const std::int64_t busy = found == contacts_.end() ? 0 : found->second.busy_until_ms;
  return now_ms > silence_.until_ms(interval_ms_, busy);
}

void Exchange::dialled(std::int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  silence_.dialled(now_ms);
  for (const auto& collector : collectors_) {
    for (std::size_t k = 0; k < collector->sources().size(); ++k) {
      collector->retry(k, std::nullopt);
    }
  }
}

void Exchange::reconnected(std::int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  silence_.dialled(now_ms);
}

void Exchange::sent(std::uint64_t bytes, std::int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  silence_.sent(bytes, now_ms);
}

void Exchange::moved(std::int64_t received, std::int64_t acked, std::int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  silence_.moved(received, acked, now_ms);
}

std::optional<std::int64_t> Exchange::last_heard(const std::string& peer) const {
  const std::lock_guard lock(mutex_);
  const auto found = contacts_.find(peer);
  return found == contacts_.end() ? std::nullopt : found->second.heard_ms;
}

std::optional<std::int64_t> Exchange::silent_ms(const std::string& peer,
                                                std::int64_t now_ms) const {
  const std::lock_guard lock(mutex_);
  const auto found = contacts_.find(peer);
  const auto heard_ms = found == contacts_.end() ? std::nullopt : found->second.heard_ms;
  if (!heard_ms) {
    return std::nullopt;
  }
  const std::int64_t unread = hold_ups_.total_ms() - found->second.held_up_ms;
  return std::max<std::int64_t>(0, now_ms - *heard_ms - unread);
}

std::int64_t Exchange::busy_until(const std::string& peer) const {
  const std::lock_guard lock(mutex_);
  const auto found = contacts_.find(peer);
  const bool may_be = found != contacts_.end() && !found->second.unreachable;
  return may_be ? found->second.busy_until_ms : 0;
}

void Exchange::unreachable(std::string_view peer) {
  const std::lock_guard lock(mutex_);
  const auto found = contacts_.find(std::string(peer));
  if (found != contacts_.end()) {
    found->second.unreachable = true;
  }
}

void Exchange::forget(const std::string& peer) {
  const std::lock_guard lock(mutex_);
  contacts_.erase(peer);
  std::erase(owner_of(peer).peers, peer);
  requests_.erase(peer);
  for (auto& [number, audience] : audiences_) {
    std::erase(audience.chunk_turns, peer);
  }
}

}  // namespace fedcore
