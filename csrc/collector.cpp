#include "collector.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "error.hpp"

namespace fedcore {
namespace {

constexpr std::uint64_t kReleaseStep = 8u << 20;
constexpr std::uint64_t kMaxWindow = 4096;
constexpr std::uint64_t kSumChunks = 4;  // the sums of a chunk take at most so many chunks' memory

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> counter{0};
  return ++counter;
}

}  // namespace

Collector::Collector(std::shared_ptr<const Layout> layout, std::vector<Source> sources, Place out,
                     Place base, CollectorOptions options)
    : id_(next_id()),
      layout_(std::move(layout)),
      sources_(std::move(sources)),
      out_(std::move(out)),
      base_(std::move(base)),
      options_(std::move(options)),
      pass_on_(!options_.check_finite && sources_.size() == 1),
      end_(layout_->chunk_count()) {
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
  if (options_.codec && options_.codec->options().scheme != Scheme::kRaw && !base_.file) {
    throw Error(Errc::kLayout, "differences can't be decoded without the base that they are to");
  }
  if (options_.spill && options_.spill->slot_bytes() < layout_->chunk_bytes()) {
    throw Error(Errc::kStorage, "the spill file's slots are smaller than a chunk");
  }
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    pulls_.push_back(std::make_unique<Pull>());
  }
  use_sources();
  const std::uint64_t per_step = layout_->chunk_bytes() * sources_.size();
  if (options_.budget_bytes < per_step && sources_.size() > 1) {
    const std::uint64_t chunks = options_.budget_bytes / layout_->chunk_bytes();
    group_ = chunks > kSumChunks ? chunks - kSumChunks : 1;
  }
  window_ = std::clamp<std::uint64_t>(options_.budget_bytes / per_step, 1,
                                      std::min(kMaxWindow, layout_->chunk_count()));
  reduced_chunk_.resize(
      static_cast<std::size_t>(std::min(layout_->chunk_bytes(), layout_->total_bytes())));
  if (!pass_on_) {
    checksums_.resize(static_cast<std::size_t>(layout_->chunk_count()));
  }
}

Collector::~Collector() { stop(); }

void Collector::use_sources() {
  counted_.clear();
  std::vector<std::uint32_t> weights;
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    if (pulls_[k]->counts) {
      counted_.push_back(k);
      weights.push_back(sources_[k].weight);
    }
  }
  inputs_.assign(counted_.size(), nullptr);
  reducer_.emplace(weights);
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
    counts.push_back(
        std::min(layout_->chunk_count(), pull->received.load(std::memory_order_relaxed)));
  }
  return counts;
}

// --- What comes ---

std::optional<std::uint64_t> Collector::position_of(const Pull& pull,
                                                    std::uint64_t index) const noexcept {
  const std::uint64_t count = layout_->chunk_count();
  if (index >= count) {
    return std::nullopt;
  }
  const std::uint64_t position = next_ + (index + count - chunk_of(next_)) % count;
  return position < pull.next ? std::optional(position) : std::nullopt;
}

bool Collector::on_chunk(std::size_t source, const wire::Header& header, Frame& frame,
                         std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  const auto position = position_of(pull, header.index);
  const bool wanted = state_ == State::kActive && is_pulled(pull) && position &&
                      !is_here(pull, *position) && fits(header, frame.size());
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
      pull.again.insert(*position);
    }
    return false;
  }
  pull.bad_in_a_row = 0;
  const std::size_t size = frame.size();
  Frame chunk;
  if (header.encoding == wire::kRaw) {
    chunk = std::move(frame);
  } else if (const char* why = decode(header, frame, chunk)) {
    fail(source, "encoding", "chunk " + std::to_string(header.index) + " can't be decoded: " + why);
    return false;
  }
  pull.again.erase(*position);
  --pull.due;
  bytes_.fetch_add(size, std::memory_order_relaxed);
  pull.received.fetch_add(1, std::memory_order_relaxed);
  keep(source, *position, chunk);
  spill_reads_ = 0;
  reduce_ready();
  return true;
}

bool Collector::fits(const wire::Header& header, std::size_t size) const {
  const std::uint64_t nbytes = layout_->chunk_range(header.index).nbytes;
  return header.encoding == wire::kRaw ? size == nbytes : size <= nbytes;
}

// Fills `chunk` with the flat bytes that an encoded body stands for; returns why it can't.
const char* Collector::decode(const wire::Header& header, const Frame& frame, Frame& chunk) {
  if (!options_.codec) {
    return "its encoding was not agreed on";
  }
  const Range range = layout_->chunk_range(header.index);
  void* memory = std::malloc(range.nbytes);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  chunk = Frame(memory, range.nbytes, memory, std::free);
  const std::uint8_t* base =
      base_.file ? base_.file->data() + base_.offset + range.offset : nullptr;
  return options_.codec->decode(header.index, header.encoding, frame.data(), frame.size(), base,
                                static_cast<std::uint8_t*>(memory));
}

void Collector::keep(std::size_t source, std::uint64_t position, Frame& frame) {
  Pull& pull = *pulls_[source];
  Frame mine = std::move(frame);
  if (pull.ahead && pull.held.size() + spill_room() >= window_ && position != next_ &&
      spill(source, position, mine)) {
    return;
  }
  pull.held.emplace(position, std::move(mine));
}

void Collector::on_refuse(std::size_t source, wire::Refusal reason) {
  if (state_ != State::kActive || !is_pulled(*pulls_[source])) {
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
  pulls_[source]->failed = true;
  forget_chunks(*pulls_[source]);
  if (counted_.size() == 1) {
    stop();
  }
}

void Collector::drop(std::size_t source) {
  if (source >= sources_.size()) {
    throw Error(Errc::kProtocol, "there is no source " + std::to_string(source));
  }
  Pull& pull = *pulls_[source];
  if (state_ == State::kFailed || !pull.counts) {
    return;
  }
  if (counted_.size() == 1) {
    stop();
    return;
  }
  pull.counts = false;
  forget_chunks(pull);
  use_sources();
  if (group_ > 0) {
    rewind();
  }
  end_ = next_ + layout_->chunk_count();
  reduced_.store(0, std::memory_order_relaxed);
  state_ = State::kActive;
  done_.store(false, std::memory_order_release);
  work_left_ = true;
}

void Collector::forget_chunks(Pull& pull) noexcept {
  pull.held.clear();
  pull.again.clear();
  pull.due = 0;
  for (const std::uint32_t slot : pull.spilled) {
    if (slot != 0) {
      options_.spill->free(slot - 1);
    }
  }
  pull.spilled.clear();
}

void Collector::stop() noexcept {
  if (state_ == State::kActive) {
    state_ = State::kFailed;
  }
  for (const auto& pull : pulls_) {
    forget_chunks(*pull);
  }
}

// --- The spill file ---

// What stays free of a window for chunks that are under way to the spill file.
std::uint64_t Collector::spill_room() const noexcept {
  return std::clamp<std::uint64_t>(window_ / 2, 1, 2 * kMaxRange);
}

bool Collector::spill(std::size_t source, std::uint64_t position, const Frame& frame) {
  if (no_room_) {
    return false;
  }
  auto slot = options_.spill->put(frame.data(), frame.size());
  if (!slot && recycle()) {
    slot = options_.spill->put(frame.data(), frame.size());
  }
  if (!slot) {
    no_room_ = true;
    events_.push_back({CollectorEvent::Kind::kNoRoom, 0, "storage", options_.spill->problem()});
    return false;
  }
  Pull& pull = *pulls_[source];
  if (pull.spilled.empty()) {
    pull.spilled.resize(static_cast<std::size_t>(layout_->chunk_count()));
  }
  pull.spilled[chunk_of(position)] = *slot + 1;
  return true;
}

// Frees a slot whose chunk was reduced and isn't due to be once more.
bool Collector::recycle() {
  while (!used_.empty()) {
    const auto [source, index] = used_.front();
    used_.pop_front();
    Pull& pull = *pulls_[source];
    if (is_spilled(pull, index) && !position_of(pull, index)) {
      options_.spill->free(std::exchange(pull.spilled[index], 0) - 1);
      return true;
    }
  }
  return false;
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
  if (now_ms - *pull.pressed_ms < options_.spill_after_ms) {
    return false;
  }
  while (pull.held.size() + spill_room() > window_) {
    const auto last = std::prev(pull.held.end());
    if (!spill(source, last->first, last->second)) {
      return false;
    }
    pull.held.erase(last);
  }
  pull.ahead = true;
  return true;
}

// --- The reduction ---

// Points at the next chunk of every source; false while one is missing.
bool Collector::gather() {
  bool from_spill = false;
  for (const std::size_t k : counted_) {
    const Pull& pull = *pulls_[k];
    if (pull.failed || !is_here(pull, next_)) {
      return false;
    }
    from_spill = from_spill || !pull.held.contains(next_);
  }
  if (from_spill && spill_reads_++ >= kMaxSpillReads) {
    work_left_ = true;
    return false;
  }
  const std::uint64_t size = layout_->chunk_range(chunk_of(next_)).nbytes;
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    const Pull& pull = *pulls_[counted_[j]];
    const auto held = pull.held.find(next_);
    inputs_[j] = held != pull.held.end()
                     ? held->second.data()
                     : options_.spill->at(pull.spilled[chunk_of(next_)] - 1, size);
  }
  return true;
}

void Collector::reduce_ready() {
  work_left_ = false;
  while (state_ == State::kActive && next_ < end_) {
    if (group_ > 0 ? !fold_next() : !gather() || !reduce_one(chunk_of(next_))) {
      return;
    }
    advance();
  }
  if (state_ == State::kActive) {
    finish();
  }
}

void Collector::finish() {
  state_ = State::kDone;
  done_.store(true, std::memory_order_release);
  events_.push_back({CollectorEvent::Kind::kDone, 0, "", ""});
}

bool Collector::reduce_one(std::uint64_t index) {
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* result = inputs_[0];
  if (!pass_on_) {
    const std::uint8_t* base =
        base_.file ? base_.file->data() + base_.offset + range.offset : nullptr;
    const auto bad = reducer_->reduce(*layout_, range, inputs_.data(), base, reduced_chunk_.data());
    if (bad) {
      reject_value(*bad);
      return false;
    }
    result = reduced_chunk_.data();
    checksums_[index] = crc32c(result, range.nbytes);
  }
  return write(index, result);
}

void Collector::reject_value(const BadValue& bad) {
  const Location where = layout_->locate(bad.byte_offset);
  fail(counted_[bad.source], "nonfinite",
       "NaN or infinity in tensor '" + std::string(where.tensor) + "', element " +
           std::to_string(where.element));
}

bool Collector::write(std::uint64_t index, const std::uint8_t* result) {
  const Range range = layout_->chunk_range(index);
  try {
    out_.file->write(out_.offset + range.offset, result, range.nbytes);
  } catch (const Error& error) {
    events_.push_back({CollectorEvent::Kind::kBroken, 0, "storage", error.what()});
    stop();
    return false;
  }
  return true;
}

// Adds what is there of the next chunk to its sums, in the order of the sources; true once it is
// written.
bool Collector::fold_next() {
  const std::uint64_t index = chunk_of(next_);
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* base =
      base_.file ? base_.file->data() + base_.offset + range.offset : nullptr;
  for (; folded_ < counted_.size(); ++folded_) {
    Pull& pull = *pulls_[counted_[folded_]];
    const auto held = pull.held.find(next_);
    if (held == pull.held.end()) {
      return false;
    }
    const auto bad =
        reducer_->fold(*layout_, range, folded_, held->second.data(), base, reduced_chunk_.data());
    if (bad) {
      reject_value(*bad);
      return false;
    }
    pull.held.erase(held);
    pull.folded = true;
  }
  reducer_->finish(*layout_, range, reduced_chunk_.data());
  checksums_[index] = crc32c(reduced_chunk_.data(), range.nbytes);
  return write(index, reduced_chunk_.data());
}

// Begins the next chunk again: its sums hold a source that counts no longer. What is on its way
// beside them is asked for anew in its turn, so that no more than a group of it is there.
void Collector::rewind() {
  folded_ = 0;
  for (const std::size_t k : counted_) {
    Pull& pull = *pulls_[k];
    forget_chunks(pull);
    pull.folded = false;
    pull.next = next_;
  }
}

// The position up to which a source may be asked at present.
std::uint64_t Collector::near_end(std::size_t source) const noexcept {
  if (group_ == 0) {
    return std::min(end_, next_ + window_);
  }
  const auto rank = static_cast<std::uint64_t>(
      std::lower_bound(counted_.begin(), counted_.end(), source) - counted_.begin());
  const std::uint64_t reach = folded_ + group_;
  const std::uint64_t chunks =
      reach > rank ? (reach - rank + counted_.size() - 1) / counted_.size() : 0;
  return std::min(end_, next_ + chunks);
}

// Lets go of the chunk that was reduced. What was spilled stays there, in case a source is lost.
void Collector::advance() {
  for (const std::size_t k : counted_) {
    Pull& pull = *pulls_[k];
    if (is_spilled(pull, next_)) {
      options_.spill->drop_pages(pull.spilled[chunk_of(next_)] - 1);
      used_.emplace_back(k, chunk_of(next_));
    }
    pull.held.erase(next_);
    pull.folded = false;
    if (pull.next <= next_ + 1 + window_) {
      pull.ahead = false;
      if (pull.held.size() <= window_ / 2) {
        pull.pressed_ms.reset();
      }
    }
  }
  ++next_;
  folded_ = 0;
  reduced_.store(layout_->chunk_count() - (end_ - next_), std::memory_order_relaxed);
  release_behind();
}

// Works behind the reduction in steps: the base's pages are given back, so that the model's size
// does not show in this process's memory, and the output starts on its way to the device.
void Collector::release_behind() {
  const std::uint64_t step = layout_->chunk_bytes();
  const bool last_of_turn = chunk_of(next_) == 0;
  if ((next_ - released_) * step < kReleaseStep && !last_of_turn && next_ != end_) {
    return;
  }
  const std::uint64_t begin = chunk_of(released_) * step;
  const std::uint64_t end = last_of_turn ? layout_->total_bytes()
                                         : std::min(chunk_of(next_) * step, layout_->total_bytes());
  if (options_.write_behind) {
    out_.file->write_behind(out_.offset + begin, end - begin);
  }
  if (base_.file) {
    base_.file->release(base_.offset + begin, end - begin);
  }
  released_ = next_;
}

// --- What is asked for ---

std::optional<GetRequest> Collector::next_request(std::int64_t now_ms) {
  if (state_ != State::kActive) {
    return std::nullopt;
  }
  for (std::size_t step = 0; step < pulls_.size(); ++step) {
    const std::size_t k = (turn_ + step) % pulls_.size();
    if (!is_pulled(*pulls_[k])) {
      continue;
    }
    const auto request = pulls_[k]->again.empty() ? request_next(k, now_ms) : request_again(k);
    if (request) {
      turn_ = k + 1;
      return request;
    }
  }
  return std::nullopt;
}

std::optional<GetRequest> Collector::request_again(std::size_t source) {
  std::set<std::uint64_t>& again = pulls_[source]->again;
  const std::uint64_t first = *again.begin();
  const std::uint64_t turn_ends = first - chunk_of(first) + layout_->chunk_count();
  std::uint32_t count = 0;
  while (count < kMaxRange && first + count < turn_ends && again.erase(first + count) == 1) {
    ++count;
  }
  return GetRequest{source, chunk_of(first), count};
}

std::optional<GetRequest> Collector::request_next(std::size_t source, std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  while (pull.next < end_ && is_spilled(pull, pull.next)) {
    ++pull.next;  // a chunk of the turn before
  }
  const std::uint64_t near = near_end(source);
  if (pull.next >= near && pull.next < end_ && !pull.ahead) {
    start_spilling(source, now_ms);
  }
  const bool ahead = pull.ahead && !no_room_;
  const std::uint64_t limit = ahead ? end_ : near;
  if (pull.next >= limit || pull.held.size() + pull.due >= window_) {
    return std::nullopt;
  }
  std::uint64_t free = std::min(limit - pull.next, window_ - pull.held.size() - pull.due);
  // Small requests are saved up while others are under way.
  const std::uint64_t worth =
      std::min<std::uint64_t>(kMaxRange, std::max<std::uint64_t>(1, window_ / 2));
  if (free < worth && limit < end_ && pull.due > 0) {
    return std::nullopt;
  }
  if (pull.due == 0) {
    pull.heard_ms = now_ms;
  }
  const std::uint64_t to_turn = layout_->chunk_count() - chunk_of(pull.next);
  free = std::min({free, to_turn, std::uint64_t{kMaxRange}});
  GetRequest request{source, chunk_of(pull.next), 0};
  while (request.count < free && !is_spilled(pull, pull.next)) {
    ++request.count;
    ++pull.next;
  }
  pull.due += request.count;
  return request;
}

void Collector::ask_again(Pull& pull) {
  for (std::uint64_t position = next_; pull.due > 0 && position < pull.next; ++position) {
    if (!is_here(pull, position)) {
      pull.again.insert(position);
    }
  }
}

std::int64_t Collector::tick(std::int64_t now_ms) {
  if (state_ == State::kActive && work_left_) {
    spill_reads_ = 0;
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
      const std::int64_t left = *pull.pressed_ms + options_.spill_after_ms - now_ms;
      if (left > 0) {
        sooner(left);
      }
    }
    if (pull.due == 0) {
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
    sooner(left);
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
    pulls_[source]->silent_ms = 0;
    ask_again(*pulls_[source]);
  }
}

}  // namespace fedcore
