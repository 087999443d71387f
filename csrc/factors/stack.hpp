// Stack: a sum of products, scale * B * A of each term, as one product of two tall matrices: the columns
// of all B beside each other (left), and the rows of all A below each other (right). The rank of a term
// is the number of columns of its B and of rows of its A.
//
// Every column of the left side and row of the right side is brought to a magnitude of about 1 by a
// power of two, so that no square or product overflows, or underflows but where it is negligible.
// Columns whose column of B or row of A is 0 are left out. Immutable after construction. Cost: each factor
// is read once by the constructor, and again by each pass of read() over a side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace fedcore::factors {

// Writes `count` elements of a factor, row after row, from element `first` on.
using Reader = std::function<void(std::uint64_t first, std::size_t count, double* to)>;

struct Term {
  double scale;
  std::size_t rank;
  Reader b;  // rows x rank
  Reader a;  // rank x columns
};

struct Shape {
  std::uint64_t rows, columns;
};

enum class Side : std::uint8_t { kLeft, kRight };

class Stack {
 public:
  // Throws Error{kNonFinite} that names the term for NaN, infinity, or a scale that is not finite. The
  // terms' readers are called as long as the stack lives.
  Stack(Shape shape, const std::vector<Term>& terms);

  std::size_t columns() const noexcept { return columns_.size(); }
  std::uint64_t length(Side side) const noexcept {
    return side == Side::kLeft ? shape_.rows : shape_.columns;
  }
  // The sum is 2^exponent() * left * right.
  int exponent() const noexcept { return exponent_; }

  // Numbers `first` to `first + count` of all columns of the left side or rows of the right side:
  // columns of `to`, `stride` apart.
  void read(Side side, std::uint64_t first, std::size_t count, double* to,
            std::size_t stride) const;

 private:
  struct Column {
    std::size_t term, place;  // within the term
    int exponents[2];         // what to scale by, of each side
  };

  Shape shape_;
  const std::vector<Term>& terms_;
  std::vector<Column> columns_;
  int exponent_ = 0;
};

// value * 2^exponent without a factor that overflows; results near the smallest number may be rounded
// twice.
double scaled(double value, int exponent) noexcept;

}  // namespace fedcore::factors
