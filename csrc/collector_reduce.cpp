// The collector's reduction: what is there of the next chunk becomes a chunk of the output.
#include <algorithm>
#include <string>
#include <utility>

#include "collector.hpp"
#include "crc32c.hpp"
#include "error.hpp"

namespace fedcore {
// Points at the next chunk of every source that has it in memory; false while one is missing.
bool Collector::gather() {
  bool from_spill = false;
  for (const std::size_t k : counted_) {
    const Pull& pull = *pulls_[k];
    if (pull.failed || !is_here(pull, next_)) {
      return false;
    }
    from_spill = from_spill || !pull.held.contains(next_);
  }
  one_by_one_ = from_spill && counted_.size() > kReadTogether;
  if (one_by_one_) {
    return true;
  }
  const std::uint64_t size = layout_->chunk_range(chunk_of(next_)).nbytes;
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    const Pull& pull = *pulls_[counted_[j]];
    const auto held = pull.held.find(next_);
    inputs_[j] = held != pull.held.end() ? held->second.body()
                                         : Body{spilled_chunk(counted_[j], size), size};
    if (inputs_[j].data == nullptr) {
      return false;
    }
  }
  return true;
}

// The next chunk of a source, from its slot; null if the slot does not hold it any more. It is
// asked for again then.
const std::uint8_t* Collector::spilled_chunk(std::size_t source, std::uint64_t size) {
  Pull& pull = *pulls_[source];
  std::uint32_t& slot = pull.spilled[chunk_of(next_)];
  const std::uint8_t* bytes = options_.spill->at(slot - 1, size);
  if (bytes == nullptr) {
    options_.spill->free(std::exchange(slot, 0) - 1);
    if (next_ < pull.next) {
      pull.again.insert(next_);
      ++pull.due;
    }
  }
  return bytes;
}

void Collector::reduce_ready() {
  work_left_ = false;
  if (open_) {
    return;
  }
  for (int reduced = 0; state_ == State::kActive && next_ < end_; ++reduced) {
    if (reduced == kMaxAtOnce) {
      work_left_ = true;
      return;
    }
    const bool done = group_ > 0 ? fold_next()
                                 : gather() && (one_by_one_ ? fold_all(chunk_of(next_))
                                                            : reduce_one(chunk_of(next_)));
    if (!done) {
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
  const std::uint8_t* result = inputs_[0].data;
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
  if (progress_) {
    progress_->put(index, checksums_[index]);
  }
  return true;
}

// The same bits with one spilled chunk resident at a time, for more sources than sums take memory.
bool Collector::fold_all(std::uint64_t index) {
  const Range range = layout_->chunk_range(index);
  const std::uint8_t* base =
      base_.file ? base_.file->data() + base_.offset + range.offset : nullptr;
  for (std::size_t j = 0; j < counted_.size(); ++j) {
    const Pull& pull = *pulls_[counted_[j]];
    const auto held = pull.held.find(next_);
    const bool here = held != pull.held.end();
    const Body chunk =
        here ? held->second.body() : Body{spilled_chunk(counted_[j], range.nbytes), range.nbytes};
    if (chunk.data == nullptr) {
      return false;
    }
    const auto bad = reducer_->fold(*layout_, range, j, chunk, base, reduced_chunk_.data());
    if (!here) {
      options_.spill->drop_pages(pull.spilled[index] - 1);
    }
    if (bad) {
      reject_value(*bad);
      return false;
    }
  }
  reducer_->finish(*layout_, range, reduced_chunk_.data());
  checksums_[index] = crc32c(reduced_chunk_.data(), range.nbytes);
  return write(index, reduced_chunk_.data());
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
        reducer_->fold(*layout_, range, folded_, held->second.body(), base, reduced_chunk_.data());
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
    if (pull.next <= next_ + 1 + pull.window) {
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
  if (options_.write_behind) {
    out_.file->write_behind(out_.offset + begin, end - begin);
  }
  if (base_.file) {
    base_.file->release(base_.offset + begin, end - begin);
  }
  released_ = next_;
}

}  // namespace fedcore
