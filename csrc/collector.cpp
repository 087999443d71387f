#include "collector.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"

namespace fedcore {
namespace {

constexpr std::uint64_t kReleaseStep = 8u << 20;
constexpr std::uint64_t kMaxWindow = 4096;

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> counter{0};
  return ++counter;
}

std::vector<std::uint32_t> weights_of(const std::vector<Source>& sources) {
  std::vector<std::uint32_t> weights;
  for (const Source& source : sources) {
    weights.push_back(source.weight);
  }
  return weights;
}

}  // namespace

Collector::Collector(std::shared_ptr<const Layout> layout, std::vector<Source> sources, Place out,
                     Place base, CollectorOptions options)
    : id_(next_id()),
      layout_(std::move(layout)),
      sources_(std::move(sources)),
      reducer_(weights_of(sources_)),
      out_(std::move(out)),
      base_(std::move(base)),
      options_(options),
      inputs_(sources_.size()) {
  if (layout_->total_bytes() == 0) {
    throw Error(Errc::kLayout, "there are no bytes to collect");
  }
  if (layout_->chunk_bytes() > wire::kMaxChunkBytes) {
    throw Error(Errc::kLayout, "chunks of more than 4 MiB can't be sent");
  }
  out_.file->check_range(out_.offset, layout_->total_bytes());
  if (!out_.file->writable()) {
    throw Error(Errc::kStorage, "the output " + out_.file->path() + " is not writable");
  }
  if (base_.file) {
    base_.file->check_range(base_.offset, layout_->total_bytes());
  }
  const std::uint64_t per_step = layout_->chunk_bytes() * sources_.size();
  window_ = std::clamp<std::uint64_t>(options_.budget_bytes / per_step, 1,
                                      std::min(kMaxWindow, layout_->chunk_count()));
  reduced_chunk_.resize(
      static_cast<std::size_t>(std::min(layout_->chunk_bytes(), layout_->total_bytes())));
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    pulls_.push_back(std::make_unique<Pull>());
    pulls_.back()->slots.resize(static_cast<std::size_t>(window_));
  }
}

std::optional<std::size_t> Collector::find(const std::string& peer,
                                           const wire::SetId& set) const noexcept {
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    if (sources_[k].set == set && sources_[k].peer == peer) {
      return k;
    }
  }
  return std::nullopt;
}

std::vector<std::uint64_t> Collector::chunks_received() const {
  std::vector<std::uint64_t> counts;
  for (const auto& pull : pulls_) {
    counts.push_back(pull->received.load(std::memory_order_relaxed));
  }
  return counts;
}

std::uint64_t Collector::outstanding(const Pull& pull) const noexcept {
  return pull.next - next_ - pull.held;
}

bool Collector::on_chunk(std::size_t source, const wire::Header& header, Frame& frame,
                         std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  const std::uint64_t index = header.index;
  const bool wanted = state_ == State::kActive && index >= next_ && index < pull.next &&
                      !pull.slots[static_cast<std::size_t>(index % window_)] &&
                      frame.size() == layout_->chunk_range(index).nbytes;
  if (!wanted) {
    return false;
  }
  pull.heard_ms = now_ms;
  pull.silent_ms = 0;
  if (crc32c(frame.data(), frame.size()) != header.body_crc) {
    if (++pull.bad_in_a_row >= kMaxBadChunks) {
      fail(source, "checksum",
           std::to_string(kMaxBadChunks) + " chunks in a row had a wrong checksum");
    } else {
      pull.again.insert(index);
    }
    return false;
  }
  pull.bad_in_a_row = 0;
  pull.again.erase(index);
  bytes_.fetch_add(frame.size(), std::memory_order_relaxed);
  pull.received.fetch_add(1, std::memory_order_relaxed);
  pull.slots[static_cast<std::size_t>(index % window_)] = std::move(frame);
  ++pull.held;
  reduce_ready();
  return true;
}

void Collector::reduce_ready() {
  while (state_ == State::kActive && next_ < layout_->chunk_count()) {
    const auto slot = static_cast<std::size_t>(next_ % window_);
    for (std::size_t k = 0; k < pulls_.size(); ++k) {
      const Frame& frame = pulls_[k]->slots[slot];
      if (!frame) {
        return;
      }
      inputs_[k] = frame.data();
    }
    if (!reduce_one(next_)) {
      return;
    }
    for (const auto& pull : pulls_) {
      pull->slots[slot] = Frame();
      --pull->held;
    }
    ++next_;
    reduced_.store(next_, std::memory_order_relaxed);
    release_behind(std::min(next_ * layout_->chunk_bytes(), layout_->total_bytes()));
  }
  if (state_ == State::kActive) {
    state_ = State::kDone;
    done_.store(true, std::memory_order_release);
    events_.push_back({CollectorEvent::Kind::kDone, 0, "", ""});
  }
}

bool Collector::reduce_one(std::uint64_t index) {
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* result = inputs_[0];
  if (options_.check_finite || sources_.size() > 1) {
    const std::uint8_t* base =
        base_.file ? base_.file->data() + base_.offset + range.offset : nullptr;
    const auto bad = reducer_.reduce(*layout_, range, inputs_.data(), base, reduced_chunk_.data());
    if (bad) {
      const Location where = layout_->locate(bad->byte_offset);
      fail(bad->source, "nonfinite",
           "NaN or infinity in tensor '" + std::string(where.tensor) + "', element " +
               std::to_string(where.element));
      return false;
    }
    result = reduced_chunk_.data();
    checksums_.push_back(crc32c(result, range.nbytes));
  }
  try {
    out_.file->write(out_.offset + range.offset, result, range.nbytes);
  } catch (const Error& error) {
    events_.push_back({CollectorEvent::Kind::kBroken, 0, "storage", error.what()});
    stop();
    return false;
  }
  return true;
}

// Works behind the reduction in steps: the base's pages are given back, so that the model's size
// does not show in this process's memory, and the output starts on its way to the device.
void Collector::release_behind(std::uint64_t end) {
  if (end - released_ < kReleaseStep && end != layout_->total_bytes()) {
    return;
  }
  if (options_.write_behind) {
    out_.file->write_behind(out_.offset + released_, end - released_);
  }
  if (base_.file) {
    base_.file->release(base_.offset + released_, end - released_);
  }
  released_ = end;
}

void Collector::on_refuse(std::size_t source, wire::Refusal reason) {
  if (state_ != State::kActive) {
    return;
  }
  const char* text =
      reason == wire::Refusal::kUnknownSet   ? "the tensors are no longer published there"
      : reason == wire::Refusal::kOutOfRange ? "the published tensors have fewer chunks"
                                             : "the other side is busy";
  fail(source, "refused", text);
}

void Collector::fail(std::size_t source, std::string code, std::string message) {
  events_.push_back({CollectorEvent::Kind::kRejected, source, std::move(code), std::move(message)});
  stop();
}

void Collector::stop() noexcept {
  if (state_ == State::kActive) {
    state_ = State::kFailed;
  }
  for (const auto& pull : pulls_) {
    for (Frame& frame : pull->slots) {
      frame = Frame();
    }
    pull->held = 0;
  }
}

std::optional<GetRequest> Collector::next_request(std::int64_t now_ms) {
  if (state_ != State::kActive) {
    return std::nullopt;
  }
  const std::uint64_t end = std::min(layout_->chunk_count(), next_ + window_);
  for (std::size_t step = 0; step < pulls_.size(); ++step) {
    const std::size_t k = (turn_ + step) % pulls_.size();
    Pull& pull = *pulls_[k];
    if (!pull.again.empty()) {
      const std::uint64_t first = *pull.again.begin();
      std::uint32_t count = 0;
      while (count < kMaxRange && pull.again.erase(first + count) == 1) {
        ++count;
      }
      turn_ = k + 1;
      return GetRequest{k, first, count};
    }
    if (pull.next >= end) {
      continue;
    }
    const std::uint64_t free = end - pull.next;
    // Small requests are saved up while others are under way.
    const std::uint64_t worth =
        std::min<std::uint64_t>(kMaxRange, std::max<std::uint64_t>(1, window_ / 2));
    if (free < worth && end < layout_->chunk_count() && outstanding(pull) > 0) {
      continue;
    }
    if (outstanding(pull) == 0) {
      pull.heard_ms = now_ms;
    }
    const auto count = static_cast<std::uint32_t>(std::min<std::uint64_t>(free, kMaxRange));
    const GetRequest request{k, pull.next, count};
    pull.next += count;
    turn_ = k + 1;
    return request;
  }
  return std::nullopt;
}

void Collector::ask_again(Pull& pull) {
  for (std::uint64_t i = next_; i < pull.next; ++i) {
    if (!pull.slots[static_cast<std::size_t>(i % window_)]) {
      pull.again.insert(i);
    }
  }
}

std::int64_t Collector::tick(std::int64_t now_ms) {
  if (state_ != State::kActive) {
    return -1;
  }
  std::int64_t wait = -1;
  for (std::size_t k = 0; k < pulls_.size(); ++k) {
    Pull& pull = *pulls_[k];
    if (outstanding(pull) == 0) {
      continue;
    }
    std::int64_t left = pull.heard_ms + options_.stall_ms - now_ms;
    if (left <= 0) {
      ask_again(pull);
      pull.heard_ms = now_ms;
      left = options_.stall_ms;
      pull.silent_ms += options_.stall_ms;
      events_.push_back({CollectorEvent::Kind::kStalled, k, "", "", pull.silent_ms});
    }
    wait = wait < 0 ? left : std::min(wait, left);
  }
  return wait;
}

void Collector::retry(std::size_t source, const std::optional<std::string>& peer) {
  if (source >= sources_.size()) {
    throw Error(Errc::kProtocol, "there is no source " + std::to_string(source));
  }
  if (peer) {
    sources_[source].peer = *peer;
  }
  if (state_ == State::kActive) {
    ask_again(*pulls_[source]);
  }
}

}  // namespace fedcore
