// The collector's start from what a killed process left: reduced chunks and spilled ones.
#include <algorithm>
#include <vector>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "collect/collector.hpp"

namespace fedcore {
namespace {

// The longest stretch of marked chunks, the last followed by the first: where it begins, and its
// length.
std::pair<std::uint64_t, std::uint64_t> longest_run(const std::vector<bool>& marked) {
  const std::uint64_t count = marked.size();
  std::uint64_t best = 0, best_begin = 0, length = 0;
  for (std::uint64_t i = 0; i < 2 * count; ++i) {
    length = marked[i % count] ? std::min(length + 1, count) : 0;
    if (length > best) {
      best = length;
      best_begin = i + 1 - length;
    }
  }
  return {best_begin % count, best};
}

}  // namespace

// Which chunks are recorded as reduced and lie in the output; fills in their checksums.
std::vector<bool> Collector::verified() {
  const Record& record = *record_;
  const bool same =
      record.chunk_count() == layout_->chunk_count() && !pass_on_ &&
      std::equal(order_.begin(), order_.end(), record.sources().begin(), record.sources().end(),
                 [this](std::size_t k, const Record::Source& b) {
                   const Source& a = sources_[k];
                   return a.set == b.set && a.weight == b.weight && a.base.version == b.version;
                 });
  if (!same) {
    throw Error(Errc::kStorage, "the record of progress is of another collection");
  }
  std::vector<bool> found(static_cast<std::size_t>(layout_->chunk_count()));
  for (std::uint64_t index = 0; index < found.size(); ++index) {
    const auto recorded = record.at(index);
    if (!recorded) {
      continue;
    }
    const Range range = layout_->chunk_range(index);
    const std::uint64_t offset = out_.offset + range.offset;
    out_.file->populate(offset, range.nbytes);
    checksums_[index] = crc32c(out_.file->data() + offset, range.nbytes);
    out_.file->release(offset, range.nbytes);
    const std::uint32_t crc = options_.finisher
                                  ? options_.finisher->crc_of(range, checksums_[index], states_)
                                  : checksums_[index];
    found[index] = crc == *recorded;
  }
  return found;
}

// Begins behind the chunks that are reduced. They are one stretch, unless the machine itself went
// down: then the longest counts, and the others are reduced again.
void Collector::resume_reduced() {
  if (!record_) {
    return;
  }
  const auto [begin, length] = longest_run(verified());
  if (length == 0) {
    return;
  }
  const std::uint64_t count = layout_->chunk_count();
  next_ = (begin + length) % count;
  end_ = next_ + count - length;
  released_ = next_;
  for (const auto& pull : pulls_) {
    pull->next = pull->feed.first(next_);
    pull->received.store(pull->feed.count() - pull->feed.left(next_, end_),
                         std::memory_order_relaxed);
  }
  reduced_.store(length, std::memory_order_relaxed);
  work_left_ = true;
}

// Takes up what was spilled of a source.
void Collector::take_spilled(std::size_t source) {
  if (!options_.spill || group_ > 0) {
    return;
  }
  const std::uint64_t count = layout_of(sources_[source]).chunk_count();
  Pull& pull = *pulls_[source];
  for (const auto& [index, slot] : options_.spill->claim(sources_[source].set)) {
    pull.spilled.resize(static_cast<std::size_t>(count));
    if (index >= count || pull.spilled[index] != 0) {
      options_.spill->free(slot);
      continue;
    }
    pull.spilled[index] = slot + 1;
    const auto position = pull.feed.find(index, next_);
    if (!position) {
      continue;
    }
    if (*position < pull.feed.end(end_)) {
      pull.received.fetch_add(1, std::memory_order_relaxed);
    } else {
      used_.emplace_back(source, index);
    }
    work_left_ = true;
  }
}

}  // namespace fedcore
