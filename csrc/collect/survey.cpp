// The collector's survey: how far apart its sources are, before it is known which of them count.
#include <algorithm>
#include <string>

#include "base/error.hpp"
#include "collect/collector.hpp"

namespace fedcore {
namespace {

// The square of a distance to the base that is too great: no square of a distance between two sources
// with less is infinite, nor a sum of them.
constexpr double kTooFar = 0x1p960;

}  // namespace

void Collector::check_surveys() const {
  if ((options_.survey || base_weight_ != 0) && !base_.file) {
    throw Error(Errc::kLayout, "a survey, or a base that has a weight, needs a base");
  }
  if (base_weight_ != 0) {
    check_weights(*options_.rule, std::vector<double>{base_weight_});
  }
  const bool folds = options_.rule->traits.folds && !options_.rule->views();
  if ((options_.survey || base_weight_ != 0) && !folds) {
    throw Error(Errc::kConfig, "what follows a survey, or gives the base a weight, is the mean");
  }
}

void Collector::survey(const std::vector<std::size_t>& order) {
  if (!options_.survey || !open_ || state_ != State::kActive) {
    throw Error(Errc::kProtocol, "this collection's sources are not to be surveyed");
  }
  check_order(order, std::nullopt);
  drop_others(order);
  open_ = false;
  order_ = order;
  const std::size_t rows = order.size() + 1;
  survey_ = std::make_unique<std::vector<double>>(rows * rows);
  use_sources();
  divide_budget();
  if (options_.spill) {
    options_.spill->free_unclaimed();
  }
  work_left_ = true;
}

// Puts the chunks that were measured last into the spill file. Nothing waits for it: what finds no room is
// pulled again.
void Collector::keep_surveyed() {
  if (!options_.keep_surveyed || !options_.spill || no_room_) {
    return;
  }
  const std::uint64_t index = chunk_of(next_);
  for (const std::size_t k : counted_) {
    Pull& pull = *pulls_[k];
    const auto held = pull.held.find(next_);
    if (held == pull.held.end()) {
      continue;  // it lies there already
    }
    const auto slot = options_.spill->put(sources_[k].set, index, held->second.body());
    if (!slot) {
      return;
    }
    pull.spilled.resize(static_cast<std::size_t>(layout_->chunk_count()));
    pull.spilled[index] = *slot + 1;
  }
}

// The next turn is that of the sources that count.
void Collector::end_survey() {
  survey_.reset();
  end_ = next_ + layout_->chunk_count();
  reduced_.store(0, std::memory_order_relaxed);
  state_ = State::kActive;
  done_.store(false, std::memory_order_release);
}

void Collector::begin_digests(std::size_t source) {
  if (!digest_) {
    return;
  }
  const auto count = static_cast<std::size_t>(layout_->chunk_count());
  std::vector<std::uint64_t>& digests = pulls_[source]->digests;
  digests = sources_[source].digests;
  if (!digests.empty() && digests.size() != count) {
    throw Error(Errc::kLayout, "a source must have a digest of each chunk");
  }
  digests.resize(count);
}

// Whether a chunk is what it was when it came before, if it did; says so where it is not.
bool Collector::same_as_before(std::size_t source, std::uint64_t index, const Held& chunk) {
  if (!digest_) {
    return true;
  }
  const Body body = chunk.body();
  std::uint64_t& known = pulls_[source]->digests[static_cast<std::size_t>(index)];
  const std::uint64_t found =
      digest_->of(body.data, body.size, static_cast<std::uint8_t>(body.encoding));
  if (known != 0 && known != found) {
    fail(source, "changed",
         "chunk " + std::to_string(index) +
             " is not what it was when it was asked for the first time");
    return false;
  }
  known = found;
  return true;
}

void Collector::measure(Part& part) const {
  const Range range = layout_->chunk_range(part.index);
  part.bad = part.survey->measure(*layout_, range, part.inputs.data(), base_at(range));
  part.base_changed = !part.bad && base_changed(part.index);
}

// Where the rows of those that count are in the matrix, and that of the base.
std::vector<std::size_t> Collector::rows_of_counted() const {
  std::vector<std::size_t> rows;
  for (std::size_t j = 0; j < order_.size(); ++j) {
    if (pulls_[order_[j]]->counts) {
      rows.push_back(j);
    }
  }
  rows.push_back(order_.size());
  return rows;
}

// Adds the distances of a chunk. Where a source is too far from the base, it fails, and nothing is added:
// rules divide and compare what a survey finds.
void Collector::add_distances(const Part& part) {
  const std::vector<std::size_t> rows = rows_of_counted();
  const std::size_t width = order_.size() + 1;
  const std::vector<double>& found = part.survey->squares();
  const std::size_t pairs =
      rows.size() * (rows.size() - 1) / 2;  // of each block, of which there may be none
  std::size_t end = 0;
  bool near = true;
  for (std::size_t i = 0; i < counted_.size(); ++i) {
    end += counted_.size() - i;  // behind the pairs (i, i + 1) ... (i, base)
    double square = (*survey_)[rows[i] * width + rows.back()];
    for (std::size_t at = end - 1; at < found.size(); at += pairs) {
      square += found[at];
    }
    if (!(square < kTooFar)) {
      fail(counted_[i], "distance",
           "its distance to the global model is above 2^480, which no rule can compare");
      near = false;
    }
  }
  if (!near) {
    return;
  }
  for (std::size_t at = 0; at < found.size();) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::size_t j = i + 1; j < rows.size(); ++j) {
        (*survey_)[rows[i] * width + rows[j]] += found[at++];
      }
    }
  }
}

std::vector<std::vector<double>> Collector::distances() const {
  if (!survey_ || state_ != State::kDone) {
    throw Error(Errc::kProtocol, "the survey is not done");
  }
  const std::vector<std::size_t> rows = rows_of_counted();
  const std::size_t width = order_.size() + 1;
  std::vector<std::vector<double>> found;
  for (const std::size_t i : rows) {
    found.emplace_back();
    for (const std::size_t j : rows) {
      found.back().push_back((*survey_)[std::min(i, j) * width + std::max(i, j)]);
    }
  }
  return found;
}

}  // namespace fedcore
