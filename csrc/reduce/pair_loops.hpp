// What sums of squared differences are made of, with a body for each instruction set; the one in use is
// that of the kernels. All bodies give the same bits. Pure functions, callable from any thread.
#pragma once

#include <cstddef>
#include <cstdint>

#include "reduce/finish_bodies.hpp"

namespace fedcore {

struct PairLoops {
  static constexpr std::size_t kLanes = 8;

  // Values of a float dtype, by float_place(), as binary64 numbers; not 0 if one is not finite.
  std::uint64_t (*widen[4])(const std::uint8_t* from, double* to, std::size_t count);
  // Adds the squares of the differences of `count` numbers, a multiple of kLanes, to those of each of
  // the `rows` rows after it: to kLanes sums for each.
  void (*add_squares)(const double* one, std::size_t rows, std::size_t stride, std::size_t count,
                      double* sums);

  // The same for all pairs (0, 1), (0, 2), ... (1, 2), ... of k rows.
  void add_pairs(const double* first, std::size_t k, std::size_t stride, std::size_t count,
                 double* sums) const {
    for (std::size_t i = 0; i + 1 < k; ++i) {
      const std::size_t rows = k - i - 1;
      add_squares(first + i * stride, rows, stride, count, sums);
      sums += rows * kLanes;
    }
  }
};

const PairLoops& pair_loops();

// The sum of a pair's lanes, added in one order everywhere.
inline double sum_of_lanes(const double* of) noexcept {
  return ((of[0] + of[4]) + (of[2] + of[6])) + ((of[1] + of[5]) + (of[3] + of[7]));
}

constexpr std::size_t pairs_of(std::size_t k) noexcept { return k * (k - 1) / 2; }

}  // namespace fedcore
