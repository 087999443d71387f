// Ranking: the values of an element across the sources, in ascending order of the integers of their
// bits, so that -0 < +0. Used by the rules that go by order. One thread uses a Ranking.
//
// A piece of each source is turned into sortable integers and sorted across the sources by a
// network (comparators.hpp). Up to 16 sources of 4 or 2 bytes an element stay in registers meanwhile
// (networks.hpp). Otherwise the network is cut down to what the wanted ranks need, and each of its
// comparators is one kernels::exchange() over the piece. Cost: about K log2(K)^2 / 4 comparators.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "codec/element.hpp"
#include "format/layout.hpp"

namespace fedcore {

class Ranking {
 public:
  // The ranks `first` to `last` of k sources are wanted.
  Ranking(std::size_t k, std::size_t first, std::size_t last);

  // Bytes of memory that it takes.
  static std::size_t scratch(std::size_t k, std::size_t first, std::size_t last);

  // Calls each(at, n) for pieces of `count` elements of a float dtype, n from element `at` on, once
  // the wanted ranks of a piece can be asked for. False if a value is not finite.
  template <typename Each>
  bool for_pieces(Dtype dtype, const void* const* inputs, std::size_t count, const Each& each) {
    for (std::size_t at = 0; at < count; at += step_) {
      const std::size_t n = std::min(step_, count - at);
      if (!rank(dtype, inputs, at, n)) {
        return false;
      }
      each(at, n);
    }
    return true;
  }

  // The values of a wanted rank in a piece.
  const void* values(Dtype dtype, std::size_t rank) const noexcept {
    return reinterpret_cast<const std::uint8_t*>(keys_.data()) + rank * step_ * item_size(dtype);
  }

  // The most elements of a piece.
  std::size_t step() const noexcept { return step_; }

 private:
  using Comparator = std::pair<std::uint32_t, std::uint32_t>;

  static std::vector<Comparator> network(std::size_t k, std::size_t first, std::size_t last);
  bool rank(Dtype dtype, const void* const* inputs, std::size_t at, std::size_t n);
  template <typename Key>
  bool rank_keys(Key exponent, const void* const* inputs, std::size_t at, std::size_t n);

  std::size_t k_;
  std::size_t first_, last_;
  std::size_t step_;
  std::vector<Comparator> network_;
  std::vector<std::int64_t> keys_;  // a piece of each source, source after source
};

}  // namespace fedcore
