// What the codes of int8 and nf4 are made with: the limits of scales, nf4's levels and the borders
// between them. Constants, and pure functions that are always inlined, for the loops of codes.inl
// and for quantise.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/decode.hpp"

namespace fedcore::quantise {

inline constexpr float kMaxBf16 = 0x1.FEp127f;
inline constexpr float kMaxF16 = 65504;
// Adding it to a small number rounds to an integer, which the low bits of the sum then hold.
inline constexpr float kRounder = 0x1.8p23f;
// From this scale on, all remainders that a division of int8 needs are normal numbers.
inline constexpr float kMinFastScale = 0x1p-60f;
// The largest scales that stand for finite values alone; larger ones are refused.
inline constexpr float kMaxInt8Scale = 0x1p121f;
inline constexpr float kMaxNf4Scale = 0x1p127f;
// The largest number that the 8 bits of a scale of nf4 stand for.
inline constexpr float kMaxMini = 1.9375f;

inline constexpr Nf4Levels kLevels = nf4_levels();
inline constexpr std::uint8_t kZeroCode = 7;  // of the level 0

struct Nf4Pair {
  float low, high;
};
struct Nf4Pairs {
  Nf4Pair at[256];
};
// What a byte of two codes stands for.
inline constexpr Nf4Pairs kPairs = [] {
  Nf4Pairs pairs{};
  for (std::size_t code = 0; code < 256; ++code) {
    pairs.at[code] = {kLevels.at[code & 15], kLevels.at[code >> 4]};
  }
  return pairs;
}();

struct Nf4Borders {
  double at[16];
};
// A value's code is the number of levels' middles, rounded to binary32, that its quotient by the
// scale, rounded to binary32, is above: round(v / s) > m. That needs no division. The quotient
// rounds to more than m if it is above the number h in the middle between m and the next one, or
// is h and m is odd (ties go to even): v > s * h, or v >= s * h. h has 25 bits and s 24, so s * h is
// exact in binary64, and a binary32 number v that differs from it does so by more than a part in
// 2^50. Where m is odd, a border that is lower by a part in 2^51 makes of >= the same >. The 16th
// entry is above every quotient of a block's values.
inline constexpr Nf4Borders kBorders = [] {
  Nf4Borders borders{};
  for (std::size_t i = 0; i < 15; ++i) {
    const double low = kLevels.at[i], high = kLevels.at[i + 1];
    const auto middle = static_cast<float>((low + high) / 2);
    const auto bits = __builtin_bit_cast(std::uint32_t, middle);
    const float above = __builtin_bit_cast(float, middle < 0 ? bits - 1 : bits + 1);
    const double half = (static_cast<double>(middle) + static_cast<double>(above)) / 2;
    const double lower = half * (half < 0 ? 1 + 0x1p-51 : 1 - 0x1p-51);
    borders.at[i] = (bits & 1) != 0 ? lower : half;
  }
  borders.at[15] = 4;
  return borders;
}();

// Cells of equal width over the quotients, so narrow that there is at most one border in each. Cell k
// is around (k - 16) / 16. A value's code is the number of borders below its cell, and one more if it
// is above the border whose place that number is. No border is near an edge of a cell, so a value that
// rounding puts into the next cell has the same code there.
struct Nf4Cells {
  std::int32_t below[32];
};
inline constexpr Nf4Cells kCells = [] {
  Nf4Cells cells{};
  for (std::size_t k = 0; k < 32; ++k) {
    const double edge = (static_cast<double>(k) - 16.5) / 16;
    for (std::size_t i = 0; i < 15; ++i) {
      cells.below[k] += kBorders.at[i] < edge ? 1 : 0;
    }
  }
  return cells;
}();
static_assert(
    [] {
      for (std::size_t i = 0; i < 15; ++i) {
        for (std::size_t k = 0; k <= 32; ++k) {
          const double away = kBorders.at[i] - (static_cast<double>(k) - 16.5) / 16;
          if (away > -1e-3 && away < 1e-3) {
            return false;
          }
        }
      }
      for (std::size_t k = 0; k < 31; ++k) {
        if (kCells.below[k + 1] > kCells.below[k] + 1) {
          return false;
        }
      }
      return true;
    }(),
    "cells hold more than a border, or have one at an edge");
// Values whose quotients are beyond this get the first and the last code, whatever they are; it is in the cells.
inline constexpr float kInCells = 0.9375f;
// The least scale whose reciprocal times 16 is far from infinity.
inline constexpr float kMinCellScale = 0x1p-100f;

// The code of the nearest number that nf4_mini() gives to a number from 0 up; the even code where
// two are as near.
FEDCORE_HD std::uint8_t to_mini(float value) {
  value = value < kMaxMini ? value : kMaxMini;
  if (value < 0x1p-14f) {
    return static_cast<std::uint8_t>(__builtin_bit_cast(std::uint32_t, value * 0x1p18f + kRounder));
  }
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  return static_cast<std::uint8_t>(((bits + 0x3FFFF + ((bits >> 19) & 1)) >> 19) - (112u << 4));
}

}  // namespace fedcore::quantise
