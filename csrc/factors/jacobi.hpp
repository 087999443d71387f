// The singular values and right singular vectors of a small matrix, by one-sided Jacobi rotations.
//
// A QR factorisation with column pivoting comes first (Drmac and Veselic 2008): the rows of its triangle
// are nearly orthogonal already. The rotations then run over all pairs in cyclic order until none is
// needed (Hestenes 1958; Demmel and Veselic 1992). What is decided is decided by comparing numbers, ties
// go to the lower index, and only + - * / and square roots are used. The numbers depend on the matrix
// alone. Pure functions. Cost: about 20 n^3 operations.
#pragma once

#include <cstddef>
#include <vector>

namespace fedcore::factors {

// A matrix as its columns, `stride` numbers apart; stride is a multiple of kLanes, and what is beyond
// `rows` is 0.
struct Columns {
  std::size_t rows, columns, stride;
  std::vector<double> values;
};

struct RightVectors {
  std::vector<double> sigma;  // falling; those that are negligible beside the first are left out
  // A vector of unit length for each: `columns` numbers of the matrix, `stride` apart.
  std::size_t stride;
  std::vector<double> vectors;
};

// `matrix` has finite numbers whose squares neither overflow nor, where they matter, underflow.
RightVectors right_vectors(Columns matrix);

}  // namespace fedcore::factors
