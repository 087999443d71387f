// recompress(): a sum of products as one product of a given rank, the best there is.
//
// The sum W is never made: both sides of its stack are reduced to triangles, and the singular vectors
// are those of the triangles' product. W's best part of rank p is B * A, where the rows of A are
// orthonormal and B = W * transposed(A): a column of B has the norm of its singular value. Singular values
// fall; a singular value that is 0, or negligible, has a column of B and a row of A of zeros. The entry of
// largest magnitude in a row of A is positive. So the best part of a lower rank r is the first r columns
// and rows. The numbers depend on the terms alone: not on the instruction set or on threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/workers.hpp"
#include "factors/stack.hpp"

namespace fedcore::factors {

struct Factors {
  std::size_t rank;          // rows of A
  std::vector<double> b, a;  // row after row
  std::vector<double> sigma;
  double norm;       // of the whole sum (Frobenius, as all norms here)
  double cut;        // at most the norm of what the truncation left out
  std::size_t kept;  // singular values that are not 0
};

// The best part of rank min(most, rows, columns) of (the sum of the terms) / divisor. Throws what Stack's
// constructor throws, and Error{kNonFinite} where the result is beyond binary64. Readers are called by all
// `workers`, if there are any.
Factors recompress(Shape shape, const std::vector<Term>& terms, std::size_t most,
                   double divisor = 1, Workers* workers = nullptr);

// Bytes of memory that it takes besides its result and what the readers take, for stacks of so many columns.
std::size_t recompress_scratch(Shape shape, std::size_t columns, std::size_t most,
                               unsigned threads = 1) noexcept;

}  // namespace fedcore::factors
