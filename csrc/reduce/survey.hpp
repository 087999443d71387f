// ChunkSurvey: how far apart each two of K bodies of one chunk are, one of which may be the base.
//
// Sums are as those of pairs.hpp: squares of differences in binary64, over the elements of float dtypes.
// There is one for each pair and for each block of the flat bytes, whose places do not depend on the
// chunk's size (where that is a multiple of a block): whoever adds the blocks of all chunks in order
// gets the same bits for chunks of any such size, any number of threads and any instruction set.
// Owns a piece of each body in binary64. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec/codec.hpp"
#include "codec/run_reader.hpp"
#include "format/layout.hpp"
#include "reduce/reducer.hpp"

namespace fedcore {

class ChunkSurvey {
 public:
  static constexpr std::uint64_t kBlock = 64u << 10;

  // `rows`: K. `skipped`: flat bytes, in order and apart, that do not count, such as buffers.
  ChunkSurvey(std::size_t rows, std::vector<Range> skipped);

  // Bytes that one takes for k rows, and chunks of so many bytes.
  static std::size_t scratch(std::size_t k, std::uint64_t chunk_bytes) noexcept;

  // Measures a chunk, the flat bytes of `range`; bodies as those of Reducer::reduce(). Returns a value
  // that is not finite, in which case squares() are of no use.
  std::optional<BadValue> measure(const Layout& layout, Range range, const Body* bodies,
                                  const std::uint8_t* base);

  // Block after block, the sums of pairs (0, 1), (0, 2), ... (1, 2), ...
  const std::vector<double>& squares() const noexcept { return squares_; }

 private:
  std::optional<BadValue> measure_run(const Run& run, const Body* bodies, const std::uint8_t* base);
  void add(const Run& run, std::uint64_t offset, std::size_t count);
  void skip(const Run& run, std::uint64_t offset, std::size_t count, std::size_t phase);
  void end_block();

  std::size_t rows_;
  std::vector<Range> skipped_;
  std::vector<const std::uint8_t*> at_;  // where the current run begins in each body
  std::vector<RunReader> readers_;
  std::vector<std::uint8_t> piece_;  // of one body, decoded
  std::vector<double> values_;       // of each body
  std::vector<double> lanes_;        // sums of the current block
  std::uint64_t block_ = 0;
  bool begun_ = false;
  std::vector<double> squares_;
};

}  // namespace fedcore
