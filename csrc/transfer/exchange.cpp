#include "transfer/exchange.hpp"

#include <algorithm>
#include <utility>

#include "base/error.hpp"

namespace fedcore {
namespace {

Exchange* self(void* pointer) { return static_cast<Exchange*>(pointer); }

// The pump can't be thrown at. What can fail below is memory alone, and a lost frame is asked for
// again.
int sink_deliver(void* pointer, std::int64_t now_ms, const void* peer, std::size_t peer_len,
                 const void* header, std::size_t header_len, const void* body, std::size_t body_len,
                 void* owner, void (*release)(void*)) {
  Frame frame(body, body_len, owner, release);
  try {
    const int verdict = self(pointer)->deliver(now_ms, {static_cast<const char*>(peer), peer_len},
                                               header, header_len, frame);
    if (verdict != FC_TAKEN) {
      frame.disown();
    }
    return verdict;
  } catch (const std::exception&) {
    if (!frame) {
      return FC_TAKEN;  // whoever it was moved to has it, or has released it
    }
    frame.disown();
    return FC_DROP;
  }
}

// What the pump holds while a body is on its way: the file stays mapped.
using Borrowed = std::shared_ptr<MappedFile>;

void sink_out_done(void* owner) { delete static_cast<Borrowed*>(owner); }

std::int64_t sink_tick(void* pointer, std::int64_t now_ms) { return self(pointer)->tick(now_ms); }

int sink_has_event(void* pointer) { return self(pointer)->has_event() ? 1 : 0; }

}  // namespace

Exchange::Exchange(WaitingMutex::Wait wait) : mutex_(wait) {
  sink_.self = this;
  sink_.deliver = sink_deliver;
  sink_.next_out = [](void* pointer, std::int64_t now_ms, FcOut* out) -> int {
    auto* exchange = self(pointer);
    auto frame = exchange->next_out(now_ms);
    if (!frame) {
      return 0;
    }
    exchange->sending_ = std::move(*frame);  // touched by the pump thread only
    OutFrame& kept = exchange->sending_;
    out->peer = reinterpret_cast<const std::uint8_t*>(kept.peer.data());
    out->peer_len = kept.peer.size();
    out->header = kept.header.data();
    out->body = kept.body;
    out->body_len = kept.body_size;
    out->owner = kept.keep ? new Borrowed(std::move(kept.keep)) : nullptr;
    return 1;
  };
  sink_.out_done = sink_out_done;
  sink_.tick = sink_tick;
  sink_.has_event = sink_has_event;
  sink_.unreachable = [](void* pointer, const void* peer, std::size_t size) {
    self(pointer)->unreachable({static_cast<const char*>(peer), size});
  };
  sink_.silent = [](void* pointer, std::int64_t now_ms) -> int {
    return self(pointer)->silent(now_ms) ? 1 : 0;
  };
  sink_.dialled = [](void* pointer, std::int64_t now_ms) { self(pointer)->dialled(now_ms); };
  sink_.sent = [](void* pointer, std::int64_t now_ms, std::size_t bytes) {
    self(pointer)->sent(bytes, now_ms);
  };
  sink_.moved = [](void* pointer, std::int64_t now_ms, std::int64_t received, std::int64_t acked) {
    self(pointer)->moved(received, acked, now_ms);
  };
  sink_.wake_fd = outgoing_->wake_fd();
  sink_.clear_wake = [](void* pointer) { self(pointer)->outgoing().clear_wake(); };
}

void Exchange::set_limits(const ExchangeLimits& limits) {
  const std::lock_guard lock(mutex_);
  limits_ = limits;
  outgoing_->limit(limits.outgoing);
}

void Exchange::publish(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                       std::uint64_t offset, std::uint64_t length, std::uint64_t chunk_bytes,
                       const std::vector<std::uint32_t>& checksums) {
  const std::lock_guard lock(mutex_);
  publisher_.publish(id, std::move(file), offset, length, chunk_bytes, checksums);
}

void Exchange::publish_encoded(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                               std::vector<std::uint64_t> offsets,
                               std::vector<std::uint8_t> encodings,
                               const std::vector<std::uint32_t>& checksums) {
  const std::lock_guard lock(mutex_);
  publisher_.publish_encoded(id, std::move(file), std::move(offsets), std::move(encodings),
                             checksums);
}

void Exchange::publish_packed(const wire::SetId& id, std::shared_ptr<MappedFile> file,
                              std::uint64_t offset, std::unique_ptr<Packer> packer,
                              const std::vector<std::uint32_t>& checksums) {
  const std::lock_guard lock(mutex_);
  publisher_.publish_packed(id, std::move(file), offset, std::move(packer), checksums);
}

void Exchange::withdraw(const wire::SetId& id) {
  const std::lock_guard lock(mutex_);
  publisher_.withdraw(id);
}

std::vector<wire::SetId> Exchange::published() const {
  const std::lock_guard lock(mutex_);
  return publisher_.published();
}

int Exchange::deliver(std::int64_t now_ms, std::string_view peer_view, const void* header_data,
                      std::size_t header_size, Frame& body) {
  const HoldUps::Turn turn(hold_ups_);
  const std::lock_guard lock(mutex_);
  const std::string peer(peer_view);
  for (ExchangeStats* stats : {&stats_, &audiences_[audience_of(peer)].stats}) {
    ++stats->frames_in;
    stats->bytes_in += header_size + body.size();
  }
  if (is_blocked(peer_view)) {
    ++stats_.dropped;
    return FC_UNHEARD;
  }
  if (!is_within_rate(peer_view, now_ms)) {
    ++stats_.dropped;
    return FC_MUTED;
  }
  wire::Header header;
  if (const char* why = wire::parse(header_data, header_size, body.size(), header)) {
    if (why == wire::kOtherVersion) {
      const int version = static_cast<const std::uint8_t*>(header_data)[wire::kVersionAt];
      return malformed(peer_view, body.size(),
                       "the protocol version is " + std::to_string(version) + ", not " +
                           std::to_string(wire::kVersion));
    }
    return malformed(peer_view, body.size(), why);
  }
  if (limits_.paced && !may_speak(peer, now_ms)) {
    ++stats_.dropped;
    return FC_UNHEARD;
  }
  if (header.kind != wire::Kind::kChunk) {
    charge(peer, 1);
  }
  remember(peer, header.kind, now_ms);
  if (interval_ms_ > 0) {
    silence_.heard(header.kind == wire::Kind::kPong, now_ms);
  }
  switch (header.kind) {
    case wire::Kind::kGet:
      return on_get(peer, header, now_ms);
    case wire::Kind::kChunk:
      return on_chunk(peer, header, body, now_ms);
    case wire::Kind::kRefuse:
      return on_refuse(peer, header);
    case wire::Kind::kPing: {
      wire::Header pong;
      pong.kind = wire::Kind::kPong;
      push(peer, pong);
      return FC_DONE;
    }
    case wire::Kind::kPong:
      return FC_DONE;
    case wire::Kind::kControl:
      if (crc32c(body.data(), body.size()) != header.body_crc) {
        return malformed(peer_view, body.size(), "a control message's checksum does not match");
      }
      return on_control(peer, body);
  }
  return FC_DROP;
}

int Exchange::malformed(std::string_view peer, std::size_t bytes, std::string why) {
  ++stats_.dropped;
  charge(peer, kMalformedFrames, bytes);
  report(Event::Kind::kMalformed, peer, std::move(why));
  return FC_DROP;
}

void Exchange::report(Event::Kind kind, std::string_view peer, std::string why) {
  const bool once = kind == Event::Kind::kRate || kind == Event::Kind::kConnections;
  if (once || malformed_waiting_ < kMaxMalformedEvents) {
    malformed_waiting_ += once ? 0 : 1;
    events_.push_back({kind, 0, 0, std::string(peer), std::move(why)});
    unsignalled_ = true;
  }
}

void Exchange::push(const std::string& peer, const wire::Header& header) {
  small_.push_back({peer, wire::encode(header), nullptr, nullptr, 0});
}

// Takes a set back whose bytes are not what they were.
void Exchange::look_again(const std::string& peer, const wire::Header& header,
                          std::int64_t now_ms) {
  Contact& contact = contacts_[peer];
  const std::uint64_t end = header.index + header.count;
  const bool other = contact.set != header.set;
  const bool again = !other && header.index < contact.reached;
  contact.set = header.set;
  contact.reached = other ? end : std::max(contact.reached, end);
  if (!again || now_ms < contact.reread_ms) {
    return;
  }
  contact.reread_ms = now_ms + kRereadMs;
  if (auto problem = publisher_.reread(header.set, header.index, end)) {
    publisher_.withdraw(header.set);
    events_.push_back({Event::Kind::kDamaged, 0, 0,
                       std::string(header.set.begin(), header.set.end()), std::move(*problem)});
    unsignalled_ = true;
  }
}

int Exchange::on_get(const std::string& peer, const wire::Header& header, std::int64_t now_ms) {
  const std::uint64_t audience = audience_of(peer);
  auto refusal = publisher_.check(header.set, header.index, header.count, audience);
  if (!refusal) {
    look_again(peer, header, now_ms);
    refusal = publisher_.check(header.set, header.index, header.count, audience);
  }
  std::deque<Request>& waiting = requests_[peer];
  if (!refusal && waiting.size() >= kMaxRequestsPerPeer) {
    refusal = wire::Refusal::kBusy;
  }
  if (refusal) {
    wire::Header reply;
    reply.kind = wire::Kind::kRefuse;
    reply.set = header.set;
    reply.index = header.index;
    reply.count = static_cast<std::uint32_t>(*refusal);
    push(peer, reply);
    if (waiting.empty()) {
      requests_.erase(peer);
    }
    return FC_DONE;
  }
  if (waiting.empty()) {
    audiences_[audience].chunk_turns.push_back(peer);
  }
  waiting.push_back({header.set, header.index, header.index + header.count});
  return FC_DONE;
}

std::optional<OutFrame> Exchange::next_out(std::int64_t now_ms) {
  const std::lock_guard lock(mutex_);
  std::optional<OutFrame> out;
  if (!small_.empty()) {
    out = std::move(small_.front());
    small_.pop_front();
  }
  for (auto collector = collectors_.begin(); !out && collector != collectors_.end(); ++collector) {
    if (const auto request = (*collector)->next_request(now_ms)) {
      const Source& source = (*collector)->sources()[request->source];
      if (contacts_[source.peer].busy_until_ms == 0) {  // asking again gives it no more time
        note_patience(**collector, request->source, now_ms);
      }
      wire::Header header;
      header.kind = wire::Kind::kGet;
      header.set = source.set;
      header.index = request->first;
      header.count = request->count;
      out = OutFrame{source.peer, wire::encode(header), nullptr, nullptr, 0};
    }
  }
  if (!out) {
    out = next_chunk();
    if (out && interval_ms_ > 0) {
      silence_.sent(out->body_size, now_ms);
      if (requests_.empty()) {  // its answer tells how long that took, before the next heartbeat
        push("", wire::Header{});
        silence_.pinged();
      }
    }
  }
  if (out) {
    for (ExchangeStats* stats : {&stats_, &audiences_[audience_of(out->peer)].stats}) {
      ++stats->frames_out;
      stats->bytes_out += wire::kHeaderBytes + out->body_size;
    }
  }
  return out;
}

std::int64_t Exchange::tick(std::int64_t now_ms) {
  const HoldUps::Turn turn(hold_ups_);
  const std::lock_guard lock(mutex_);
  std::int64_t wait = -1;
  const auto sooner = [&wait](std::int64_t ms) {
    if (ms >= 0) {
      wait = wait < 0 ? ms : std::min(wait, ms);
    }
  };
  if (interval_ms_ > 0) {
    if (now_ms >= next_ping_ms_) {
      push("", wire::Header{});
      silence_.pinged();
      next_ping_ms_ = now_ms + interval_ms_;
    }
    sooner(next_ping_ms_ - now_ms);
  }
  for (const auto& collector : collectors_) {
    sooner(collector->tick(now_ms));
    for (const std::size_t source : collector->take_probes()) {
      push(collector->sources()[source].peer, wire::Header{});
    }
    collect_events(*collector);
  }
  return wait;
}

std::optional<Event> Exchange::next_event() {
  const std::lock_guard lock(mutex_);
  if (events_.empty()) {
    return std::nullopt;
  }
  Event event = std::move(events_.front());
  events_.pop_front();
  if (event.kind == Event::Kind::kMalformed || event.kind == Event::Kind::kUnknownPeer) {
    --malformed_waiting_;
  }
  return event;
}

bool Exchange::has_event() {
  const std::lock_guard lock(mutex_);
  if (!unsignalled_ || signalled_) {
    return false;
  }
  unsignalled_ = false;
  signalled_ = true;
  return true;
}

void Exchange::listening() {
  const std::lock_guard lock(mutex_);
  signalled_ = false;
}

ExchangeStats Exchange::stats() const {
  const std::lock_guard lock(mutex_);
  ExchangeStats stats = stats_;
  stats.owners = owners_.size();
  return stats;
}

}  // namespace fedcore
