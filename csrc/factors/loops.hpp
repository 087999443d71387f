// Loops over columns of binary64 numbers, with a body for each instruction set; the one in use is that
// of the kernels. All bodies give the same bits: a sum has eight lanes, which are added in one order,
// and no product and sum is contracted.
//
// Pure functions, callable from any thread. A column has a multiple of kLanes numbers; what is beyond
// its end is 0. No pointer needs alignment. Columns lie `stride` numbers apart.
#pragma once

#include <cstddef>

namespace fedcore::factors {

inline constexpr std::size_t kLanes = 8;

// The next multiple of kLanes.
constexpr std::size_t padded(std::size_t count) noexcept {
  return (count + kLanes - 1) / kLanes * kLanes;
}

struct Loops {
  // to[j] = the dot product of `one` and column j.
  void (*dots)(const double* one, const double* columns, std::size_t stride, std::size_t how_many,
               std::size_t count, double* to);
  // Adds by[j] * one to column j.
  void (*add_multiples)(const double* one, const double* by, double* columns, std::size_t stride,
                        std::size_t how_many, std::size_t count);
  // x, y = c * x - s * y, s * x + c * y.
  void (*rotate)(double* x, double* y, double c, double s, std::size_t count);

  double dot(const double* one, const double* other, std::size_t count) const {
    double sum = 0;
    dots(one, other, count, 1, count, &sum);
    return sum;
  }
};

const Loops& loops();

}  // namespace fedcore::factors
