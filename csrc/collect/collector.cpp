#include "collect/collector.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace fedcore {
namespace {

constexpr std::uint64_t kMaxWindow = 4096;

// What the fp64 sums of a chunk take, at most, in chunks.
std::uint64_t sum_chunks(const Layout& layout, const Rule& rule) {
  std::uint64_t most = 0;
  for (const Run& run : layout.runs({0, layout.total_bytes()})) {
    const std::uint64_t bytes = rule.sums_per_element(run.dtype) * sizeof(double);
    most = std::max(most, bytes / item_size(run.dtype));
  }
  return most;
}

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> counter{0};
  return ++counter;
}

}  // namespace

Collector::Collector(std::shared_ptr<const Layout> layout, std::size_t expected, Place base,
                     CollectorOptions options)
    : id_(next_id()),
      layout_(std::move(layout)),
      expected_(expected),
      base_(std::move(base)),
      options_(std::move(options)),
      base_weight_(options_.base_weight),
      digest_(options_.digest_key.empty() ? std::nullopt
                                          : std::optional<Digest>(options_.digest_key)),
      end_(layout_->chunk_count()) {
  if (layout_->total_bytes() == 0) {
    throw Error(Errc::kLayout, "there are no bytes to collect");
  }
  if (layout_->chunk_bytes() > wire::kMaxChunkBytes) {
    throw Error(Errc::kLayout, "chunks of more than 4 MiB can't be sent");
  }
  if (base_.file) {
    base_.file->check_range(base_.offset, layout_->total_bytes());
  }
  if (differences() && !base_.file) {
    throw Error(Errc::kLayout, "differences can't be decoded without the base that they are to");
  }
  if (options_.finisher &&
      (!base_.file || options_.finisher->layout().total_bytes() != layout_->total_bytes())) {
    throw Error(Errc::kLayout, "a server optimizer needs a base of its layout");
  }
  if (!options_.base_crcs.empty() && options_.base_crcs.size() != layout_->chunk_count()) {
    throw Error(Errc::kLayout, "the base must have a checksum of each chunk");
  }
  check_surveys();
  find_plain();
  if (options_.spill && options_.spill->slot_bytes() < layout_->chunk_bytes()) {
    throw Error(Errc::kStorage, "the spill file's slots are smaller than a chunk");
  }
  const std::uint64_t spare = options_.budget_bytes / 8 / part_bytes();
  const std::uint64_t most = std::min(1 + spare, layout_->chunk_count());
  // A slow rule gets one chunk at a time, from the thread that has the collector; so does one with views.
  const bool one = options_.rule->slow || options_.rule->views();
  parts_.resize(one ? 1 : std::clamp<std::uint64_t>(options_.threads, 1, most));
  while (together() && parts_.size() > 1 && chunk_room() < expected_) {
    parts_.pop_back();
  }
  check_base_for_views();
  check_room(expected_);
  workers_ = std::make_unique<Workers>(static_cast<unsigned>(parts_.size()));
  divide_budget();
}

Collector::Collector(std::shared_ptr<const Layout> layout, std::vector<Source> sources, Place out,
                     Place base, CollectorOptions options, std::shared_ptr<Record> record,
                     const States& states)
    : Collector(std::move(layout), sources.size(), std::move(base), std::move(options)) {
  std::vector<std::size_t> order;
  for (Source& source : sources) {
    check_source(source);
    order.push_back(order.size());
    sources_.push_back(std::move(source));
    pulls_.push_back(std::make_unique<Pull>());
    pulls_.back()->feed = Feed(layout_->chunk_count());
    begin_digests(pulls_.size() - 1);
  }
  check_order(order, std::nullopt);
  check_out(out);
  check_states(states);
  begin(order, std::move(out), std::move(record), states);
  resume_reduced();
  for (const std::size_t k : order_) {
    take_spilled(k);
  }
  if (options_.spill) {
    options_.spill->free_unclaimed();
  }
}

Collector::~Collector() { stop(); }

// A rule that folds is the mean, which is the mean of plain tensors, too, unless the base has a weight.
void Collector::find_plain() {
  std::size_t found = 0;
  for (const Tensor& tensor : layout_->tensors()) {
    if (options_.plain.contains(tensor.name)) {
      ++found;
      plain_.push_back({tensor.offset, tensor.nbytes});
    }
  }
  if (found != options_.plain.size()) {
    throw Error(Errc::kLayout, "a tensor that is to keep the plain mean is not in the layout");
  }
  if (!together()) {
    plain_.clear();
  } else if (!plain_.empty() && options_.rule->views()) {
    throw Error(Errc::kConfig, "a rule with views takes no plain tensors");
  }
}

std::size_t Collector::add(Source source) {
  if (!open_ || state_ != State::kActive) {
    throw Error(Errc::kProtocol, "this collection takes no more sources");
  }
  check_room(1 + static_cast<std::size_t>(std::count_if(pulls_.begin(), pulls_.end(),
                                                        [](const auto& p) { return p->counts; })));
  check_source(source);
  check_views(sources_with(&source));
  std::size_t added = 0;
  while (added < pulls_.size() && pulls_[added]->counts) {
    ++added;
  }
  if (added == pulls_.size()) {
    sources_.emplace_back();
    pulls_.emplace_back();
  }
  sources_[added] = std::move(source);
  pulls_[added] = std::make_unique<Pull>();
  pulls_[added]->feed = Feed(layout_->chunk_count());
  begin_digests(added);
  divide_budget();
  if (options_.rule->chunkwise() && !digest_) {  // what another process had has no digests
    take_spilled(added);
  }
  return added;
}

void Collector::use_sources() {
  counted_.clear();
  std::vector<double> weights;
  for (const std::size_t k : order_) {
    if (pulls_[k]->counts) {
      pulls_[k]->rank = counted_.size();
      counted_.push_back(k);
      weights.push_back(sources_[k].weight);
    }
  }
  const std::size_t rows = counted_.size() + (base_counts() ? 1 : 0);
  if (base_weight_ > 0) {
    weights.push_back(base_weight_);
  }
  const bool folds = options_.rule->traits.folds;  // it is the mean, of plain tensors, too
  for (Part& part : parts_) {
    part.inputs.assign(rows, {});
    part.survey = survey_ ? std::make_unique<ChunkSurvey>(rows, plain_) : nullptr;
    part.out.resize(
        static_cast<std::size_t>(std::min(layout_->chunk_bytes(), layout_->total_bytes())));
    part.reducer.reset();
    if (options_.finisher && !survey_) {
      part.finished = std::make_unique<FinishedChunk>(*options_.finisher, states_);
    }
    try {
      part.reducer = std::make_unique<Reducer>(
          *options_.rule, weights, part.finished.get(),
          folds && base_weight_ == 0 ? std::vector<Range>{} : plain_, counted_.size());
    } catch (const Error&) {  // nothing is there to reduce with
      stop();
      throw;
    }
  }
}

// What is in memory beside chunks of sources and what release_step() says.
std::uint64_t Collector::beside_bytes() const noexcept {
  const std::uint64_t base = reads_base() ? layout_->chunk_bytes() : 0;
  return base + (parts_.size() - 1) * layout_->chunk_bytes() + parts_.size() * state_bytes();
}

// How many chunks of sources the budget holds.
std::uint64_t Collector::chunk_room() const noexcept {
  const std::uint64_t beside = beside_bytes() + (reads_base() ? release_step() : 0);
  return (options_.budget_bytes - std::min(options_.budget_bytes, beside)) / layout_->chunk_bytes();
}

void Collector::check_room(std::size_t sources) const {
  if (options_.rule->views()) {  // else check_views() knows, once there are sources
    if (options_.rule->chunkwise()) {
      check_chunks(chunks_of_entry() * sources, sources);
    }
    return;
  }
  if (together() && sources > 1 && chunk_room() < sources) {
    throw Error(Errc::kConfig,
                (options_.survey ? std::string("a survey")
                                 : "the rule '" + std::string(options_.rule->name) + "'") +
                    " needs a chunk of each of " + std::to_string(sources) +
                    " sources at the same time, and the budget of " +
                    std::to_string(options_.budget_bytes >> 10) + " KiB holds " +
                    std::to_string(chunk_room()));
  }
}

// The same window for each source, and what is left over for the first ones, a chunk each.
void Collector::divide_budget() {
  const auto live = static_cast<std::uint64_t>(
      std::count_if(pulls_.begin(), pulls_.end(), [](const auto& pull) { return pull->counts; }));
  const std::uint64_t sources = open_ ? std::max<std::uint64_t>({1, expected_, live}) : live;
  const std::uint64_t chunks = chunk_room();
  group_ = 0;
  if (options_.rule->views()) {
    divide_views(chunks, sources);
    return;
  }
  if (chunks < sources && sources > 1 && !together()) {
    const std::uint64_t sums = sum_chunks(*layout_, *options_.rule);
    group_ = chunks > sums ? chunks - sums : 1;
  }
  const std::uint64_t most = std::min(kMaxWindow, layout_->chunk_count());
  window_ = std::clamp<std::uint64_t>(chunks / sources, 1, most);
  std::uint64_t rest = chunks / sources == window_ && window_ < most ? chunks % sources : 0;
  for (const auto& pull : pulls_) {
    if (pull->counts) {
      pull->window = window_ + (rest > 0 ? 1 : 0);
      rest -= rest > 0 ? 1 : 0;
    }
  }
}

std::optional<std::size_t> Collector::find(const std::string& peer,
                                           const wire::SetId& set) const noexcept {
  for (std::size_t k = 0; k < sources_.size(); ++k) {
    if (pulls_[k]->counts && sources_[k].set == set && sources_[k].peer == peer) {
      return k;
    }
  }
  return std::nullopt;
}

std::vector<std::uint64_t> Collector::chunks_received() const {
  std::vector<std::uint64_t> counts;
  for (const auto& pull : pulls_) {
    counts.push_back(std::min(pull->feed.count(), pull->received.load(std::memory_order_relaxed)));
  }
  return counts;
}

std::optional<std::uint64_t> Collector::position_of(const Pull& pull,
                                                    std::uint64_t index) const noexcept {
  const auto position = pull.feed.find(index, next_);
  return position && *position < pull.next ? position : std::nullopt;
}

// The first position at which a chunk was asked for and is not here.
std::optional<std::uint64_t> Collector::outstanding(const Pull& pull,
                                                    std::uint64_t index) const noexcept {
  auto position = position_of(pull, index);
  while (position && is_here(pull, *position)) {
    *position += pull.feed.count();
    if (*position >= pull.next) {
      return std::nullopt;
    }
  }
  return position;
}

bool Collector::on_chunk(std::size_t source, const wire::Header& header, Frame& frame,
                         std::int64_t now_ms) {
  Pull& pull = *pulls_[source];
  const auto position = outstanding(pull, header.index);
  const bool wanted = state_ == State::kActive && is_pulled(pull) && position;
  if (!wanted) {
    return false;
  }
  pull.heard_ms = now_ms;
  pull.silent_ms = 0;
  pull.pace.came(now_ms);
  const bool fitting = fits(source, header, frame.size());
  if (!fitting || crc32c(frame.data(), frame.size()) != header.body_crc) {
    if (++pull.bad_in_a_row >= kMaxBadChunks) {
      fail(source, fitting ? "checksum" : "length",
           std::to_string(kMaxBadChunks) + " chunks in a row had a wrong " +
               (fitting ? "checksum" : "length"));
    } else {
      pull.again.insert(*position);
    }
    return false;
  }
  pull.bad_in_a_row = 0;
  const std::size_t size = frame.size();
  Held chunk;
  if (const char* why = unpack(source, header, frame, chunk)) {
    fail(source, "encoding", "chunk " + std::to_string(header.index) + " can't be decoded: " + why);
    return false;
  }
  if (!same_as_before(source, header.index, chunk)) {
    return !frame;
  }
  if (options_.rule->views() && !flatten(source, header.index, chunk)) {
    return !frame;  // its bytes may lie in the chunk, and are released with that
  }
  pull.again.erase(*position);
  --pull.due;
  bytes_.fetch_add(size, std::memory_order_relaxed);
  pull.received.fetch_add(1, std::memory_order_relaxed);
  keep(source, *position, std::move(chunk));
  if (enough_held()) {
    reduce_ready();
  } else {
    work_left_ = true;  // after the frames that have come by then
  }
  return true;
}

bool Collector::fits(std::size_t source, const wire::Header& header, std::size_t size) const {
  const std::uint64_t nbytes = layout_of(sources_[source]).chunk_range(header.index).nbytes;
  return header.encoding == wire::kRaw ? size == nbytes : size <= nbytes;
}

// Fills `chunk` with what came, unpacked; returns why it can't be decoded, or nullptr.
const char* Collector::unpack(std::size_t source, const wire::Header& header, Frame& frame,
                              Held& chunk) {
  if (header.encoding == wire::kRaw) {
    chunk.frame = std::move(frame);
    return nullptr;
  }
  Codec* const codec = codec_of(sources_[source]);
  if (codec == nullptr) {
    return "its encoding was not agreed on";
  }
  Body body;
  if (const char* why =
          codec->check(header.index, header.encoding, frame.data(), frame.size(), body)) {
    return why;
  }
  chunk.encoding = body.encoding;
  if (body.data == frame.data()) {
    chunk.frame = std::move(frame);
    return nullptr;
  }
  chunk.frame = Frame::copy(body.data, body.size);
  return nullptr;
}

void Collector::keep(std::size_t source, std::uint64_t position, Held chunk) {
  Pull& pull = *pulls_[source];
  if (pull.ahead && pull.held.size() + spill_room(pull) >= pull.window &&
      position >= pull.feed.end(next_ + 1) && spill(source, position, chunk)) {
    return;
  }
  pull.held.emplace(position, std::move(chunk));
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
  if (!open_ && counted_.size() == 1) {
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
  if (!open_ && counted_.size() <= options_.rule->traits.least) {  // too few are left
    stop();
    return;
  }
  if (record_) {
    record_->narrow(sources_[source].set);  // before anything is reduced without it
  }
  pull.counts = false;
  forget_chunks(pull);
  if (open_) {
    divide_budget();
    return;
  }
  use_sources();
  work_left_ = true;
  if (survey_) {  // the distances of the others stand
    return;
  }
  try {
    use_feeds();
  } catch (const Error& error) {  // without this source, the others need more memory than there is
    report_rule(error.what());
    return;
  }
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
  if (taken_) {
    stale_ = true;
    if (const auto lent = pull.held.find(next_); lent != pull.held.end()) {
      lent_.push_back(std::move(lent->second));
    }
  }
  pull.held.clear();
  pull.again.clear();
  pull.due = 0;
  pull.pace.forget_asked();
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

}  // namespace fedcore
