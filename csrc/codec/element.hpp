// Elements of float dtypes as binary64 numbers, and which dtypes an encoding covers. Pure functions
// of the codec's parts, callable from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "codec/quantise.hpp"
#include "format/layout.hpp"
#include "kernels/arith.hpp"

namespace fedcore {

// A dtype's elements as binary64 numbers, and back, limited to its finite numbers.
template <typename Format>
struct Element : Format {
  typedef typename Format::Word Word;
  static double read(const std::uint8_t* from, std::size_t i) {
    Word word;
    std::memcpy(&word, from + i * sizeof(Word), sizeof word);
    return Format::decode(word);
  }
  static void write(std::uint8_t* to, std::size_t i, double value, double limit) {
    value = value > limit ? limit : value;
    value = value < -limit ? -limit : value;
    const Word word = Format::encode(value);
    std::memcpy(to + i * sizeof(Word), &word, sizeof word);
  }
};

// Calls `work` with the element type of a float dtype and its largest finite number.
template <typename Work>
void with_float(Dtype dtype, Work&& work) {
  switch (dtype) {
    case Dtype::kF64:
      return work(Element<arith::F64>{}, arith::F64::largest());
    case Dtype::kF32:
      return work(Element<arith::F32>{}, arith::F32::largest());
    case Dtype::kF16:
      return work(Element<arith::F16>{}, arith::F16::largest());
    default:
      return work(Element<arith::Bf16>{}, arith::Bf16::largest());
  }
}

inline std::size_t count_of(const Run& run) noexcept { return run.nbytes / item_size(run.dtype); }

// A place among flat bytes that may be absent (nullptr).
inline const std::uint8_t* at_offset(const std::uint8_t* from, std::size_t bytes) noexcept {
  return from != nullptr ? from + bytes : nullptr;
}

// Whether runs of a dtype are encoded, or travel as they are.
inline bool encodes(Encoding encoding, Dtype dtype) noexcept {
  switch (encoding) {
    case Encoding::kRaw:
      return false;
    case Encoding::kBf16:
    case Encoding::kF16:
      return dtype == Dtype::kF32 || dtype == Dtype::kF64;
    default:
      return is_float(dtype);
  }
}

}  // namespace fedcore
