// The collector's reduction: what is there of the next chunk becomes a chunk of the output.
#include <algorithm>
#include <string>
#include <utility>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "collect/collector.hpp"

namespace fedcore {

// Points at the next chunk of every source that has it in memory or its slot; false while one is
// missing.
bool Collector::gather(Part& part) {
  bool from_spill = false;
  for (const std::size_t k : counted_) {
    const Pull& pull = *pulls_[k];
    if (pull.failed || !is_here(pull, next_)) {
      return false;
    }
    from_spill = from_spill || !pull.held.contains(next_);
  }
  one_by_one_ = from_spill && counted_.size() > kReadTogether && !together();
  if (one_by_one_) {
    return true;
  }
  part.index = chunk_of(next_);
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    const Pull& pull = *pulls_[counted_[j]];
    const auto held = pull.held.find(next_);
    const std::optional<Body> body =
        held != pull.held.end() ? held->second.body() : spilled_chunk(counted_[j], next_);
    if (!body) {
      return false;
    }
    part.inputs[j] = *body;
  }
  if (base_counts()) {
    part.inputs.back() = base_body(layout_->chunk_range(part.index));
  }
  return true;
}

bool Collector::all_held(std::uint64_t position) const noexcept {
  return position < end_ && std::all_of(
                                counted_.begin(), counted_.end(),
                                [&](std::size_t k) {
                                  return !pulls_[k]->failed && pulls_[k]->held.contains(position);
                                });
}

// Whether to reduce now: more than one chunk at a time is worth waiting for until tick(), and a slow
// rule waits until other frames are handled.
bool Collector::enough_held() const noexcept {
  if (options_.rule->slow) {
    return false;
  }
  return parts_.size() == 1 || group_ > 0 || open_ || all_held(next_ + parts_.size() - 1);
}

// Points at the chunks after the next one that are in memory, too, as many as there are threads;
// returns how many there are with that one.
unsigned Collector::gather_more() {
  unsigned count = 1;
  while (count < parts_.size() && all_held(next_ + count)) {
    Part& part = parts_[count];
    part.index = chunk_of(next_ + count);
    for (std::size_t j = 0; j < counted_.size(); ++j) {
      part.inputs[j] = pulls_[counted_[j]]->held.at(next_ + count).body();
    }
    if (base_counts()) {
      part.inputs.back() = base_body(layout_->chunk_range(part.index));
    }
    ++count;
  }
  return count;
}

void Collector::reduce_ready() {
  work_left_ = false;
  if (open_ || aside()) {
    return;
  }
  const int most = options_.rule->slow ? 1 : kMaxAtOnce;
  int reduced = 0;
  while (state_ == State::kActive && next_ < end_) {
    if (reduced >= most) {
      work_left_ = true;
      return;
    }
    const std::uint64_t before = next_;
    if (!reduce_some()) {
      return;
    }
    reduced += static_cast<int>(next_ - before);
  }
  if (state_ == State::kActive) {
    finish();
  }
}

// Reduces the next chunk, and with it those after it that are there; false if it can't yet.
bool Collector::reduce_some() {
  if (options_.rule->views()) {
    return reduce_view();
  }
  if (group_ == 0) {
    if (!gather(parts_[0])) {
      return false;
    }
    if (!one_by_one_) {
      return reduce_parts(gather_more());
    }
  }
  if (!(group_ > 0 ? fold_next() : fold_all(chunk_of(next_)))) {
    return false;
  }
  advance();
  return true;
}

void Collector::finish() {
  state_ = State::kDone;
  done_.store(true, std::memory_order_release);
  events_.push_back({CollectorEvent::Kind::kDone, 0, "", ""});
}

const std::uint8_t* Collector::base_at(const Range& range) const {
  if (!base_.file) {
    return nullptr;
  }
  MappedFile::arm();
  return base_.file->data() + base_.offset + range.offset;
}

void Collector::reduce(Part& part) const {
  if (part.survey) {
    measure(part);
    return;
  }
  const Range range = layout_->chunk_range(part.index);
  const std::uint8_t* base = base_at(range);
  if (part.finished) {
    part.finished->begin(range);
  }
  try {
    part.bad = part.reducer->reduce(*layout_, range, part.inputs.data(), base, part.out.data());
  } catch (const RuleError& error) {
    part.failed = error;
    return;
  }
  if (!part.bad) {
    part.crc = crc32c(part.out.data(), range.nbytes);
    part.base_changed = base_changed(part.index);
    part.changed_state = options_.finisher ? options_.finisher->changed(range) : nullptr;
  }
}

// Whether a chunk was made with bytes of the base that are not those that were recorded. It is
// asked once the chunk is made: what changes before is seen, and the bytes are hot in the cache.
bool Collector::base_changed(std::uint64_t index) const {
  if (!base_.file || options_.base_crcs.empty()) {
    return false;
  }
  const Range range = layout_->chunk_range(index);
  const bool whole = reads_base();
  const std::vector<Run> runs = whole ? std::vector<Run>{} : layout_->runs(range);
  const bool read = whole || std::any_of(runs.begin(), runs.end(),
                                         [](const Run& run) { return !is_float(run.dtype); });
  return read && crc32c(base_.file->data() + base_.offset + range.offset, range.nbytes) !=
                     options_.base_crcs[static_cast<std::size_t>(index)];
}

// True if the base is as it was; else says that it is not, and stops.
bool Collector::check_base(std::uint64_t index) {
  if (!base_changed(index)) {
    return true;
  }
  report_base(*base_.file, index);
  return false;
}

void Collector::report_base(const MappedFile& file, std::uint64_t index) {
  const std::string& path = file.path();
  const std::string what =
      file.whole()
          ? " has changed while updates were added to it: chunk " + std::to_string(index) +
                " is not what it was"
          : " became shorter while updates were added to it, or its disk could not read it";
  events_.push_back({CollectorEvent::Kind::kDamaged, 0, "", path + what});
  stop();
}

void Collector::report_state(const MappedFile& state) {
  const std::string what = state.whole() ? " has changed since it was committed"
                                         : " became shorter, or its disk could not read it";
  events_.push_back({CollectorEvent::Kind::kDamaged, 0, "", state.path() + what});
  stop();
}

void Collector::report_rule(std::uint64_t index, const RuleError& error) {
  events_.push_back({CollectorEvent::Kind::kRuleFailed, 0, error.trace(),
                     "the rule '" + std::string(options_.rule->name) + "' failed in chunk " +
                         std::to_string(index) + ", " + error.what()});
  stop();
}

// Reduces the first `count` parts, at the same time, and writes them one after the other; false if
// one can't be.
bool Collector::reduce_parts(unsigned count) {
  if (pass_on_) {
    if (!write(parts_[0], parts_[0].inputs[0].data)) {
      return false;
    }
    advance();
    return true;
  }
  workers_->run(count, [this](unsigned i) { reduce(parts_[i]); });
  for (unsigned i = 0; i < count; ++i) {
    if (!settle(parts_[i])) {
      return false;
    }
  }
  return true;
}

// Writes a part that was reduced; false if it can't be.
bool Collector::settle(const Part& part) {
  if (part.failed) {
    report_rule(part.index, *part.failed);
    return false;
  }
  if (part.bad) {
    reject_value(*part.bad);
    return false;
  }
  if (part.base_changed) {
    report_base(*base_.file, part.index);
    return false;
  }
  if (part.survey) {
    add_distances(part);
    const bool near = std::none_of(counted_.begin(), counted_.end(),
                                   [&](std::size_t k) { return pulls_[k]->failed; });
    if (!near) {
      return false;
    }
    keep_surveyed();
    advance();
    return true;
  }
  if (part.changed_state != nullptr) {
    report_state(*part.changed_state);
    return false;
  }
  checksums_[part.index] = part.crc;
  if (!write(part, part.out.data())) {
    return false;
  }
  advance();
  return true;
}

void Collector::reject_value(const BadValue& bad) {
  if (bad.source == counted_.size()) {  // a base that was committed is finite
    report_base(*base_.file, chunk_of(next_));
    return;
  }
  const Location where = layout_->locate(bad.byte_offset);
  fail(counted_[bad.source], "nonfinite",
       "NaN or infinity in tensor '" + std::string(where.tensor) + "', element " +
           std::to_string(where.element));
}

bool Collector::write(const Part& part, const std::uint8_t* result) {
  const Range range = layout_->chunk_range(part.index);
  try {
    out_.file->write(out_.offset + range.offset, result, range.nbytes);
    if (part.finished) {
      part.finished->write();
    }
  } catch (const Error& error) {
    events_.push_back({CollectorEvent::Kind::kBroken, 0, "storage", error.what()});
    stop();
    return false;
  }
  if (record_) {
    const std::uint32_t crc = checksums_[part.index];
    record_->put(part.index, part.finished ? part.finished->crc(crc) : crc);
  }
  return true;
}

// The same bits with one spilled chunk resident at a time, for more sources than sums take memory.
bool Collector::fold_all(std::uint64_t index) {
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* base = base_at(range);
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    const Pull& pull = *pulls_[counted_[j]];
    const auto held = pull.held.find(next_);
    const bool here = held != pull.held.end();
    const std::optional<Body> chunk =
        here ? held->second.body() : spilled_chunk(counted_[j], next_);
    if (!chunk) {
      return false;
    }
    const auto bad =
        parts_[0].reducer->fold(*layout_, range, j, *chunk, base, parts_[0].out.data());
    if (!here) {
      options_.spill->drop_pages(pull.spilled[index] - 1);
    }
    if (bad) {
      reject_value(*bad);
      return false;
    }
  }
  return finish_fold(index);
}

// The base as one more source of the sums, the last one.
void Collector::fold_base(const Range& range) {
  if (base_weight_ > 0) {
    const std::uint8_t* const base = base_at(range);
    parts_[0].reducer->fold(*layout_, range, counted_.size(), base_body(range), base,
                            parts_[0].out.data());
  }
}

// Makes a chunk of the sums, and writes it.
bool Collector::finish_fold(std::uint64_t index) {
  Part& part = parts_[0];
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* base = base_at(range);
  part.index = index;
  fold_base(range);
  if (part.finished) {
    part.finished->begin(range);
  }
  part.reducer->finish(*layout_, range, base, part.out.data());
  checksums_[index] = crc32c(part.out.data(), range.nbytes);
  if (!check_base(index)) {
    return false;
  }
  if (const MappedFile* const state =
          options_.finisher ? options_.finisher->changed(range) : nullptr) {
    report_state(*state);
    return false;
  }
  return write(part, part.out.data());
}

// Adds what is there of the next chunk to its sums, in the order of the sources; true once it is
// written.
bool Collector::fold_next() {
  const std::uint64_t index = chunk_of(next_);
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* base = base_at(range);
  for (; folded_ < counted_.size(); ++folded_) {
    Pull& pull = *pulls_[counted_[folded_]];
    const auto held = pull.held.find(next_);
    if (held == pull.held.end()) {
      return false;
    }
    const auto bad = parts_[0].reducer->fold(*layout_, range, folded_, held->second.body(), base,
                                             parts_[0].out.data());
    if (bad) {
      reject_value(*bad);
      return false;
    }
    pull.held.erase(held);
    pull.folded = true;
  }
  return finish_fold(index);
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

// Lets go of the chunk that was reduced. What was spilled stays there, in case a source is lost.
void Collector::advance() {
  for (const std::size_t k : counted_) {
    Pull& pull = *pulls_[k];
    pull.feed.all_at(next_, [&](std::uint64_t position) {
      const bool last = !pull.feed.wanted(position, next_ + 1);
      if (is_spilled(pull, position)) {
        options_.spill->drop_pages(pull.spilled[pull.feed.chunk(position)] - 1);
        if (last) {
          used_.emplace_back(k, pull.feed.chunk(position));
        }
      }
      if (last) {
        pull.held.erase(position);
      }
      return true;
    });
    pull.folded = false;
    if (pull.next <= pull.feed.end(next_ + 1) + pull.window) {
      pull.ahead = false;
      if (pull.held.size() <= pull.window / 2) {
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
  if ((next_ - released_) * step < release_step() && !last_of_turn && next_ != end_) {
    return;
  }
  const std::uint64_t begin = chunk_of(released_) * step;
  const std::uint64_t end = last_of_turn ? layout_->total_bytes()
                                         : std::min(chunk_of(next_) * step, layout_->total_bytes());
  if (options_.write_behind && !survey_) {
    out_.file->write_behind(out_.offset + begin, end - begin);
    if (options_.finisher) {
      options_.finisher->write_behind({begin, end - begin}, states_);
    }
  }
  if (base_.file) {
    base_.file->release(base_.offset + begin, end - begin);
  }
  released_ = next_;
}

}  // namespace fedcore
