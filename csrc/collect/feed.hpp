// Feed: which chunks of a source each chunk of the output needs, and the order in which they are
// pulled.
//
// Chunks of the output are reduced round and round: position p is chunk p % outputs of turn
// p / outputs. A source has positions of its own: position q is entry q % count() of turn
// q / count(). An entry is a chunk of the source. It is pulled once a turn, in the order in which
// chunks of the output first need it, and wanted until the last one that needs it is reduced.
// Where a source has the output's layout and each element depends on that element alone, the feed is
// the identity: position q is chunk q, needed at position q. It takes no memory then, and each call
// is a comparison. Immutable.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace fedcore {

class Feed {
 public:
  // The identity for so many chunks.
  explicit Feed(std::uint64_t chunks = 0) noexcept : outputs_(chunks), count_(chunks) {}
  // `needs`: of each chunk of the output, the source's chunks. Throws Error{kLayout} where none of
  // them needs any.
  explicit Feed(const std::vector<std::vector<std::uint64_t>>& needs);

  bool identity() const noexcept { return chunks_.empty(); }
  // Entries of a turn.
  std::uint64_t count() const noexcept { return count_; }
  std::uint64_t chunk(std::uint64_t q) const noexcept {
    return identity() ? q % count_ : chunks_[q % count_];
  }
  // No position before first(p) is needed at p or later, none from end(p) on before p.
  std::uint64_t first(std::uint64_t p) const noexcept {
    return identity() ? p : at_turn(p) + first_[p % outputs_];
  }
  std::uint64_t end(std::uint64_t p) const noexcept {
    return identity() ? p : at_turn(p) + end_[p % outputs_];
  }
  // Whether position q is needed at p or later.
  bool wanted(std::uint64_t q, std::uint64_t p) const noexcept {
    return identity() ? q >= p : q / count_ * outputs_ + last_[q % count_] >= p;
  }
  // Calls each(q) for what is needed at p; stops, and returns false, where it does.
  template <typename Each>
  bool all_at(std::uint64_t p, const Each& each) const {
    if (identity()) {
      return each(p);
    }
    const auto& needs = needs_[p % outputs_];
    return std::all_of(needs.begin(), needs.end(),
                       [&](std::uint64_t entry) { return each(at_turn(p) + entry); });
  }
  // The first position of a chunk that is wanted at p; nothing for a chunk that no one needs. Its
  // next one is count() further on.
  std::optional<std::uint64_t> find(std::uint64_t chunk, std::uint64_t p) const noexcept;
  // Behind so many positions that are wanted at p.
  std::uint64_t near(std::uint64_t p, std::uint64_t window) const noexcept;
  // Positions that are needed from p on and before `end`.
  std::uint64_t left(std::uint64_t p, std::uint64_t end) const noexcept;
  // Chunks of the source that are wanted at the same time, at most.
  std::uint64_t most() const noexcept { return most_; }

 private:
  std::uint64_t at_turn(std::uint64_t p) const noexcept { return p / outputs_ * count_; }

  std::uint64_t outputs_;
  std::uint64_t count_;
  std::uint64_t most_ = 1;
  // Of each entry: its chunk, and the last chunk of the output that needs it.
  std::vector<std::uint64_t> chunks_, last_;
  // Of each chunk of the output: its entries, the first one that it or a later chunk needs, and the
  // end of those that earlier ones need.
  std::vector<std::vector<std::uint64_t>> needs_;
  std::vector<std::uint64_t> first_, end_;
  std::vector<std::uint64_t> entry_;  // + 1 of each chunk; 0: none
};

}  // namespace fedcore
