// Networks: the values of an element across 2 to 16 sources, sorted in registers.
//
// A vector of each source is turned into sortable integers and goes through a sorting network
// (Batcher's odd-even merge, Knuth 5.2.2M) whose comparators are known when it is compiled, so that
// no row goes back to memory in between, and what no wanted rank depends on is left out. ranking.hpp
// has the order of the values, and the same for any number of sources.
//
// Pure functions, callable from any thread. No pointer needs alignment. Cost: for each vector, K loads,
// two instructions a comparator, and a store for each wanted rank.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format/layout.hpp"

namespace fedcore {

inline constexpr std::size_t kMostInRegisters = 16;

// A piece of each source. `rows` gets the values of the ranks `first` to `last`; rank r is written from
// byte r * stride on, and may be filled up to a multiple of 64 bytes.
struct NetworkPiece {
  const void* const* inputs;
  std::size_t at;  // the first element
  std::size_t count;
  std::size_t first, last;
  std::uint8_t* rows;
  std::size_t stride;
};

// What does that for k sources at the instruction set in use; nullptr where rows in memory are as fast
// or k is beyond. `middle`: the ranks are (k - 1) / 2 and k / 2. `exponent` has the bits of infinity. It
// returns false if a value is NaN or infinite.
using NetworkFn = bool (*)(const NetworkPiece& piece, std::int64_t exponent);
NetworkFn network_for(Dtype dtype, std::size_t k, bool middle);

}  // namespace fedcore
