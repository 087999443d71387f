// The collector's close: it is decided which sources count, and where the output goes.
#include <algorithm>
#include <set>
#include <string>
#include <utility>

#include "base/error.hpp"
#include "collect/collector.hpp"

namespace fedcore {

void Collector::check_out(const Place& out) const {
  out.file->check_range(out.offset, layout_->total_bytes());
  if (!out.file->writable()) {
    throw Error(Errc::kStorage, "the output " + out.file->path() + " is not writable");
  }
}

void Collector::check_order(const std::vector<std::size_t>& order,
                            const std::optional<Weights>& given) const {
  std::vector<double> weights;
  std::set<std::size_t> seen;
  for (const std::size_t k : order) {
    if (k >= sources_.size() || !pulls_[k]->counts || !seen.insert(k).second) {
      throw Error(Errc::kProtocol, "source " + std::to_string(k) + " can't count");
    }
    weights.push_back(sources_[k].weight);
  }
  if (given && given->sources.size() != order.size()) {
    throw Error(Errc::kWeight, "there must be one weight per source");
  }
  check_weights(*options_.rule, given ? given->sources : weights);
  if (given && given->base != 0) {
    check_weights(*options_.rule, std::vector<double>{given->base});
  }
  check_views(sources_of(order));
}

void Collector::check_states(const States& states) const {
  if (options_.finisher) {
    options_.finisher->check_after(states);
  } else if (!states.empty()) {
    throw Error(Errc::kConfig, "states are written by a server optimizer alone");
  }
}

void Collector::close(const std::vector<std::size_t>& order, Place out,
                      std::shared_ptr<Record> record, const States& states,
                      const std::optional<Weights>& weights) {
  const bool measured = survey_ && state_ == State::kDone;
  if (!measured && (!open_ || options_.survey || state_ != State::kActive)) {
    throw Error(Errc::kProtocol, "this collection is closed, or its sources are not surveyed yet");
  }
  check_order(order, weights);
  check_out(out);
  check_states(states);
  drop_others(order);
  for (std::size_t j = 0; weights && j < order.size(); ++j) {
    sources_[order[j]].weight = weights->sources[j];
  }
  base_weight_ = weights ? weights->base : base_weight_;
  if (measured) {
    end_survey();
  }
  begin(order, std::move(out), std::move(record), states);
  if (group_ > 0) {
    rewind();
  }
  for (std::size_t j = 0; j < order_.size() && !options_.rule->chunkwise(); ++j) {
    take_spilled(order_[j]);
  }
  if (options_.spill) {
    options_.spill->free_unclaimed();
  }
  work_left_ = true;
}

void Collector::drop_others(const std::vector<std::size_t>& order) {
  for (std::size_t k = 0; k < pulls_.size(); ++k) {
    if (std::find(order.begin(), order.end(), k) == order.end()) {
      pulls_[k]->counts = false;
      forget_chunks(*pulls_[k]);
    }
  }
}

void Collector::begin(const std::vector<std::size_t>& order, Place out,
                      std::shared_ptr<Record> record, const States& states) {
  open_ = false;
  order_ = order;
  out_ = std::move(out);
  record_ = std::move(record);
  if (options_.finisher) {
    states_ = options_.finisher->check_after(states);
  }
  pass_on_ = options_.rule->traits.copies && !differences() && !options_.finisher;
  use_sources();
  use_feeds();
  divide_budget();
  if (group_ > 0 && parts_.size() > 1) {  // where sources are folded, one chunk at a time is
    parts_.resize(1);
    divide_budget();
  }
  if (!pass_on_) {
    checksums_.resize(static_cast<std::size_t>(layout_->chunk_count()));
  }
}

}  // namespace fedcore
