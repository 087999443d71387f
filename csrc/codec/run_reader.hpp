// RunReader: the flat bytes that an encoded run stands for, a piece at a time, so that whoever
// reads them (the reducer, Codec::decode) never holds more than a piece of them.
//
// Owns nothing but a cursor. Reads only bodies that Codec::check let pass, and only runs that their
// encoding encodes. Not thread-safe; any number of readers may read one body. Cost: bound by
// arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/quantise.hpp"
#include "format/layout.hpp"

namespace fedcore {

class RunReader {
 public:
  static constexpr std::size_t kTile = quantise::kTile;

  // `body` points at the run's first byte; `count` > 0 elements.
  RunReader(Encoding encoding, Dtype dtype, const std::uint8_t* body, std::size_t count) noexcept
      : values_(encoding, body, count), dtype_(dtype) {}

  // Writes the next `n` elements to `out`: base + the decoded difference, or the difference alone
  // where base is nullptr, rounded once and limited to the dtype's finite numbers. `base` and `out`
  // point at those elements and may be the same. n is at most kTile, and a multiple of
  // quantise::kInt8Block but at the run's end.
  void next(const std::uint8_t* base, std::uint8_t* out, std::size_t n) noexcept;

 private:
  quantise::Reader values_;
  Dtype dtype_;
};

// The bytes that a run takes in a body of this encoding that Codec::check let pass.
std::size_t run_bytes(Encoding encoding, const Run& run, const std::uint8_t* body) noexcept;

}  // namespace fedcore
