// What encoded elements stand for, element by element, for host and device: the one definition that
// the CPU's loops (quantise.cpp) and the CUDA kernels (cuda/reduce.cu) compile.
//
// The rules of arith.hpp hold: IEEE 754 operations rounded to nearest, pure functions, builtins
// alone, always inlined. What is read was checked before (quantise::check), so no difference is NaN
// or infinite.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/arith.hpp"

namespace fedcore {

enum class Encoding : std::uint8_t {
  kRaw = 0,
  kBf16 = 1,
  kF16 = 2,
  kInt8 = 3,
  kNf4 = 4,
  kTopK = 5
};

namespace quantise {

inline constexpr std::size_t kInt8Block = 128;  // values per scale
inline constexpr std::size_t kNf4Block = 64;    // values per scale
inline constexpr std::size_t kNf4Group = 256;   // scales per scale of scales

FEDCORE_HD float int8_value(std::uint8_t code, float scale) {
  return static_cast<float>(static_cast<std::int8_t>(code)) * scale;
}

// What 4 bits stand for in a block whose scale is 1: quantiles of a normal distribution (Dettmers
// et al. 2023, appendix E).
struct Nf4Levels {
  float at[16];
};
FEDCORE_HD constexpr Nf4Levels nf4_levels() {
  return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
           -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
           0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
           0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};
}

// What the 8 bits of a block's scale stand for in a group whose scale is 1: no sign, 4 bits of
// exponent with bias 15, 4 of fraction, subnormal numbers, neither infinity nor NaN.
FEDCORE_HD constexpr float nf4_mini(std::uint32_t code) {
  return code < 16 ? static_cast<float>(code) * 0x1p-18f
                   : __builtin_bit_cast(float, (code + (112u << 4)) << 19);
}

// One input of a mean, as a device has it: raw elements, or the arrays of an encoded run
// (quantise::arrays), each from the entry on that element `first` of the run belongs to.
struct Input {
  const void* data;           // elements, or codes
  const float* scales;        // of int8's blocks, of nf4's groups
  const std::uint8_t* minis;  // of nf4's blocks
  Encoding encoding;          // any but kTopK
};

// The difference that element first + j of a run stands for.
FEDCORE_HD float difference(const Input& input, std::size_t first, std::size_t j) {
  const auto* const bytes = static_cast<const std::uint8_t*>(input.data);
  switch (input.encoding) {
    case Encoding::kBf16:
      return arith::bf16_to_float(static_cast<const std::uint16_t*>(input.data)[j]);
    case Encoding::kF16:
      return arith::half_to_float(static_cast<const std::uint16_t*>(input.data)[j]);
    case Encoding::kInt8:
      return int8_value(bytes[j], input.scales[(first % kInt8Block + j) / kInt8Block]);
    default: {
      static constexpr Nf4Levels levels = nf4_levels();  // one for all threads of a device
      constexpr std::size_t group = kNf4Block * kNf4Group;
      const float scale = input.scales[(first % group + j) / group] *
                          nf4_mini(input.minis[(first % kNf4Block + j) / kNf4Block]);
      const std::size_t nibble = first % 2 + j;
      return levels.at[(bytes[nibble / 2] >> (nibble % 2 * 4)) & 15] * scale;
    }
  }
}

// The elements of inputs of which some are encoded, as a function that a mean is computed of. T is
// the format of the elements. `base` points at that of j = 0 in what differences are added to, or
// is nullptr: there is none.
template <typename T>
struct MixedElements {
  const Input* inputs;
  const void* base;
  std::size_t first;

  FEDCORE_HD double operator()(std::size_t i, std::size_t j) const {
    const Input& input = inputs[i];
    if (input.encoding == Encoding::kRaw) {
      return T::decode(static_cast<const typename T::Word*>(input.data)[j]);
    }
    double value = difference(input, first, j);
    value = base != nullptr ? arith::element<T>(&base, 0, j) + value : value;
    return T::decode(T::encode(arith::limited<T>(value)));
  }
};

}  // namespace quantise
}  // namespace fedcore
