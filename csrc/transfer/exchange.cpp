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

void Exchange::start(std::shared_ptr<Collector> collector) {
  const std::lock_guard lock(mutex_);
  for (const auto& running : collectors_) {
    if (running == collector) {
      throw Error(Errc::kProtocol, "this collector was started already");
    }
  }
  for (std::size_t k = 0; k < collector->sources().size(); ++k) {
    know_pace(*collector, k);
  }
  collectors_.push_back(std::move(collector));
}

void Exchange::know_pace(Collector& collector, std::size_t source) const {
  const auto found = contacts_.find(collector.sources()[source].peer);
  if (found != contacts_.end()) {
    collector.set_pace(source, found->second.pace);
  }
}

std::shared_ptr<Collector> Exchange::known(std::uint64_t collector_id) const {
  for (const auto& collector : collectors_) {
    if (collector->id() == collector_id) {
      return collector;
    }
  }
  return nullptr;
}

Collector& Exchange::running(std::uint64_t collector_id) const {
  if (const auto collector = known(collector_id)) {
    return *collector;  // collectors_ has it, too
  }
  throw Error(Errc::kProtocol, "this collector is not running");
}

std::size_t Exchange::add(std::uint64_t collector_id, Source source) {
  const std::lock_guard lock(mutex_);
  Collector& collector = running(collector_id);
  const std::size_t added = collector.add(std::move(source));
  know_pace(collector, added);
  return added;
}

void Exchange::survey(std::uint64_t collector_id, const std::vector<std::size_t>& order) {
  const std::lock_guard lock(mutex_);
  running(collector_id).survey(order);
}

void Exchange::close(std::uint64_t collector_id, const std::vector<std::size_t>& order, Place out,
                     std::shared_ptr<Record> record, const Collector::States& states,
                     const std::optional<Collector::Weights>& weights) {
  const std::lock_guard lock(mutex_);
  Collector& collector = running(collector_id);
  collector.close(order, std::move(out), std::move(record), states, weights);
  tell_combiner(collector);
}

void Exchange::cancel(std::uint64_t collector_id) {
  const std::lock_guard lock(mutex_);
  std::erase_if(collectors_, [&](const auto& collector) {
    if (collector->id() != collector_id) {
      return false;
    }
    for (std::size_t k = 0; k < collector->sources().size(); ++k) {
      const auto found = contacts_.find(collector->sources()[k].peer);
      if (found != contacts_.end()) {
        found->second.pace = collector->pace(k);
      }
    }
    collector->stop();
    tell_combiner(*collector);
    return true;
  });
}

void Exchange::retry(std::uint64_t collector_id, std::size_t source,
                     const std::optional<std::string>& peer) {
  const std::lock_guard lock(mutex_);
  for (const auto& collector : collectors_) {
    if (collector->id() == collector_id) {
      collector->retry(source, peer);
    }
  }
}

void Exchange::drop(std::uint64_t collector_id, std::size_t source) {
  const std::lock_guard lock(mutex_);
  if (const auto collector = known(collector_id)) {
    collector->drop(source);
    tell_combiner(*collector);
  }
  std::erase_if(events_, [&](const Event& event) {
    const bool of_source =
        event.kind == Event::Kind::kRejected || event.kind == Event::Kind::kStalled;
    return of_source && event.collector == collector_id && event.source == source;
  });
}

void Exchange::tell_combiner(const Collector& collector) {
  if (collector.aside()) {
    combinable_.notify_all();
  }
}

void Exchange::combine(std::uint64_t collector_id) {
  std::unique_lock lock(mutex_);
  while (const auto collector = known(collector_id)) {
    auto part = collector->take_out();
    const bool taken = part != nullptr;
    if (taken) {
      lock.unlock();
      collector->combine(*part);
      lock.lock();
      collector->put_back(std::move(part));
    }
    collect_events(*collector);
    if (taken || unsignalled_) {
      outgoing_->wake();  // for what is to be asked for now, and for events
    }
    if (!taken) {
      combinable_.wait(lock);
    }
  }
}

std::vector<std::pair<std::uint64_t, std::uint64_t>> Exchange::pulls(
    std::uint64_t collector_id) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> found;
  for (const auto& collector : collectors_) {
    for (std::size_t k = 0; collector->id() == collector_id && k < collector->sources().size();
         ++k) {
      found.emplace_back(collector->due(k), collector->received(k));
    }
  }
  return found;
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
  const bool many = contacts_.size() > kMaxStrangers;
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

int Exchange::on_chunk(const std::string& peer, const wire::Header& header, Frame& body,
                       std::int64_t now_ms) {
  for (const auto& collector : collectors_) {
    if (const auto source = collector->find(peer, header.set)) {
      const std::size_t size = body.size();
      const bool kept = collector->on_chunk(*source, header, body, now_ms);
      if (!kept) {
        charge(peer, 1, size);  // as what nobody asked for
      }
      note_patience(*collector, *source, now_ms);
      collect_events(*collector);
      tell_combiner(*collector);
      return kept ? FC_TAKEN : FC_DONE;
    }
  }
  charge(peer, 1, body.size());
  return FC_DONE;  // of a collection that has ended
}

void Exchange::note_patience(const Collector& collector, std::size_t source, std::int64_t now_ms) {
  const std::int64_t patience = collector.patience_ms(source);
  contacts_[collector.sources()[source].peer].busy_until_ms = patience > 0 ? now_ms + patience : 0;
}

int Exchange::on_refuse(const std::string& peer, const wire::Header& header) {
  for (const auto& collector : collectors_) {
    if (const auto source = collector->find(peer, header.set)) {
      // A busy peer is asked again by the stall timer.
      if (static_cast<wire::Refusal>(header.count) != wire::Refusal::kBusy) {
        collector->on_refuse(*source, static_cast<wire::Refusal>(header.count));
        collect_events(*collector);
      }
      break;
    }
  }
  return FC_DONE;
}

void Exchange::collect_events(Collector& collector) {
  for (CollectorEvent& event : collector.take_events()) {
    const auto kind = event.kind == CollectorEvent::Kind::kDone         ? Event::Kind::kDone
                      : event.kind == CollectorEvent::Kind::kRejected   ? Event::Kind::kRejected
                      : event.kind == CollectorEvent::Kind::kBroken     ? Event::Kind::kBroken
                      : event.kind == CollectorEvent::Kind::kNoRoom     ? Event::Kind::kNoRoom
                      : event.kind == CollectorEvent::Kind::kDamaged    ? Event::Kind::kDamaged
                      : event.kind == CollectorEvent::Kind::kRuleFailed ? Event::Kind::kRuleFailed
                                                                        : Event::Kind::kStalled;
    events_.push_back({kind, collector.id(), event.source, std::move(event.code),
                       std::move(event.message), event.silent_ms});
    unsignalled_ = true;
  }
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

ExchangeStats Exchange::stats() const {
  const std::lock_guard lock(mutex_);
  ExchangeStats stats = stats_;
  stats.owners = owners_.size();
  return stats;
}

}  // namespace fedcore
