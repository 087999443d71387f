// The figure: how far the product of two means is from the mean of the products.
//
// With weights w that add up to 1, M the product of mean(B) and mean(A), and the factors of lower rank
// filled up with zeros:
//   sum w B A - M = sum w (B - mean(B)) (A - mean(A)),
// so the error is made of differences that are exact where the factors agree. Norms are Frobenius's, taken
// from the Gram matrices of the two sides: an error that is less than 1e-8 of the products of the
// differences reads as noise of that size. Columns are taken in blocks, two at a time, so that memory does not
// grow with their number. The numbers depend on the terms alone. Cost: 2 x rows x columns^2 operations.
#pragma once

#include <cstddef>
#include <vector>

#include "base/workers.hpp"
#include "factors/stack.hpp"

namespace fedcore::factors {

struct Figure {
  double sum;     // norm of the mean of the products
  double error;   // norm of the difference between that and the product of the means
  double change;  // norm of the difference between the mean of the products and the base
};

// `terms`: their scales are weights, positive, and whatever scales a product is in its B already.
// `base`: what the change is a change of; its scale counts, and nullptr is 0. Throws as Stack's constructor,
// and Error{kConfig} without a term or with a weight that is not positive. Readers are called by all workers.
Figure figure(Shape shape, const std::vector<Term>& terms, const Term* base = nullptr,
              Workers* workers = nullptr);

// Bytes of memory that it takes, the highest rank of a term being `most`.
std::size_t figure_scratch(Shape shape, std::size_t most, unsigned threads = 1) noexcept;

}  // namespace fedcore::factors
