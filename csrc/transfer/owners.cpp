// The exchange's owners: who is heard at present and how much of it, and the control messages that
// wait for Python.
#include <algorithm>
#include <utility>

#include "transfer/exchange.hpp"

namespace fedcore {
namespace {

std::string_view owner_name(std::string_view peer) { return peer.substr(0, peer.find('\0')); }

}  // namespace

bool Exchange::is_blocked(std::string_view peer) const {
  return !blocked_.empty() && blocked_.contains(std::string(owner_name(peer)));
}

Exchange::Owner& Exchange::owner_of(std::string_view peer) {
  return owners_[std::string(owner_name(peer))];
}

void Exchange::refill(Owner& owner, std::int64_t now_ms) {
  const double seconds = static_cast<double>(now_ms - owner.paced_ms) / 1000.0;
  owner.messages = std::min(kControlBurst, owner.messages + kControlPerSecond * seconds);
  owner.bytes = std::min(kControlBurstBytes, owner.bytes + kControlBytesPerSecond * seconds);
  owner.frames = std::min(kFrameBurst, owner.frames + kFramesPerSecond * seconds);
  owner.unasked = std::max(0.0, owner.unasked - kUnaskedBytesPerSecond * seconds);
  owner.paced_ms = now_ms;
}

void Exchange::charge(std::string_view peer, double frames, std::size_t bytes) {
  if (limits_.paced) {
    Owner& owner = owner_of(peer);
    owner.frames -= frames;
    owner.unasked += static_cast<double>(bytes);
  }
}

// Whether a peer's owner is heard at present: it is not muted, and has not sent too many frames.
bool Exchange::is_within_rate(std::string_view peer, std::int64_t now_ms) {
  if (!limits_.paced && !owners_.contains(std::string(owner_name(peer)))) {
    return true;  // in plain text anybody has any number of names: what is no message keeps none
  }
  Owner& owner = owner_of(peer);
  refill(owner, now_ms);
  if (now_ms < owner.muted_until_ms) {
    return false;
  }
  const bool unasked = owner.unasked > static_cast<double>(limits_.unasked);
  if (limits_.paced && (owner.frames < 1 || unasked)) {
    if (!std::exchange(owner.flooded, true)) {
      report(Event::Kind::kRate, peer,
             unasked ? "more than " + std::to_string(limits_.unasked >> 20) +
                           " MiB that nobody asked for"
                     : "more than " + std::to_string(static_cast<int>(kFramesPerSecond)) +
                           " frames a second, or many malformed ones");
    }
    return false;
  }
  // Told again only when it was calm in between: else each frame that its rate allows would be a
  // flood.
  owner.flooded = owner.flooded && (owner.waiting > 0 || owner.frames < kFrameBurst / 2 ||
                                    owner.unasked > static_cast<double>(limits_.unasked) / 2);
  return true;
}

// Whether a peer is heard: its owner has not too many others that speak.
bool Exchange::may_speak(const std::string& peer, std::int64_t now_ms) {
  const auto known = contacts_.find(peer);
  if (known != contacts_.end() && known->second.counted) {
    return true;
  }
  Owner& owner = owner_of(peer);
  if (owner.peers.size() >= kMaxPeersPerOwner) {
    std::erase_if(owner.peers, [&](const std::string& other) {
      const auto found = contacts_.find(other);
      if (found == contacts_.end()) {
        return true;
      }
      found->second.counted = now_ms - found->second.heard_ms.value_or(0) <= kLivelyMs;
      return !found->second.counted;
    });
  }
  if (owner.peers.size() >= kMaxPeersPerOwner) {
    if (!std::exchange(owner.too_many, true)) {
      report(Event::Kind::kConnections, peer,
             "more than " + std::to_string(kMaxPeersPerOwner) + " connections at once");
    }
    return false;
  }
  owner.too_many = false;
  std::erase(owner.peers, peer);
  owner.peers.push_back(peer);
  contacts_[peer].counted = true;
  return true;
}

int Exchange::on_control(const std::string& peer, const Frame& body) {
  Owner& owner = owner_of(peer);
  const std::uint64_t size = body.size();
  const auto before = controls_.find(peer);
  const std::uint64_t number =
      before == controls_.end() ? audience_of(peer) : before->second.audience;
  const auto [used, limit] = control_use(number);
  // Who has said more than its rate leaves half for the others.
  const std::uint64_t total = limits_.paced && owner.bytes <= 0 ? limit / 2 : limit;
  const bool room =
      owner.waiting == 0
          ? used == 0 || (limits_.paced && size <= kSmallControlBytes) || used + size <= total
          : owner.waiting < kMaxControlPerPeer &&
                owner.waiting_bytes + size <= limits_.control_per_peer && used + size <= total;
  if (!room) {
    ++stats_.dropped;
    // Where the others fill the queue nobody is to blame: what is lost is said again.
    const bool its_own =
        owner.waiting >= kMaxControlPerPeer ||
        (owner.waiting > 0 && owner.waiting_bytes + size > limits_.control_per_peer);
    if (its_own && !std::exchange(owner.flooded, true)) {
      report(Event::Kind::kRate, peer,
             std::to_string(owner.waiting) + " control messages of " +
                 std::to_string(owner.waiting_bytes) + " bytes are waiting");
    }
    return FC_DROP;
  }
  Audience& audience = audiences_[number];
  Waiting& waiting = controls_[peer];
  if (waiting.messages.empty()) {
    waiting.audience = number;
    audience.control_turns.push_back(peer);
  }
  waiting.messages.emplace_back(reinterpret_cast<const char*>(body.data()), body.size());
  ++owner.waiting;
  owner.waiting_bytes += size;
  audience.control_bytes += size;
  unsignalled_ = true;
  return FC_DONE;
}

// Whether a message of this owner may be handed out now.
bool Exchange::is_due(Owner& owner, std::int64_t now_ms) const {
  if (!limits_.paced) {
    return true;
  }
  refill(owner, now_ms);
  return owner.messages >= 1 && owner.bytes > 0;
}

std::optional<ControlMessage> Exchange::next_control_of(Audience& audience, std::int64_t now_ms) {
  std::deque<std::string>& turns = audience.control_turns;
  for (std::size_t left = turns.size(); left > 0; --left) {
    std::string peer = std::move(turns.front());
    turns.pop_front();
    Owner& owner = owner_of(peer);
    if (!is_due(owner, now_ms)) {
      turns.push_back(std::move(peer));
      continue;
    }
    const auto found = controls_.find(peer);
    std::deque<std::string>& waiting = found->second.messages;
    ControlMessage message{std::move(peer), std::move(waiting.front())};
    waiting.pop_front();
    const std::uint64_t size = message.body.size();
    owner.messages -= 1;
    owner.bytes -= static_cast<double>(size);
    owner.waiting_bytes -= size;
    audience.control_bytes -= size;
    owner.flooded = --owner.waiting > 0 && owner.flooded;
    if (waiting.empty()) {
      controls_.erase(found);
    } else {
      turns.push_back(message.peer);
    }
    return message;
  }
  return std::nullopt;
}

void Exchange::discard(const std::string& peer) {
  const std::lock_guard lock(mutex_);
  discard_where([&](std::string_view other) { return other == peer; });
}

void Exchange::discard_where(const std::function<bool(std::string_view)>& which) {
  for (auto& [number, audience] : audiences_) {
    std::erase_if(audience.control_turns, which);
  }
  std::erase_if(controls_, [&](const auto& entry) {
    if (!which(entry.first)) {
      return false;
    }
    Owner& owner = owner_of(entry.first);
    for (const std::string& body : entry.second.messages) {
      --owner.waiting;
      owner.waiting_bytes -= body.size();
      audiences_[entry.second.audience].control_bytes -= body.size();
    }
    owner.flooded = owner.waiting > 0 && owner.flooded;
    return true;
  });
}

void Exchange::block(const std::string& user, bool blocked) {
  const std::lock_guard lock(mutex_);
  if (!blocked) {
    blocked_.erase(user);
    return;
  }
  blocked_.insert(user);
  std::erase_if(contacts_, [&](const auto& entry) { return is_blocked(entry.first); });
  std::erase_if(requests_, [&](const auto& entry) { return is_blocked(entry.first); });
  for (auto& [number, audience] : audiences_) {
    std::erase_if(audience.chunk_turns, [&](const auto& peer) { return is_blocked(peer); });
  }
  discard_where([&](std::string_view peer) { return is_blocked(peer); });
}

void Exchange::mute(const std::string& peer, std::int64_t until_ms) {
  const std::lock_guard lock(mutex_);
  owner_of(peer).muted_until_ms = until_ms;
  const std::string owner(owner_name(peer));
  discard_where([&](std::string_view other) { return owner_name(other) == owner; });
}

}  // namespace fedcore
