// The exchange's collections: they start, take sources, are combined and end, and get what comes for them.
#include <utility>

#include "base/error.hpp"
#include "transfer/exchange.hpp"

namespace fedcore {

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

}  // namespace fedcore
